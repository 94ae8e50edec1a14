"""FlashInfer's attention over ragged batches, where it is installed."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

logger = logging.getLogger(__name__)

_DTYPES = (torch.bfloat16, torch.float16)
_HEAD_DIMS = (64, 128, 256)
# What SGLang gives FlashInfer for the partial results of long sequences.
_WORKSPACE_BYTES = 384 * 2**20
# Whether it has computed something in this process, or failed before it did.
_has_worked, _has_failed = False, False


def serves(q: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether FlashInfer is there for these queries and values."""
    return (
        not _has_failed
        and q.device.type == "cuda"
        and q.shape[0] > 0
        and q.dtype in _DTYPES
        and q.shape[2] == v.shape[2]
        and q.shape[2] in _HEAD_DIMS
        and is_installed()
    )


@contextmanager
def may_fail_at_first() -> Iterator[None]:
    """Around a use of FlashInfer: if the first one fails, say so once and `serves` nothing any more.

    It compiles its kernels at first use, which needs a compiler that fits. A failure after that is somebody's bug.
    """
    global _has_worked, _has_failed
    try:
        yield
    except Exception as error:
        if _has_worked:
            raise
        _has_failed = True
        reason = str(error).strip().partition("\n")[0]
        logger.warning(
            f"FlashInfer is installed but does not work here ({type(error).__name__}: {reason}); prefill attention "
            "runs SparK's Triton kernel instead, which is slower"
        )
    else:
        _has_worked = True


@cache
def is_installed() -> bool:
    # It is NVIDIA's only; PyTorch calls AMD's GPUs cuda too.
    return torch.version.hip is None and importlib.util.find_spec("flashinfer") is not None


@cache
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


class Wrapper:
    """A ``BatchPrefillWithRaggedKVCacheWrapper`` whose lse is a natural logarithm (FlashInfer's is to base 2)."""

    def __init__(self, device: torch.device) -> None:
        from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

        self._wrapper = BatchPrefillWithRaggedKVCacheWrapper(_workspace(device), "NHD")

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        causal: bool,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        sm_scale: float,
        logits_soft_cap: float,
    ) -> None:
        """Plan for a batch; ``qo_indptr`` and ``kv_indptr`` are int32 on the host."""
        self._wrapper.plan(
            qo_indptr,
            kv_indptr,
            num_qo_heads,
            num_kv_heads,
            head_dim,
            causal=causal,
            sm_scale=sm_scale,
            logits_soft_cap=logits_soft_cap,
            q_data_type=dtype,
        )

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Output in the dtype of ``q`` and natural-log lse; a query without keys gets 0 and less than -30,000."""
        out, lse = self._wrapper.run(q, k, v, return_lse=True)
        return out, lse * math.log(2.0)


class Wrappers:
    """Wrappers by number, made when they are first asked for: each has buffers that outlive a step."""

    def __init__(self) -> None:
        self._wrappers: list[Wrapper] = []

    def get(self, number: int, device: torch.device) -> Wrapper:
        while len(self._wrappers) <= number:
            self._wrappers.append(Wrapper(device))
        return self._wrappers[number]
