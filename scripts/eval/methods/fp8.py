from __future__ import annotations

import torch

from eval.methods.base import Chunk, Method

LIMIT = torch.finfo(torch.float8_e4m3fn).max


class Fp8(Method):
    """What ``--kv-cache-dtype fp8_e4m3`` stores without calibrated scales (https://arxiv.org/abs/2209.05433)."""

    name = "fp8_e4m3"

    def keys(self, chunk: Chunk) -> torch.Tensor:
        return _rounded(chunk.k)

    def values(self, chunk: Chunk) -> torch.Tensor:
        return _rounded(chunk.v)

    def key_bytes(self, head_dim: int) -> float:
        return head_dim

    def value_bytes(self, head_dim: int) -> float:
        return head_dim


def _rounded(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-LIMIT, LIMIT).to(torch.float8_e4m3fn).float()
