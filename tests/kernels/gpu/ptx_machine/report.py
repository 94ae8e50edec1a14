"""What a launch did: counts, and what it did wrong."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field, fields

import numpy as np


class DeviceError(Exception):
    """What would be a fault, or undefined, on the device."""


@dataclass
class Access:
    """What one memory instruction did.

    ``sectors`` and ``lines`` are the distinct 32 and 128 bytes of each request to global memory. ``passes`` are those
    over 32 banks of 4 bytes, of global memory as if its lines lay side by side; ``ideal`` would be without conflicts.
    """

    requests: int = 0
    lanes: int = 0
    bytes: int = 0
    sectors: int = 0
    lines: int = 0
    passes: int = 0
    ideal: int = 0

    def __iadd__(self, other: Access) -> Access:
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))
        return self

    def count(self, address: np.ndarray, size: int, lanes: int, space: str) -> None:
        """Accesses of ``size`` bytes at ``address`` ``[warps, 32]``, of which ``lanes`` are active.

        Inactive lanes stand at the address of one that is active.
        """
        self.requests += len(address)
        self.lanes += lanes
        self.bytes += lanes * size
        if space == "global":
            for name, bits in (("sectors", 5), ("lines", 7)):
                keys = np.sort(address >> bits, -1)
                distinct = len(keys) + int((keys[:, 1:] != keys[:, :-1]).sum())
                setattr(self, name, getattr(self, name) + distinct)
        parts = max(1, size // 4)  # of 32, 16 or 8 lanes
        words = (address >> 2).reshape(len(address) * parts, 32 // parts)
        if parts > 1:
            words = (words[..., None] + np.arange(parts)).reshape(len(words), 32)
        self._count_passes(words)

    def count_matrix(self, rows: np.ndarray, requests: int) -> None:
        """Rows of 16 bytes at ``rows`` ``[matrices, 8]``."""
        self.requests += requests
        self.lanes += 32 * requests
        self.bytes += 128 * len(rows)
        self._count_passes(((rows >> 2)[..., None] + np.arange(4)).reshape(len(rows), 32))

    def _count_passes(self, words: np.ndarray) -> None:
        """Of rows of 32 words; a pass takes one word of each bank."""
        words = np.sort(words, -1)
        first = np.ones(words.shape, bool)
        first[:, 1:] = words[:, 1:] != words[:, :-1]
        keys = (np.arange(len(words))[:, None] * 32 + (words & 31))[first]
        self.passes += int(np.bincount(keys, minlength=32 * len(words)).reshape(-1, 32).max(-1).sum())
        self.ideal += len(words)


@dataclass
class Report:
    """Counts of one launch.

    ``instructions`` are those of warps, by operation; ``blocks`` the warps that ran each basic block; ``barriers`` the
    warps that passed one; ``accesses`` are by site. ``races`` counts pairs ``(kind, site, kind, site)`` of accesses of
    different warps or CTAs with no barrier between them, one of them writing; ``same_value`` those whose write changes
    nothing. ``sites`` are the kernel's memory accesses as ``(op, line, text)``.
    """

    kernel: str
    sites: list[tuple[str, str, str]]
    blocks: list[int]
    warps: int = 0
    barriers: int = 0
    instructions: Counter = field(default_factory=Counter)
    accesses: dict[int, Access] = field(default_factory=lambda: defaultdict(Access))
    races: Counter = field(default_factory=Counter)
    same_value: Counter = field(default_factory=Counter)

    def total(self, prefix: str) -> Access:
        """Of all accesses whose operation begins with ``prefix``, as ``ld.global``."""
        total = Access()
        for site, access in self.accesses.items():
            if self.sites[site][0].startswith(prefix):
                total += access
        return total

    def add_races(self, before: str, sites: np.ndarray, site: int, now: str, same: np.ndarray | None) -> None:
        for other in np.unique(sites):
            chosen = sites == other
            key = before, int(other), now, site
            harmless = int((chosen & same).sum()) if same is not None else 0
            for counter, count in ((self.same_value, harmless), (self.races, int(chosen.sum()) - harmless)):
                if count:
                    counter[key] += count

    def described_races(self) -> list[str]:
        where = {n: f"{text} ({line.split('/')[-1]})" for n, (_, line, text) in enumerate(self.sites)}
        return [
            f"{self.kernel}: {before} by {where[other]}, then {now} by {where[site]}, {count} times"
            for (before, other, now, site), count in self.races.items()
        ]
