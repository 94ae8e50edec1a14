from __future__ import annotations

from dataclasses import dataclass

import torch

from accuracy.outcomes import Label
from baselines.base import Chunk, Method
from spark_kernels import reference
from spark_kernels.formats import CompressedKeyFormat, Int4ValueFormat, KeyFormat, ValueFormat

VALUE_DTYPES = {"bf16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True, kw_only=True)
class Spark(Method):
    """What ``--kv-compress spark`` stores: rows of `spark_kernels.formats`, as `spark_kernels.reference` defines them.

    SparK (https://arxiv.org/abs/2508.15212) with a per-token restore plane.

    Parameters
    ----------
    ratio, restore_bits
        ``--spark-key-ratio``, ``--spark-restore-bits``.
    value_dtype
        bf16 or fp8_e4m3 (``--kv-cache-dtype``), or int4 (``--spark-value-dtype``).
    dense_layers
        ``--spark-dense-layers``.
    """

    ratio: float
    restore_bits: int = 2
    value_dtype: str = "bf16"
    dense_layers: tuple[int, ...] = ()

    @property
    def label(self) -> Label:
        return Label("spark", self.ratio, self.restore_bits, self.value_dtype)

    def key_format(self, head_dim: int) -> CompressedKeyFormat:
        return KeyFormat.from_ratio(head_dim, self.ratio, self.restore_bits)

    def value_format(self, head_dim: int) -> ValueFormat | Int4ValueFormat:
        if self.value_dtype == "int4":
            return Int4ValueFormat(head_dim)
        return ValueFormat(head_dim, VALUE_DTYPES[self.value_dtype])

    def scores(self, chunk: Chunk) -> torch.Tensor:
        """Saliency of each channel of each key, ``[num_tokens, num_kv_heads, head_dim]``."""
        return reference.saliency(chunk.k, chunk.query_norms())

    def keys(self, chunk: Chunk) -> torch.Tensor:
        if chunk.layer in self.dense_layers:
            return chunk.k
        return self.store_and_read(chunk.k, self.scores(chunk))

    def store_and_read(self, k: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Keys restored from rows that keep the channels with the largest scores."""
        key_format = self.key_format(k.shape[-1])
        channels = reference.select_channels(scores, key_format.kept_channels)
        return reference.unpack_keys(reference.pack_keys(k, channels, key_format), key_format)

    def values(self, chunk: Chunk) -> torch.Tensor:
        value_format = self.value_format(chunk.v.shape[-1])
        return reference.decode_values(reference.encode_values(chunk.v, value_format), value_format)

    def key_bytes(self, head_dim: int) -> float:
        return self.key_format(head_dim).row_bytes

    def value_bytes(self, head_dim: int) -> float:
        return self.value_format(head_dim).row_bytes
