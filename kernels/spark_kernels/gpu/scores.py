"""Products of queries with key rows, one lane per token: what a program of the decode kernel does with a row.

Each lane reads its token's row as 64-bit words and looks up, for each four bits of the restore plane and for each
kept word, a word of `spark_kernels.gpu.queries` with the contributions to four queries.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from spark_kernels.gpu.queries import SUM_BIAS
from spark_kernels.formats import CompressedKeyFormat


class RowLayout(NamedTuple):
    """A compressed row as these functions read it: offsets in 16-bit or 64-bit words from the start of the row."""

    head_dim: int
    restore_bits: int
    row_words: int
    plane_word: int
    scale_half: int
    kept_half: int
    kept_channels: int
    index_bits: int

    @classmethod
    def of(cls, key_format: CompressedKeyFormat) -> RowLayout:
        return cls(
            head_dim=key_format.head_dim,
            restore_bits=key_format.restore_bits,
            row_words=key_format.row_bytes // 8,
            plane_word=key_format.plane_offset // 8,
            scale_half=key_format.scale_offset // 2,
            kept_half=key_format.kept_offset // 2,
            kept_channels=key_format.kept_channels,
            index_bits=key_format.index_bits,
        )


@triton.jit
def _add_plane_word(sums, table, word):
    """Add to four queries' ``sums`` the sum-table entries of one bit plane's 64 channels."""
    s0, s1, s2, s3 = sums
    for half in tl.static_range(2):
        bits = (word >> (32 * half)).to(tl.uint32)
        # Two queries in each: 16 bits are enough for eight entries.
        low = tl.zeros_like(bits)
        high = tl.zeros_like(bits)
        for i in tl.static_range(8):
            entry = tl.load(table + ((bits >> (4 * i)) & 15) + 16 * (8 * half + i))
            low += entry.to(tl.uint32)
            high += (entry >> 32).to(tl.uint32)
        s0 += low & 0xFFFF
        s1 += low >> 16
        s2 += high & 0xFFFF
        s3 += high >> 16
    return s0, s1, s2, s3


@triton.jit
def _half(word, i: tl.constexpr):
    """float32 of the i-th float16 in a 64-bit word."""
    return ((word >> (16 * i)) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def half_of_word(word, i: tl.constexpr):
    """float32 of the i-th float16 in a 64-bit word."""
    return ((word >> (16 * i)) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _plane_scores(row, table, LAYOUT: tl.constexpr, zero):
    """Products of four queries with the restore planes, in units of the plane scale and of the sum table."""
    WORDS: tl.constexpr = LAYOUT.head_dim // 64
    BIAS: tl.constexpr = SUM_BIAS * (LAYOUT.head_dim // 4)
    high = (zero, zero, zero, zero)
    for i in tl.static_range(WORDS):
        high = _add_plane_word(high, table + 256 * i, tl.load(row + LAYOUT.plane_word + i))
    if LAYOUT.restore_bits == 1:
        s0 = (high[0].to(tl.int32) - BIAS).to(tl.float32)
        s1 = (high[1].to(tl.int32) - BIAS).to(tl.float32)
        s2 = (high[2].to(tl.int32) - BIAS).to(tl.float32)
        s3 = (high[3].to(tl.int32) - BIAS).to(tl.float32)
    else:
        low = (zero, zero, zero, zero)
        for i in tl.static_range(WORDS):
            low = _add_plane_word(low, table + 256 * i, tl.load(row + LAYOUT.plane_word + WORDS + i))
        s0 = ((2 * high[0] + low[0]).to(tl.int32) - 3 * BIAS).to(tl.float32) * 0.25
        s1 = ((2 * high[1] + low[1]).to(tl.int32) - 3 * BIAS).to(tl.float32) * 0.25
        s2 = ((2 * high[2] + low[2]).to(tl.int32) - 3 * BIAS).to(tl.float32) * 0.25
        s3 = ((2 * high[3] + low[3]).to(tl.int32) - 3 * BIAS).to(tl.float32) * 0.25
    return s0, s1, s2, s3


@triton.jit
def _kept_scores(row, table, LAYOUT: tl.constexpr, zero):
    """Products of four queries with the kept integers, in units of the kept scale and of the query words."""
    s0 = zero
    s1 = zero
    s2 = zero
    s3 = zero
    # Triton 3.6 takes no field of a tuple here.
    FIRST: tl.constexpr = LAYOUT.kept_half
    LAST: tl.constexpr = LAYOUT.kept_half + LAYOUT.kept_channels
    for i in tl.static_range(FIRST, LAST):
        word = (tl.load(row + i // 4) >> (16 * (i % 4))).to(tl.int16).to(tl.int32)
        entry = tl.load(table + (word & (LAYOUT.head_dim - 1)))
        integer = (word >> LAYOUT.index_bits).to(tl.float32)
        s0 += integer * half_of_word(entry, 0)
        s1 += integer * half_of_word(entry, 1)
        s2 += integer * half_of_word(entry, 2)
        s3 += integer * half_of_word(entry, 3)
    return s0, s1, s2, s3


@triton.jit
def _pack_scores(row, table, scales, LAYOUT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Products of one pack's four queries with the keys at ``row``, float32 ``[BLOCK_N, 4]``."""
    scale_word = tl.load(row + LAYOUT.scale_half // 4)
    kept_scale = half_of_word(scale_word, LAYOUT.scale_half % 4 + 1)
    s0, s1, s2, s3 = _kept_scores(row, table, LAYOUT, tl.zeros([BLOCK_N], tl.float32))
    s0 *= kept_scale * tl.load(scales + 4)
    s1 *= kept_scale * tl.load(scales + 5)
    s2 *= kept_scale * tl.load(scales + 6)
    s3 *= kept_scale * tl.load(scales + 7)
    if LAYOUT.restore_bits > 0:
        plane_scale = half_of_word(scale_word, LAYOUT.scale_half % 4)
        p0, p1, p2, p3 = _plane_scores(row, table + LAYOUT.head_dim, LAYOUT, tl.zeros([BLOCK_N], tl.uint32))
        s0 += p0 * (plane_scale * tl.load(scales))
        s1 += p1 * (plane_scale * tl.load(scales + 1))
        s2 += p2 * (plane_scale * tl.load(scales + 2))
        s3 += p3 * (plane_scale * tl.load(scales + 3))
    return tl.join(tl.join(s0, s2), tl.join(s1, s3)).reshape(BLOCK_N, 4)


@triton.jit
def interleave(a, b):
    """``[n, 2 * m]`` with ``a`` in the even and ``b`` in the odd columns."""
    return tl.join(a, b).reshape(a.shape[0], 2 * a.shape[1])


@triton.jit
def group_scores(row, tables, scales, LAYOUT: tl.constexpr, PACKS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Products of the group's queries with the keys at ``row``, float32 ``[BLOCK_N, 4 * PACKS]``.

    ``row`` points to the first word of each token's row, ``tables`` and ``scales`` to those of the KV head as in
    `spark_kernels.gpu.queries.prepare_queries`. Member m of pack p is column ``m * PACKS + p``.
    """
    TABLE: tl.constexpr = 5 * LAYOUT.head_dim
    scores = _pack_scores(row, tables, scales, LAYOUT, BLOCK_N)
    if PACKS == 2:
        scores = interleave(scores, _pack_scores(row, tables + TABLE, scales + 8, LAYOUT, BLOCK_N))
    elif PACKS == 4:
        odd = _pack_scores(row, tables + TABLE, scales + 8, LAYOUT, BLOCK_N)
        scores = interleave(scores, _pack_scores(row, tables + 2 * TABLE, scales + 16, LAYOUT, BLOCK_N))
        odd = interleave(odd, _pack_scores(row, tables + 3 * TABLE, scales + 24, LAYOUT, BLOCK_N))
        scores = interleave(scores, odd)
    return scores
