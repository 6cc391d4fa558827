"""Places of the tiles of attention, in sequences that are packed or padded.

Packed, sequence s owns the tiles from cu_seqlens[s] // BLOCK + s on. That leaves room for all its tiles and at most one
spare tile. The grid therefore depends only on T and on the number of sequences. The search is W-ary, one load for up to
W sequences. Padded, every sequence has as many rows, and its own stride. In both, results and statistics are dense: the
padded ones are (B N, H, Dh), in which sequence s begins with row s N.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def own_tile(tile, cu_seqlens, sequences, rows, BLOCK: tl.constexpr):
    """Return the sequence of a tile, its first packed row, its length, and the tile's first row in the sequence."""
    WIDTH: tl.constexpr = 256
    sequence = tile * 0
    span = sequences
    while span > 1:
        step = (span + WIDTH - 1) // WIDTH
        at = sequence + tl.arange(0, WIDTH) * step
        inside = at < sequence + span
        starts = tl.load(cu_seqlens + at, mask=inside, other=0)
        before = inside & (starts // BLOCK + at <= tile)
        skipped = tl.maximum(tl.sum(before.to(tl.int32), 0) - 1, 0) * step
        sequence += skipped
        span = tl.minimum(step, span - skipped)
    begin, length = extent(cu_seqlens, sequence, rows)
    return sequence, begin, length, (tile - begin // BLOCK - sequence) * BLOCK


@triton.jit
def extent(cu_seqlens, sequence, rows):
    """Return the first row and the length of a sequence, clamped to the tensor in case the boundaries are corrupt."""
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence), 0), rows)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence + 1), begin), rows)
    return begin, end - begin


@triton.jit
def tile_of(tile, cu_seqlens, sequences, rows, BLOCK: tl.constexpr, PADDED: tl.constexpr):
    """Return what `own_tile` returns; `rows` are those of one sequence where sequences are padded."""
    if PADDED:
        each = (rows + BLOCK - 1) // BLOCK
        sequence = tile // each
        return sequence, sequence * rows, rows, (tile - sequence * each) * BLOCK
    else:
        return own_tile(tile, cu_seqlens, sequences, rows, BLOCK)


@triton.jit
def keys_of(cu_seqlens, seen, sequence, queries, keys, PADDED: tl.constexpr, CAUSAL: tl.constexpr):
    """Return the first row of a sequence's keys and how many of them its queries see, clamped to the tensor."""
    if PADDED:
        length = keys
        if seen is not None:
            at = ((sequence + 1) * queries - 1) if CAUSAL else sequence  # the last query sees most
            length = tl.minimum(tl.maximum(tl.load(seen + at), 0), keys)
        return sequence * keys, length
    else:
        return extent(cu_seqlens, sequence, keys)


@triton.jit
def head_of(pointer, row, row_stride, head, head_stride, VEC: tl.constexpr):
    """Return a pointer to one head of packed row `row`; strides are counted in vectors of VEC numbers."""
    return pointer + (row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride) * VEC


@triton.jit
def input_of(
    pointer, sequence, begin, row, row_stride, head, head_stride, batch_stride,
    VEC: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Return a pointer to one head of row `row` of a sequence of the inputs, which begins with the packed row `begin`.

    A padded sequence is found by its stride instead.
    """
    if PADDED:
        pointer += sequence.to(tl.int64) * batch_stride * VEC
        begin = begin * 0
    return head_of(pointer, begin + row, row_stride, head, head_stride, VEC)


@triton.jit
def offsets_of(row_stride, ROWS: tl.constexpr, D: tl.constexpr, VEC: tl.constexpr):
    """Return offsets [ROWS, D] from the first number of a tile; `dense` keeps them under 2^31."""
    return (tl.arange(0, ROWS) * row_stride * VEC)[:, None] + tl.arange(0, D)[None, :]


@triton.jit
def load_tile(pointers, inside, FIRST: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Load [ROWS, D] from column FIRST on, with zeros outside."""
    mask = inside[:, None]
    if FIRST + D > HEAD_DIM:
        mask = mask & (FIRST + tl.arange(0, D) < HEAD_DIM)[None, :]
    return tl.load(pointers + FIRST, mask=mask, other=0.0)


@triton.jit
def store_tile(pointers, values, inside, FIRST: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    mask = inside[:, None]
    if FIRST + D > HEAD_DIM:
        mask = mask & (FIRST + tl.arange(0, D) < HEAD_DIM)[None, :]
    tl.store(pointers + FIRST, values.to(pointers.dtype.element_ty), mask=mask)
