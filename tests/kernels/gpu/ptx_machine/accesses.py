"""Loads, stores and copies of translated blocks."""

from __future__ import annotations

import numpy as np

from .arithmetic import LANES
from .memory import gather
from .report import DeviceError


class Accesses:
    """Memory as the warps of a gang see it. Addresses, masks and values broadcast to ``shape`` [CTAs, warps, lanes]."""

    def __init__(self, machine, warps: np.ndarray) -> None:
        self.launch, self.machine = machine.launch, machine
        self.shape = (len(machine.ctas), len(warps), 32)
        self.params = self.launch.params
        self.special = {"%tid.x": (32 * warps[:, None] + LANES).astype("u4")[None]}
        self.special["%laneid"] = LANES.astype("u4")[None, None]
        for k, axis in enumerate("xyz"):
            self.special[f"%ctaid.{axis}"] = machine.ctas[:, k].astype("u4")[:, None, None]
            self.special[f"%nctaid.{axis}"] = np.full((1, 1, 1), self.launch.grid[k], "u4")
        self._shared_base = (np.arange(self.shape[0]) * machine.shared_bytes)[:, None, None]
        numbers = (machine.first_cta + np.arange(self.shape[0]))[:, None] * self.launch.num_warps + warps
        self._warp_ids = np.broadcast_to(1 + numbers[:, :, None], self.shape)
        self._pending: list[list] = [[]]

    def _full(self, x: np.ndarray) -> np.ndarray:
        return np.broadcast_to(x, self.shape)

    def _chosen(self, m):
        """What picks the threads of a mask; None masks none out."""
        return ... if m is None else self._full(m)

    def _who(self, chosen) -> tuple[np.ndarray, np.ndarray]:
        """Warps of the chosen threads, and the barriers that their CTAs have passed."""
        epochs = self._full(self.machine.epoch[:, None, None])
        return self._warp_ids[chosen].ravel(), epochs[chosen].ravel()

    def _count(self, site: int, address, size: int, m, space: str) -> None:
        address = self._full(address).reshape(-1, 32).astype("i8")
        lanes = address.size
        if m is not None:
            m = self._full(m).reshape(-1, 32)
            some = m.any(-1)
            address, m, lanes = address[some], m[some], int(m.sum())
            address = np.where(m, address, np.take_along_axis(address, m.argmax(-1)[:, None], -1))
        self.launch.report.accesses[site].count(address, size, lanes, space)

    # Global memory

    def _global(self, address, size: int, m, site: int):
        """Offsets, packed ones too; threads that do not take part stand where one stands that does."""
        if m is not None and not m.all():
            full = np.broadcast_to(address, np.broadcast_shapes(address.shape, m.shape))
            mask = np.broadcast_to(m, full.shape)
            address = np.where(mask, full, full[mask][0])
        offsets, packed = self.launch.memory.offsets(address, size, self.launch.program.sites[site])
        if self.launch.counts:
            self._count(site, packed, size, m, "global")
        return offsets, packed

    def load_global(self, address, size: int, count: int, m, site: int):
        if m is not None and not m.any():
            return np.zeros((1, 1, 1), f"u{size}") if count == 1 else [np.zeros((1, 1, 1), f"u{size}")] * count
        offsets, packed = self._global(address, size * count, m, site)
        if site in self.launch.watched:
            chosen = self._chosen(m)
            at = self._full(packed)[chosen].ravel()
            self.launch.shadow.read(at, size * count, *self._who(chosen), site)
        return gather(self.launch.memory.bytes, offsets, size, count)

    def store_global(self, address, size: int, values: list, m, site: int) -> None:
        if m is None or m.any():
            offsets, packed = self._global(address, size * len(values), m, site)
            self._store(self.launch.memory.bytes, self.launch.shadow, offsets, packed, size, values, m, site)

    # Shared memory

    def _shared(self, address, size: int, m, site: int, count: bool = True):
        offsets = address.astype("i8")
        if m is not None:
            offsets = np.where(m, offsets, 0)
        if (offsets + size > self.machine.shared_bytes).any() or (offsets % size).any():
            _, line, text = self.launch.program.sites[site]
            limits = f"outside {self.machine.shared_bytes} bytes, or not a multiple of {size}"
            raise DeviceError(f"a shared address {limits}: {text} at {line}")
        if count and self.launch.counts:
            self._count(site, offsets, size, m, "shared")
        return offsets + self._shared_base

    def load_shared(self, address, size: int, count: int, m, site: int):
        offsets = self._shared(address, size * count, m, site)
        if self.machine.shadow is not None:
            chosen = self._chosen(m)
            self.machine.shadow.read(self._full(offsets)[chosen].ravel(), size * count, *self._who(chosen), site)
        return gather(self.machine.shared, offsets, size, count)

    def store_shared(self, address, size: int, values: list, m, site: int) -> None:
        if m is None or m.any():
            offsets = self._shared(address, size * len(values), m, site)
            self._store(self.machine.shared, self.machine.shadow, offsets, offsets, size, values, m, site)

    def _store(self, memory, shadow, offsets, places, size: int, values: list, m, site: int) -> None:
        chosen = self._chosen(m)
        at = self._full(offsets)[chosen].ravel() // size
        values = [self._full(v)[chosen].ravel() for v in values]
        view = memory[: len(memory) // size * size].view(f"u{size}")
        if shadow is not None:
            same = np.all([view[at + k] == v for k, v in enumerate(values)], 0)
        for k, v in enumerate(values):
            view[at + k] = v
        if shadow is not None:
            agree = _agree(view, at, values)
            places = self._full(places)[chosen].ravel()
            shadow.write(places, size * len(values), *self._who(chosen), site, same, agree)

    # Matrices of 8 x 8 numbers of 16 bits: lanes 8k to 8k + 7 give the addresses of the rows of matrix k

    def _matrix_rows(self, address, count: int, m, site: int):
        """Offsets of the rows ``[CTAs, warps, 8 * count]``, and which are accessed."""
        m = np.ones((1, 1, 1), bool) if m is None else m
        if (m.any(-1) != m.all(-1)).any():
            raise DeviceError(f"a matrix accessed by a part of a warp: {self.launch.program.sites[site]}")
        chosen = self._full(m)[..., : 8 * count]
        offsets = self._shared(self._full(address)[..., : 8 * count], 16, chosen, site, count=False)
        if self.launch.counts:
            requests = int(chosen[..., 0].sum())
            rows = (offsets - self._shared_base)[chosen].reshape(-1, 8)
            self.launch.report.accesses[site].count_matrix(rows, requests)
        return offsets, chosen

    def _matrix_who(self, chosen, count: int):
        epochs = self._full(self.machine.epoch[:, None, None])
        return self._warp_ids[..., : 8 * count][chosen], epochs[..., : 8 * count][chosen]

    def load_matrix(self, address, count: int, transposed: bool, m, site: int):
        offsets, chosen = self._matrix_rows(address, count, m, site)
        if self.machine.shadow is not None:
            self.machine.shadow.read(offsets[chosen], 16, *self._matrix_who(chosen, count), site)
        tiles = gather(self.machine.shared, offsets, 16, 1)[..., None].view("u2").reshape(*self.shape[:2], count, 8, 8)
        if transposed:
            tiles = tiles.swapaxes(-1, -2)
        # Lane l holds numbers 2 (l % 4) and the next of row l // 4.
        words = np.ascontiguousarray(tiles).view("u4").reshape(*self.shape[:2], count, 32)
        found = [np.ascontiguousarray(words[:, :, k]) for k in range(count)]
        return found[0] if count == 1 else found

    def store_matrix(self, address, values: list, transposed: bool, m, site: int) -> None:
        count = len(values)
        offsets, chosen = self._matrix_rows(address, count, m, site)
        tiles = np.stack([self._full(v) for v in values], 2).view("u2").reshape(*self.shape[:2], count, 8, 8)
        rows = np.ascontiguousarray(tiles.swapaxes(-1, -2) if transposed else tiles).view("c16").reshape(offsets.shape)
        view = self.machine.shared[: len(self.machine.shared) // 16 * 16].view("c16")
        at, rows = offsets[chosen], rows[chosen]
        same = (view[at // 16][:, None].view("u8") == rows[:, None].view("u8")).all(-1)
        view[at // 16] = rows
        if self.machine.shadow is not None:
            agree = np.ones(len(at), bool)
            self.machine.shadow.write(at, 16, *self._matrix_who(chosen, count), site, same, agree)

    # Asynchronous copies arrive as late as they may: when their warp waits for them

    def copy(self, to, of, size: int, given, m, site: int) -> None:
        inside = self._full(given) > 0 if m is None else (self._full(given) > 0) & m
        if (self._full(given)[inside] != size).any():
            raise NotImplementedError(f"a part of a copy: {self.launch.program.sites[site]}")
        data = self.load_global(of, 4, size // 4, inside, site)
        data = [np.where(inside, d, np.uint32(0)) for d in (data if isinstance(data, list) else [data])]
        # Its bytes may also arrive at once: others must be done with the place.
        chosen = self._chosen(m)
        if self.machine.shadow is not None:
            places = self._full(self._shared(to, size, m, site, count=False))[chosen].ravel()
            unknown = np.zeros(len(places), bool)
            self.machine.shadow.write(places, size, *self._who(chosen), site, unknown, ~unknown)
        self._pending[-1].append((to, data, m, site))

    def commit(self) -> None:
        self._pending.append([])

    def wait(self, groups: int) -> None:
        while len(self._pending) - 1 > groups:
            for to, data, m, site in self._pending.pop(0):
                self.store_shared(to, 4, data, m, site)


def _agree(view, at, values) -> np.ndarray:
    """Where no two threads of one instruction stored different values."""
    agree = np.ones(len(at), bool)
    for k, v in enumerate(values):
        differs = at[view[at + k] != v]
        if len(differs):
            agree &= ~np.isin(at, differs)
    return agree
