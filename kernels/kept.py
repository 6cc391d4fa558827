"""Work on the gathers' `kept` on the device: find the sample of a packed row, and the entries that chose each cell.

A gradient has to find, for every (sample, cell), the entries of `kept` that chose it. `lists` makes a table of all
pairs, sample after sample. A table's number is -1 where nothing chose the cell, or the one entry that did. Where
several did, it is -2 - p, and `members[p : p + lengths[pair]]` holds them in ascending order, so that sums have one
order and need no floating-point atomics. Entries are counted within their sample, and so is p where samples are short.

The work is linear in the entries and pairs, for up to 2^20 pairs:

* Short samples (up to 1,024 cells and entries) take one launch of a program each. Atomic maxima write the table. Only
  where a read back finds another entry, a cell repeats, and a counting sort of the sample makes its members.
* Long ones are sorted together. Chunks of entries count their bins (equal pairs >> shift), a scan adds the counts of
  earlier chunks and bins, and each chunk moves its entries to their bins in order. A program then sorts each bin. With
  up to 1,024 pairs a bin is a pair, and the sort is over.

Integer atomics alone are used, for counts and maxima, which depend on no order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from oner_fast.kernels.launch import Compilation, Configuration, architecture_of, configuration

SHORT = 1024  # the most cells, and entries of the mean sample, that one program orders
BINS = 1024
CHUNK = 512  # entries of a program that counts or moves
STEP = 8  # members that a gradient reads together
_SCANNED_BINS, _SCANNED_CHUNKS = 32, 32


class Lists(NamedTuple):
    """The entries of each (sample, cell).

    `table` and `lengths` (B N,) int32, `members` (T,) int32. `pairs` (T,) int32 are the (sample, cell) of the members,
    or None where samples are short.
    """

    table: Tensor
    lengths: Tensor
    members: Tensor
    pairs: Tensor | None


@triton.jit
def sample_of_row(cu_seqlens, row, samples, steps, prefix):
    """Find the last sample whose first row, cu_seqlens[b] + b * prefix, is not after `row`; always in [0, samples)."""
    low = (row * 0).to(tl.int32)
    high = low + samples
    for _ in range(steps):  # 2^steps >= samples
        middle = (low + high) // 2
        begins = tl.load(cu_seqlens + middle).to(tl.int64) + middle.to(tl.int64) * prefix
        low = tl.where(begins <= row, middle, low)
        high = tl.where(begins <= row, high, middle)
    return low


@triton.jit
def _next_places(cursors, bin, there, BLOCK_E: tl.constexpr):
    """Return the place of each entry, those of a bin in ascending order, and move the cursors of the bins."""
    lane = tl.arange(0, BLOCK_E)
    same = (bin[:, None] == bin[None, :]) & there[None, :]  # [BLOCK_E, BLOCK_E]
    earlier = same & (lane[None, :] < lane[:, None])
    counts = tl.sum(same.to(tl.int32) + earlier.to(tl.int32) * 65536, 1)  # both numbers in one sum
    rank, count = counts // 65536, counts % 65536
    place = tl.load(cursors + bin, there, 0)
    tl.debug_barrier()
    tl.store(cursors + bin, place + count, there & (rank + 1 == count))
    tl.debug_barrier()
    return place + rank


@triton.jit(do_not_specialize=["per_sample", "total", "cells", "shift"])
def order_kernel(
    kept, entries, cu_seqlens, starts, counts, table, lengths, cursors, members, pairs,
    per_sample, total, cells, shift, BLOCK_E: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Make the table and the members of a sample, or of a bin of pairs whose entries `place_kernel` moved together.

    Programs: the samples, where `kept` holds cells; or else the bins, where it holds pairs, beside their `entries`.
    """
    of = tl.program_id(0)
    if starts is None:
        if cu_seqlens is None:
            begin, count = of.to(tl.int64) * per_sample, per_sample
        else:
            begin = tl.load(cu_seqlens + of).to(tl.int64)
            begin = tl.minimum(tl.maximum(begin, 0), total)
            until = tl.minimum(tl.load(cu_seqlens + of + 1).to(tl.int64), total)
            count = tl.maximum(until - begin, 0).to(tl.int32)
        row, first, last = of.to(tl.int64) * cells, 0, cells
    else:
        begin, count = tl.load(starts + of).to(tl.int64), tl.load(counts + of)
        row, first = tl.zeros([], tl.int64), of << shift
        last = tl.minimum(first + (1 << shift), cells)
    table += row
    lengths += row
    cursors += row
    if entries is None:
        place = 0
        members += begin
    else:
        place = begin.to(tl.int32)
    for base in range(first, last, BINS):
        end = tl.minimum(base + BINS, last)
        own = base + tl.arange(0, BINS)
        is_own = own < end
        tl.store(table + own, -1, is_own)
        tl.debug_barrier()
        for start in range(0, count, BLOCK_E):
            item = start + tl.arange(0, BLOCK_E)
            cell = tl.load(kept + begin + item, item < count, -1)
            tl.atomic_max(table + cell, item, (cell >= base) & (cell < end), sem="relaxed")
        tl.debug_barrier()
        repeats = tl.zeros([BLOCK_E], tl.int32)
        for start in range(0, count, BLOCK_E):
            item = start + tl.arange(0, BLOCK_E)
            cell = tl.load(kept + begin + item, item < count, -1)
            inside = (cell >= base) & (cell < end)
            repeats |= (inside & (tl.load(table + cell, inside, -1) != item)).to(tl.int32)
        if tl.max(repeats, 0) > 0:
            tl.store(lengths + own, 0, is_own)
            tl.debug_barrier()
            for start in range(0, count, BLOCK_E):
                item = start + tl.arange(0, BLOCK_E)
                cell = tl.load(kept + begin + item, item < count, -1)
                tl.atomic_add(lengths + cell, 1, (cell >= base) & (cell < end), sem="relaxed")
            tl.debug_barrier()
            length = tl.load(lengths + own, is_own, 0)
            length = tl.where(length > 1, length, 0)
            mine = place + tl.cumsum(length, 0) - length
            place += tl.sum(length, 0)
            tl.store(table + own, -2 - mine, is_own & (length > 1))
            tl.store(cursors + own, mine, is_own)
            tl.debug_barrier()
            for start in range(0, count, BLOCK_E):
                item = start + tl.arange(0, BLOCK_E)
                cell = tl.load(kept + begin + item, item < count, -1)
                inside = (cell >= base) & (cell < end)
                inside &= tl.load(lengths + cell, inside, 0) > 1
                to = _next_places(cursors, cell, inside, BLOCK_E)
                entry = item if entries is None else tl.load(entries + begin + item, inside, 0)
                tl.store(members + to, entry, inside)
                if pairs is not None:
                    tl.store(pairs + to, cell, inside)
        if entries is not None:
            tl.debug_barrier()
            item = tl.load(table + own, is_own, -1)
            tl.debug_barrier()  # where there are fewer bins than threads, several threads have read the same number
            tl.store(table + own, tl.load(entries + begin + item, item >= 0, 0), item >= 0)


