"""Global memory, and who touched each piece of memory last."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from .report import DeviceError, Report


class GlobalMemory:
    """The tensors of a launch, where they are; any other address is an error."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        spans = sorted({(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors})
        spans = [span for span in spans if span[1]] or [(0, 0)]
        self.starts = np.array([start for start, _ in spans], "u8")
        self.ends = np.array([start + size for start, size in spans], "u8")
        self.first = spans[0][0] & ~63
        size = (max(start + size for start, size in spans) - self.first + 63) & ~63
        window = (ctypes.c_uint8 * size).from_address(self.first) if size else b""
        self.bytes = np.frombuffer(window, "u1")
        # Without the gaps between tensors, each at a multiple of 512 bytes as the device's allocator places them.
        sizes = (self.ends - self.starts + np.uint64(511)) // np.uint64(512) * np.uint64(512)
        self._packed_starts = np.concatenate([[0], np.cumsum(sizes)]).astype("i8")
        self.packed_size = int(self._packed_starts[-1])

    def region(self, address: int) -> int:
        """The number of the tensor at ``address``."""
        return int(np.searchsorted(self.starts, np.uint64(address), "right")) - 1

    def offsets(self, addresses: np.ndarray, size: int, site: tuple[str, str, str]) -> tuple[np.ndarray, np.ndarray]:
        """Offsets into `bytes`, and into the packed tensors."""
        region = np.searchsorted(self.starts, addresses, "right") - 1
        outside = (region < 0) | (addresses + np.uint64(size) > self.ends[region])
        for bad, what in (
            (outside, "outside every tensor"),
            (addresses % np.uint64(size) != 0, f"not a multiple of {size}"),
        ):
            if bad.any():
                raise DeviceError(f"an address {what}: {site[2]} at {site[1]}")
        packed = self._packed_starts[region] + (addresses - self.starts[region]).astype("i8")
        return (addresses - np.uint64(self.first)).astype("i8"), packed


def gather(memory: np.ndarray, offsets: np.ndarray, size: int, count: int) -> np.ndarray | list[np.ndarray]:
    """``count`` numbers of ``size`` bytes from each offset on."""
    total = size * count
    whole = memory[: len(memory) // total * total].view({1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}[total])
    found = whole[offsets // total]
    if count == 1:
        return found
    parts = found[..., None].view(f"u{size}")
    return [np.ascontiguousarray(parts[..., k]) for k in range(count)]


class Shadow:
    """Who last wrote and read each granule of memory, and when.

    Warps are numbered from 1 over all CTAs. Two accesses of different warps are ordered where their CTA passed a
    barrier between them, those of different CTAs never. ``MANY`` stands for several readers.
    """

    MANY = -1

    def __init__(self, size: int, granule: int, warps_per_cta: int, report: Report) -> None:
        self.granule, self.warps_per_cta, self.report = granule, warps_per_cta, report
        n = size // granule + 1
        self.writer, self.write_epoch, self.write_site = (np.zeros(n, "i4") for _ in range(3))
        self.reader, self.read_epoch, self.read_site, self.read_cta = (np.zeros(n, "i4") for _ in range(4))

    def _granules(self, at, size, warps, epochs):
        n = max(1, size // self.granule)
        units = (at[:, None] // self.granule + np.arange(n)).ravel()
        return units, np.repeat(warps, n), np.repeat(epochs, n), n

    def read(self, at: np.ndarray, size: int, warps: np.ndarray, epochs: np.ndarray, site: int) -> None:
        """``at`` are offsets of the active threads, ``epochs`` the barriers that their CTAs have passed."""
        units, warps, epochs, _ = self._granules(at, size, warps, epochs)
        cta = (warps - 1) // self.warps_per_cta + 1
        self._against_writes(units, warps, epochs, cta, site, "read", None)
        cta_before, recent = self.read_cta[units], self.read_epoch[units] == epochs
        other_warp = (cta_before == cta) & recent & (self.reader[units] != warps)
        other_cta = (cta_before != 0) & (cta_before != cta)
        for field, value, many in ((self.reader, warps, other_warp), (self.read_cta, cta, other_cta)):
            field[units] = np.where(many, self.MANY, value)
            # Several threads of this instruction read one granule: not all of them can be the last one.
            lost = (field[units] != value) & (field[units] != self.MANY)
            field[units[lost | many]] = self.MANY
        self.read_epoch[units], self.read_site[units] = epochs, site

    def write(self, at, size, warps, epochs, site: int, same: np.ndarray, agree: np.ndarray) -> None:
        """``same``: the store changes nothing; ``agree``: no two threads of it store different values at one place."""
        units, warps, epochs, n = self._granules(at, size, warps, epochs)
        same, agree = np.repeat(same, n), np.repeat(agree, n)
        cta = (warps - 1) // self.warps_per_cta + 1
        self._against_writes(units, warps, epochs, cta, site, "write", same)
        reader, read_cta = self.reader[units], self.read_cta[units]
        bad = (read_cta != 0) & (read_cta != cta)
        bad |= (read_cta == cta) & (reader != warps) & (self.read_epoch[units] == epochs)
        if bad.any():
            self.report.add_races("read", self.read_site[units[bad]], site, "write", same[bad])
        self.writer[units], self.write_epoch[units], self.write_site[units] = warps, epochs, site
        lost = self.writer[units] != warps
        if lost.any():
            self.report.add_races("write", np.full(int(lost.sum()), site), site, "write", agree[lost])

    def _against_writes(self, units, warps, epochs, cta, site, now, same) -> None:
        writer = self.writer[units]
        unordered = ((writer - 1) // self.warps_per_cta + 1 != cta) | (self.write_epoch[units] == epochs)
        bad = (writer > 0) & (writer != warps) & unordered
        if bad.any():
            self.report.add_races("write", self.write_site[units[bad]], site, now, None if same is None else same[bad])
