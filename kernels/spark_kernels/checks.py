"""Checks of the wrappers' arguments. Each raises a ValueError that names the argument, if not said otherwise."""

from __future__ import annotations

import itertools

import torch

from spark_kernels.rows import LayerRows

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_INDEX_DTYPES = (torch.int32, torch.int64)


def check_planned(plan: object) -> None:
    """Raise RuntimeError if ``plan`` is None."""
    if plan is None:
        raise RuntimeError("plan() must be called before run()")


def check_heads(num_qo_heads: int, num_kv_heads: int) -> None:
    """Query heads must form whole groups."""
    if num_kv_heads < 1 or num_qo_heads < 1 or num_qo_heads % num_kv_heads:
        raise ValueError(f"num_qo_heads={num_qo_heads} must be a positive multiple of num_kv_heads={num_kv_heads}")


def check_tensor(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.device.type != device.type:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def check_rows(
    rows: LayerRows,
    num_kv_heads: int,
    head_dim: int,
    slots: tuple[int, int] | None,
    name: str,
    device: torch.device,
) -> None:
    if rows.num_kv_heads != num_kv_heads or rows.key_format.head_dim != head_dim:
        raise ValueError(
            f"rows have {rows.num_kv_heads} KV heads of head_dim {rows.key_format.head_dim}, "
            f"the plan has {num_kv_heads} of {head_dim}"
        )
    if rows.device.type != device.type:
        raise ValueError(f"rows must be on {device}, got {rows.device}")
    check_slots(name, slots, rows)


def check_indptr(name: str, indptr: torch.Tensor) -> int | None:
    """Check an indptr and return where it ends; None of one on a GPU, whose numbers are not looked at."""
    if indptr.dtype not in _INDEX_DTYPES or indptr.dim() != 1 or indptr.shape[0] < 1:
        raise ValueError(f"{name} must be int32 or int64 [batch + 1], got {indptr.dtype} {list(indptr.shape)}")
    if indptr.device.type != "cpu":
        return None
    bounds = indptr.tolist()
    if bounds[0] != 0 or any(a > b for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"{name} must start at 0 and not decrease, got {bounds}")
    return bounds[-1]


def check_indices(name: str, indices: torch.Tensor, count: int | None, device: torch.device) -> tuple[int, int] | None:
    """Check a list of slots and return the range of the first ``count``, (0, 0) of none.

    None if ``count`` is None, or if the slots are on a GPU, where they are not looked at.
    """
    if indices.dtype not in _INDEX_DTYPES or indices.dim() != 1 or indices.shape[0] < (count or 0):
        raise ValueError(
            f"{name} must be int32 or int64 with at least {count or 0} entries, "
            f"got {indices.dtype} {list(indices.shape)}"
        )
    if indices.device.type != device.type:
        raise ValueError(f"{name} must be on {device}, got {indices.device}")
    if count is None or indices.device.type != "cpu":
        return None
    if count == 0:
        return 0, 0
    low, high = torch.aminmax(indices[:count])
    return int(low), int(high)


def check_slots(name: str, slots: tuple[int, int] | None, rows: LayerRows) -> None:
    """The range of slots, if it is known, must lie in ``rows``: kernels do not check."""
    if slots is not None and (slots[0] < 0 or slots[1] >= max(rows.num_slots, 1)):
        raise ValueError(f"{name} must lie in 0 .. {rows.num_slots - 1}, got {slots[0]} .. {slots[1]}")
