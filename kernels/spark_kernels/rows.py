"""One layer's cache."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from spark_kernels.calibration import KeyCalibration, Restoration
from spark_kernels.formats import KeyFormat, Pruned, ValueFormat, dtype_name


@dataclass(frozen=True, eq=False)
class LayerRows:
    """One layer's cache as kernels see it.

    Parameters
    ----------
    keys
        uint8 ``[num_slots, num_kv_heads, key_format.row_bytes]``, contiguous.
    values
        uint8 ``[num_slots, num_kv_heads, value_format.row_bytes]``, contiguous, on the device of ``keys``.
    key_format, value_format
        The meaning of the rows. ``value_format.head_dim`` may differ from ``key_format.head_dim``.
    calibration
        Of the layer, on the same device, for pruned keys; None for whole keys.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_format: KeyFormat
    value_format: ValueFormat
    calibration: KeyCalibration | None = None

    def __post_init__(self) -> None:
        for name, rows, row_bytes in (
            ("keys", self.keys, self.key_format.row_bytes),
            ("values", self.values, self.value_format.row_bytes),
        ):
            if rows.dtype != torch.uint8 or rows.dim() != 3 or rows.shape[2] != row_bytes:
                raise ValueError(
                    f"{name} must be uint8 [num_slots, num_kv_heads, {row_bytes}], "
                    f"got {dtype_name(rows.dtype)} {list(rows.shape)}"
                )
            if not rows.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got strides {rows.stride()}")
        if self.keys.shape[:2] != self.values.shape[:2]:
            raise ValueError(
                f"keys and values must agree in slots and KV heads, "
                f"got {list(self.keys.shape[:2])} and {list(self.values.shape[:2])}"
            )
        if self.keys.device != self.values.device:
            raise ValueError(f"keys are on {self.keys.device}, values on {self.values.device}")
        self._check_calibration()

    def _check_calibration(self) -> None:
        if isinstance(self.key_format, Pruned) != (self.calibration is not None):
            raise ValueError("calibration belongs to pruned keys, and they need one")
        if self.calibration is None:
            return
        shape = (self.keys.shape[1], self.key_format.head_dim)
        if self.calibration.shape != shape or self.calibration.centre.device != self.keys.device:
            raise ValueError(
                f"calibration must be for [num_kv_heads, head_dim] {list(shape)} on {self.keys.device}, "
                f"got {list(self.calibration.shape)} on {self.calibration.centre.device}"
            )

    @classmethod
    def allocate(
        cls,
        num_slots: int,
        num_kv_heads: int,
        key_format: KeyFormat,
        value_format: ValueFormat,
        calibration: KeyCalibration | None = None,
        device: torch.device | str = "cpu",
    ) -> LayerRows:
        """Zeroed rows for ``num_slots`` tokens."""
        keys, values = (
            torch.zeros(num_slots, num_kv_heads, row_format.row_bytes, dtype=torch.uint8, device=device)
            for row_format in (key_format, value_format)
        )
        return cls(keys, values, key_format, value_format, calibration)

    # Asked for by every call of every layer, and slow to ask a tensor for.
    @cached_property
    def num_slots(self) -> int:
        return self.keys.shape[0]

    @cached_property
    def num_kv_heads(self) -> int:
        return self.keys.shape[1]

    @cached_property
    def device(self) -> torch.device:
        return self.keys.device

    @cached_property
    def restoration(self) -> Restoration:
        """The calibration as kernels take it; only of pruned keys."""
        return self.calibration.restoration(self.key_format)

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """``keys`` and ``values`` in NumPy's terms, on a CPU."""
        return self.keys.numpy(), self.values.numpy()
