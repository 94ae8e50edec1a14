"""SGLang's Triton kernel that lists a batch's slots: 0.5.23 has it in another package."""

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


_BEFORE, _SINCE_0_5_23 = (f"sglang.kernels.ops.{package}.kv_indices" for package in ("kvcache", "attention"))
_PATH = f"{_BEFORE if _exists(_BEFORE) else _SINCE_0_5_23}.create_flashinfer_kv_indices_triton"

TARGETS = (Target(_PATH),)


def slots_kernel() -> Callable:
    """``kernel[(batch,)](req_to_token, req_pool_indices, lengths, kv_indptr, None, out, stride)``."""
    return pkgutil.resolve_name(_PATH)
