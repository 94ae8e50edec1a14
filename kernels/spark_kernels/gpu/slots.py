"""The slots of a batch's tokens, listed where SGLang keeps them, by many programs per request."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024
# Of each request; long ones take several turns.
_PROGRAMS = 32


@triton.jit(do_not_specialize=["stride"], do_not_specialize_on_alignment=["req_pool_indices_ptr", "kv_indptr_ptr"])
def _fill_slots(
    req_to_token_ptr, req_pool_indices_ptr, kv_indptr_ptr, out_ptr, stride, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr
):
    request = tl.program_id(0)
    start = tl.load(kv_indptr_ptr + request)
    stop = tl.load(kv_indptr_ptr + request + 1)
    slots = req_to_token_ptr + tl.load(req_pool_indices_ptr + request).to(tl.int64) * stride
    for first in range(tl.program_id(1) * BLOCK, stop - start, PROGRAMS * BLOCK):
        tokens = first + tl.arange(0, BLOCK)
        inside = tokens < stop - start
        tl.store(out_ptr + start + tokens, tl.load(slots + tokens, mask=inside), mask=inside)


def fill_slots(
    req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, kv_indptr: torch.Tensor, out: torch.Tensor
) -> None:
    """See `spark_kernels.implementation.Kernels`."""
    _fill_slots[(req_pool_indices.shape[0], _PROGRAMS)](
        req_to_token, req_pool_indices, kv_indptr, out, req_to_token.stride(0), PROGRAMS=_PROGRAMS, BLOCK=_BLOCK
    )
