"""What is known of a layer's keys before any is stored, and the form of it that kernels take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from spark_kernels.formats import KEY_STEP, UNIT_STEPS, WIDTHS, Pruned, dtype_name


class Restoration(NamedTuple):
    """What kernels need to store and restore keys of one layer, ``[num_kv_heads, head_dim]`` each, by position.

    ``order`` (int32) is the channel at each position and ``position`` (int32, by channel) its inverse. The others are
    float32: the ``centre``, one over the step, the ``unit`` of a code and one over it (0 at positions without bits).
    """

    order: torch.Tensor
    position: torch.Tensor
    centre: torch.Tensor
    inverse_step: torch.Tensor
    unit: torch.Tensor
    inverse_unit: torch.Tensor


@dataclass(frozen=True, eq=False)
class KeyCalibration:
    """What is known of one layer's keys before any is stored, by KV head: fixed for the life of a cache.

    Rows can only be read with the calibration they were written with. A poor one costs accuracy, never correctness: the
    arithmetic is exact for any centre.

    Parameters
    ----------
    centre
        float32 ``[num_kv_heads, head_dim]``, taken off every key.
    step
        float32, the same shape, positive: deviation of the channels from the centre.
    order
        int32, the same shape: channels of each head in falling order of importance.
    """

    centre: torch.Tensor
    step: torch.Tensor
    order: torch.Tensor

    def __post_init__(self) -> None:
        shape, device = self.centre.shape, self.centre.device
        for name, dtype in (("centre", torch.float32), ("step", torch.float32), ("order", torch.int32)):
            tensor = getattr(self, name)
            if tensor.dim() != 2 or tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
                raise ValueError(
                    f"{name} must be {dtype_name(dtype)} [num_kv_heads, head_dim] {list(shape)} on {device}, "
                    f"got {dtype_name(tensor.dtype)} {list(tensor.shape)} on {tensor.device}"
                )
        if not self.centre.isfinite().all():
            raise ValueError("centre must be finite")
        if not (self.step.isfinite() & (self.step > 0)).all():
            raise ValueError("step must be finite and positive")
        if not torch.equal(self.order.sort(-1).values, torch.arange(shape[1], device=device).expand(shape).int()):
            raise ValueError("order must be a permutation of the channels for each KV head")

    @classmethod
    def from_statistics(cls, centre: torch.Tensor, deviation: torch.Tensor, query_rms: torch.Tensor) -> KeyCalibration:
        """From the mean and deviation of keys and the root mean square of their queries, ``[num_kv_heads, head_dim]``.

        Channels are ordered by ``query_rms * deviation``: what an error in one costs in scores. A channel that never
        moves gets a thousandth of its head's deviation for a step.
        """
        deviation = deviation.float()
        order = (query_rms.float() * deviation).argsort(dim=-1, descending=True, stable=True).int()
        least = 1e-3 * deviation.square().mean(-1, keepdim=True).sqrt()
        return cls(centre.float(), deviation.maximum(least).clamp(min=1e-6), order)

    @property
    def shape(self) -> torch.Size:
        return self.centre.shape

    def to(self, device: torch.device | str) -> KeyCalibration:
        return KeyCalibration(self.centre.to(device), self.step.to(device), self.order.to(device))

    def restoration(self, key_format: Pruned) -> Restoration:
        """The calibration by position, for rows of ``key_format``."""
        order = self.order.long()
        counts = torch.tensor(key_format.profile, device=order.device)
        unit_steps = torch.tensor([KEY_STEP * UNIT_STEPS[bits] for bits in WIDTHS], device=order.device)
        step = self.step.gather(-1, order)
        unit = step * unit_steps.repeat_interleave(counts)
        return Restoration(
            order=self.order.contiguous(),
            position=order.argsort(-1).int(),
            centre=self.centre.gather(-1, order),
            inverse_step=1.0 / step,
            unit=unit,
            inverse_unit=torch.where(unit > 0, 1.0 / unit, 0.0),
        )
