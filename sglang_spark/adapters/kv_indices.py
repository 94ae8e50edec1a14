"""SGLang's Triton kernel that lists a batch's slots: it has moved twice."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from importlib.util import find_spec

from sglang_spark.adapters.targets import Target


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


# Since 0.5.23, since 0.5.16, before.
_MODULES = (
    "sglang.kernels.ops.attention.kv_indices",
    "sglang.kernels.ops.kvcache.kv_indices",
    "sglang.srt.layers.attention.triton_ops.kv_indices",
)
_PATH = f"{next(filter(_exists, _MODULES), _MODULES[0])}.create_flashinfer_kv_indices_triton"

TARGETS = (Target(_PATH),)


def slots_kernel() -> Callable:
    """``kernel[(batch,)](req_to_token, req_pool_indices, lengths, kv_indptr, None, out, stride)``."""
    return pkgutil.resolve_name(_PATH)