@triton.jit
def _pair_of_entry(kept, cu_seqlens, entry, total, samples, steps, per_sample, cells):
    """Return the (sample, cell) of entries of the whole `kept`, their numbers in their samples, and whether they count.

    An entry counts where its cell exists and its sample holds it.
    """
    there = entry < total
    cell = tl.load(kept + entry, there, -1)
    if cu_seqlens is None:
        sample = entry // per_sample
        begin = sample * per_sample
    else:
        sample = sample_of_row(cu_seqlens, entry, samples, steps, 0)
        begin = tl.load(cu_seqlens + sample)
        there &= (begin >= 0) & (entry >= begin) & (entry < tl.load(cu_seqlens + sample + 1))
    there &= (cell >= 0) & (cell < cells)
    return sample * cells + cell.to(tl.int32), entry - begin, there


@triton.jit(do_not_specialize=["total", "samples", "steps", "per_sample", "cells", "shift", "bins"])
def count_kernel(
    kept, cu_seqlens, counts, total, samples, steps, per_sample, cells, shift, bins,
    CHUNK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Count the entries of a chunk in each bin, counts (chunks, bins); programs: the chunks."""
    counts += tl.program_id(0) * bins
    bin = tl.arange(0, BINS)
    tl.store(counts + bin, 0, bin < bins)
    tl.debug_barrier()
    entry = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    pair, _, there = _pair_of_entry(kept, cu_seqlens, entry, total, samples, steps, per_sample, cells)
    tl.atomic_add(counts + (pair >> shift), 1, there, sem="relaxed")


@triton.jit(do_not_specialize=["chunks", "bins"])
def scan_kernel(counts, totals, chunks, bins, BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr):
    """Replace each count by the sum of those of earlier chunks, and add all into totals (bins,); programs: bins."""
    bin = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    before = tl.zeros([BLOCK_B], tl.int32)
    for start in range(0, chunks, BLOCK_C):
        chunk = start + tl.arange(0, BLOCK_C)
        real = (chunk < chunks)[:, None] & (bin < bins)[None, :]
        at = counts + chunk[:, None] * bins + bin[None, :]
        count = tl.load(at, real, 0)
        tl.store(at, before[None, :] + tl.cumsum(count, 0) - count, real)
        before += tl.sum(count, 0)
    tl.store(totals + bin, before, bin < bins)


@triton.jit(do_not_specialize=["total", "samples", "steps", "per_sample", "cells", "shift", "bins"])
def place_kernel(
    kept, cu_seqlens, counts, totals, starts, table, lengths, members, pairs,
    total, samples, steps, per_sample, cells, shift, bins,
    CHUNK: tl.constexpr, BLOCK_E: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Move the entries of a chunk to their bins, in order, and their pairs beside them; programs: the chunks.

    With a table a bin is a pair, and the first program makes its table. Otherwise it writes where bins start.
    """
    counts += tl.program_id(0) * bins
    bin = tl.arange(0, BINS)
    length = tl.load(totals + bin, bin < bins, 0)
    start = tl.cumsum(length, 0) - length
    start_here = start + tl.load(counts + bin, bin < bins, 0)
    tl.debug_barrier()  # where there are fewer bins than threads, several threads have read the same number
    tl.store(counts + bin, start_here, bin < bins)
    if tl.program_id(0) == 0:
        if table is None:
            tl.store(starts + bin, start, bin < bins)
        else:
            tl.store(table + bin, tl.where(length > 0, -2 - start, -1), bin < bins)
            tl.store(lengths + bin, length, bin < bins)
    tl.debug_barrier()
    for step in range(0, CHUNK, BLOCK_E):
        entry = tl.program_id(0) * CHUNK + step + tl.arange(0, BLOCK_E)
        pair, within, there = _pair_of_entry(kept, cu_seqlens, entry, total, samples, steps, per_sample, cells)
        to = _next_places(counts, pair >> shift, there, BLOCK_E)
        tl.store(members + to, within, there)
        tl.store(pairs + to, pair, there)


def lists(kept: Tensor, cu_seqlens: Tensor | None, samples: int, cells: int) -> Lists:
    """Make the lists for a contiguous `kept`, on its device."""
    total, count = kept.numel(), samples * cells
    chosen = configuration("masked_gather", "lists", "any", architecture_of(kept))
    table, lengths, cursors = (_integers(count, kept) for _ in range(3))
    made = Lists(table, lengths, _integers(total, kept), None)
    if not count:
        return made
    per_sample = 0 if cu_seqlens is not None else max(kept.shape[1], 1)
    if (cells <= SHORT and total <= SHORT * samples) or max(count, total) >= 2**31 - CHUNK:
        order_kernel[(samples,)](
            kept, None, cu_seqlens, None, None, table, lengths, cursors, made.members, None,
            0 if cu_seqlens is not None else kept.shape[1], total, cells, 0,
            BINS=min(triton.next_power_of_2(cells), BINS), **chosen.launch,
        )  # fmt: skip
        return made
    return _sorted(made, cursors, kept, cu_seqlens, samples, cells, per_sample, chosen)


def _sorted(
    made: Lists, cursors: Tensor, kept: Tensor, cu_seqlens: Tensor | None, samples: int, cells: int,
    per_sample: int, chosen: Configuration,
) -> Lists:  # fmt: skip
    """Make the lists of long samples: entries are counted, moved to bins, and each bin is ordered."""
    total, count = kept.numel(), samples * cells
    shift = _shift(count, total)
    bins, chunks = triton.cdiv(count, 1 << shift), max(triton.cdiv(total, CHUNK), 1)
    width = triton.next_power_of_2(bins)
    counts, totals, starts = (_integers(size, kept) for size in (chunks * bins, bins, bins))
    found = (kept, cu_seqlens)
    sizes = (total, samples, search_steps(samples), per_sample, cells, shift, bins)
    launch = {"BINS": width, **chosen.options}
    count_kernel[(chunks,)](*found, counts, *sizes, CHUNK=CHUNK, **launch)
    scan_kernel[(triton.cdiv(bins, _SCANNED_BINS),)](
        counts, totals, chunks, bins, BLOCK_C=_SCANNED_CHUNKS, BLOCK_B=_SCANNED_BINS, **chosen.options
    )
    pairs, direct = _integers(total, kept), shift == 0
    moved = made.members if direct else _integers(total, kept)
    place_kernel[(chunks,)](
        *found, counts, totals, starts, made.table if direct else None, made.lengths if direct else None, moved, pairs,
        *sizes, CHUNK=CHUNK, **chosen.blocks, **launch,
    )  # fmt: skip
    if direct:
        return made._replace(pairs=pairs)
    ordered = _integers(total, kept)
    order_kernel[(bins,)](
        pairs, moved, None, starts, totals, made.table, made.lengths, cursors, made.members, ordered,
        0, total, count, shift, BINS=min(1 << shift, BINS), **chosen.launch,
    )  # fmt: skip
    return made._replace(pairs=ordered)


def _shift(pairs: int, total: int) -> int:
    """Choose the pairs of a bin, 1 << shift: one, where these are few; else a bin has work for a program or two."""
    if pairs <= BINS:
        return 0
    bits, most = (pairs - 1).bit_length(), (BINS - 1).bit_length()
    wanted = bits - (triton.cdiv(total, CHUNK // 4)).bit_length()
    return max(bits - most, min(wanted, most))


def _integers(size: int, like: Tensor) -> Tensor:
    return torch.empty(size, dtype=torch.int32, device=like.device)


def search_steps(samples: int) -> int:
    """Return the number of bisection steps that find one of `samples` samples."""
    return max(samples - 1, 0).bit_length()


@triton.jit
def step_of_members(members, place, until, STEP: tl.constexpr):
    """Read the members of a repeated cell from `place` on: their entries, and which of them are before `until`."""
    at = place + tl.arange(0, STEP)
    there = at < until
    return tl.load(members + at, there, 0), there


def compilations() -> list[Compilation]:
    """List the kernels for fixed and for ragged samples, and for bins."""
    chosen = configuration("masked_gather", "lists", "any", 80)
    tables = dict.fromkeys(("table", "lengths"), "*i32")
    made = []
    for name, ragged in (("fixed", False), ("ragged", True)):
        boundaries = {"cu_seqlens": "*i32"} if ragged else {}
        absent = {} if ragged else {"cu_seqlens": None}
        found = {"kept": "*i64", **boundaries}
        sizes = dict.fromkeys(["total", "samples", "steps", "per_sample", "cells", "shift", "bins"], "i32")
        blocks = {"CHUNK": CHUNK, "BINS": BINS, **absent}
        short = dict.fromkeys(["per_sample", "total", "cells", "shift"], "i32")
        made += [
            Compilation(
                f"kept_order_{name}", order_kernel,
                {**found, **tables, "cursors": "*i32", "members": "*i32", **short},
                {**absent, **chosen.blocks, "BINS": 256, **dict.fromkeys(("entries", "starts", "counts", "pairs"))},
                options=chosen.options,
            ),
            Compilation(f"kept_count_{name}", count_kernel, {**found, "counts": "*i32", **sizes}, blocks,
                        options=chosen.options),
            Compilation(
                f"kept_place_{name}", place_kernel,
                {**found, **dict.fromkeys(("counts", "totals", "starts", "members", "pairs"), "*i32"), **sizes},
                {**blocks, **chosen.blocks, "table": None, "lengths": None}, options=chosen.options,
            ),
        ]  # fmt: skip
    arrays = ("kept", "entries", "starts", "counts", "table", "lengths", "cursors", "members", "pairs")
    bins = dict.fromkeys(arrays, "*i32")
    return [
        *made,
        Compilation(
            "kept_order_bins", order_kernel,
            {**bins, **dict.fromkeys(["per_sample", "total", "cells", "shift"], "i32")},
            {"cu_seqlens": None, **chosen.blocks, "BINS": 64}, options=chosen.options,
        ),
        Compilation(
            "kept_scan", scan_kernel, {"counts": "*i32", "totals": "*i32", "chunks": "i32", "bins": "i32"},
            {"BLOCK_C": _SCANNED_CHUNKS, "BLOCK_B": _SCANNED_BINS}, options=chosen.options,
        ),
    ]  # fmt: skip
