"""SGLang's Triton kernel that lists a batch's slots: it has moved three times."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable

from sglang_spark.adapters.targets import Target, exists

# Since 0.5.23, since 0.5.16, in 0.5.14, in 0.5.10.
_MODULES = (
    "sglang.kernels.ops.attention.kv_indices",
    "sglang.kernels.ops.kvcache.kv_indices",
    "sglang.srt.layers.attention.triton_ops.kv_indices",
    "sglang.srt.layers.attention.utils",
)
_PATH = f"{next(filter(exists, _MODULES), _MODULES[0])}.create_flashinfer_kv_indices_triton"

TARGETS = (Target(_PATH),)


def slots_kernel() -> Callable:
    """``kernel[(batch,)](req_to_token, req_pool_indices, lengths, kv_indptr, None, out, stride)``."""
    return pkgutil.resolve_name(_PATH)
