"""Philox4x32-10 in Triton, as `oner_fast.philox` defines it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox4x32(block, sample, step, stream, key_low, key_high):
    """Compute Philox4x32-10, four uint32 words from uint32 counters."""
    zero = block * 0
    w0, w1, w2, w3 = block, zero + sample, zero + step, zero + stream
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(w0, zero + 0xD2511F53), w0 * 0xD2511F53
        high1, low1 = tl.umulhi(w2, zero + 0xCD9E8D57), w2 * 0xCD9E8D57
        w0, w1, w2, w3 = high1 ^ w1 ^ key_low, low1, high0 ^ w3 ^ key_high, low0
        key_low += 0x9E3779B9
        key_high += 0xBB67AE85
    return w0, w1, w2, w3
