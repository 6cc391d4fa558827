"""Dropout of attention weights in Triton, drawn as `oner_fast.ops.attention_dropout` says."""

from __future__ import annotations

import triton
import triton.language as tl

from oner_fast.kernels.philox import philox4x32


@triton.jit
def kept(seed, sequence, head, rows, start, dropped, COLUMNS: tl.constexpr):
    """Mark kept weights, [ROWS, COLUMNS], of queries `rows` and of the keys from `start` on, which 8 divides."""
    words = tl.load(seed)
    low, high = (words & 0xFFFFFFFF).to(tl.uint32), ((words >> 32) & 0xFFFFFFFF).to(tl.uint32)
    row = rows.to(tl.uint32)[:, None]
    block = (start // 8 + tl.arange(0, COLUMNS // 8)).to(tl.uint32)[None, :] + row * 0  # [ROWS, COLUMNS / 8]
    stream = sequence.to(tl.uint32) + 0x80000000
    word0, word1, word2, word3 = philox4x32(block, row, head.to(tl.uint32), stream, low, high)
    pairs = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))  # [ROWS, COLUMNS / 2]
    draws = tl.interleave(pairs & 0xFFFF, pairs >> 16)
    return draws.to(tl.int32) >= dropped
