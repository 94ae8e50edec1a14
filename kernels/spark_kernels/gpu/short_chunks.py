"""The prefixes of short chunks: read row by row with the decode kernel, not restored.

Restoring a token and attending to it from a tile of queries costs the same for one query as for a whole tile; the
decode kernel pays by the query, and cuts a long prefix into splits, which no dense kernel here does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from spark_kernels.gpu.decode import decode_attention
from spark_kernels.gpu.merge import merge_state
from spark_kernels.gpu.plan import DecodePlan
from spark_kernels.rows import LayerRows

# New tokens of a request, at most: an estimate by instructions, which no GPU has checked.
MOST_TOKENS = 8


class ShortChunks:
    """New tokens of requests that have few of them and a prefix; each is a request of a decode step.

    Parameters
    ----------
    chunks, prefixes
        Where the requests' new tokens and prefixes begin, and the last ones end: ``batch + 1`` numbers each.
    prefix_indices
        int32 or int64, slots of all prefixes.
    """

    def __init__(self, chunks: Sequence[int], prefixes: Sequence[int], prefix_indices: torch.Tensor) -> None:
        tokens, starts, lengths = [], [], []
        self.requests: set[int] = set()
        bounds = zip(pairwise(chunks), pairwise(prefixes), strict=True)
        for request, ((first, last), (start, stop)) in enumerate(bounds):
            count = last - first
            if start < stop and 0 < count <= MOST_TOKENS:
                self.requests.add(request)
                tokens += range(first, last)
                starts += [start] * count
                lengths += [stop - start] * count
        self._prefix_indices = prefix_indices
        self._total = sum(lengths)
        self._host = torch.tensor([tokens, starts, lengths], dtype=torch.int64)
        self._plan: DecodePlan | None = None

    def __bool__(self) -> bool:
        return bool(self.requests)

    def _prepare(self, num_kv_heads: int) -> None:
        """For all layers, in the first one."""
        device = self._prefix_indices.device
        host = self._host.pin_memory() if device.type == "cuda" else self._host
        self._tokens, starts, lengths = host.to(device, non_blocking=True)
        indptr = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        # Each new token reads its request's prefix from the start.
        shifts = torch.repeat_interleave(starts - indptr[:-1], lengths, output_size=self._total)
        slots = self._prefix_indices[torch.arange(self._total, device=device) + shifts]
        self._plan = DecodePlan.build(indptr, slots, num_kv_heads)

    def merge_into(
        self, out: torch.Tensor, lse: torch.Tensor, q: torch.Tensor, rows: LayerRows, **arguments: float
    ) -> None:
        """Add the attention to their prefixes to ``out`` and ``lse``, float32, which are those of their chunks."""
        if self._plan is None:
            self._prepare(rows.num_kv_heads)
        tokens = self._tokens
        of_prefix = decode_attention(q[tokens], rows, self._plan, **arguments)
        out[tokens], lse[tokens] = merge_state(out[tokens], lse[tokens], *of_prefix)
