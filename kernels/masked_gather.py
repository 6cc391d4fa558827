"""masked_gather in Triton: bound by memory, with no arithmetic except the sum with positions.

Bytes, for B samples of N tokens of D numbers of e bytes, K kept tokens and P prefix rows. Forward reads B K D e, writes
B (P + K) D e, and reads N D e of positions and 8 B K of indices. Backward reads B (P + K) D e once for all three
gradients, and writes B N D e once, zeros included. It moves 24 B K + 12 B N of indices and their table
(`kernels.kept`).

A program that writes the tokens' gradient also makes the sums over samples for positions: it owns a cell, and goes
through a group of samples. A single group writes the sums to their place. Several groups (for many samples) write
partial sums, 8 (N + P) D bytes for each group written and read again, which a second kernel adds.

A cell that was kept by many entries of a long sample has pieces: `pieces_kernel` adds each 32 of them in a program of
its own, so that no program reads hundreds of rows one after another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from oner_fast.dtypes import statistics_dtype
from oner_fast.kernels import kept as kept_lists
from oner_fast.kernels.kept import STEP, sample_of_row, search_steps, step_of_members
from oner_fast.kernels.launch import Compilation, architecture_of, configuration, triton_type

PIECE = 32  # members whose sum is made before, where a cell has many
_SAMPLES_A_GROUP = 32  # groups depend on shapes alone, so that the bits of a gradient do not depend on the GPU
_GROUPS = 16


@triton.jit(do_not_specialize=["rows", "entries", "samples", "cells", "per_sample", "prefix_rows", "steps"])
def forward_kernel(
    tokens, kept, positions, prefix, cu_seqlens, out,
    rows, entries, samples, cells, width, per_sample, prefix_rows, steps,
    stride_tb, stride_tn, stride_td, stride_pn, stride_pd, stride_fr, stride_fd,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Copy kept tokens and prefix rows; programs: (block of rows of the result; block of columns)."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    row = first + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    if cu_seqlens is None:
        span = per_sample + prefix_rows
        local = (first % span).to(tl.int32) + tl.arange(0, BLOCK_R)
        sample = first // span + local // span
        within = local % span
        begin = sample * per_sample
    else:
        sample = sample_of_row(cu_seqlens, row, samples, steps, prefix_rows).to(tl.int64)
        begin = tl.load(cu_seqlens + sample).to(tl.int64)
        within = row - begin - sample * prefix_rows
    entry = begin + within - prefix_rows
    is_token = (row < rows) & (within >= prefix_rows) & (entry >= 0) & (entry < entries)
    cell = tl.load(kept + entry, mask=is_token, other=-1)
    inside = column < width
    reads = (is_token & (cell >= 0) & (cell < cells))[:, None] & inside[None, :]  # [BLOCK_R, BLOCK_D]
    place = column.to(tl.int64)[None, :]
    # A value of kept outside [0, cells) gives a row of NaN.
    x = tl.load(tokens + (sample * stride_tb + cell * stride_tn)[:, None] + place * stride_td, reads, float("nan"))
    if positions is not None:
        added = tl.load(positions + (cell * stride_pn)[:, None] + place * stride_pd, reads, 0.0)
        if x.dtype == tl.float64:
            x += added
        else:
            x = (x.to(tl.float32) + added.to(tl.float32)).to(x.dtype)
    if prefix is not None:
        is_prefix = ((row < rows) & (within >= 0) & (within < prefix_rows))[:, None]
        front = prefix + (within.to(tl.int64) * stride_fr)[:, None] + place * stride_fd
        x = tl.where(is_prefix, tl.load(front, is_prefix & inside[None, :], 0.0), x)
    tl.store(out + row[:, None] * width + place, x, (row < rows)[:, None] & inside[None, :])


@triton.jit
def _sum_of_repeats(
    rows, members, pieces, place, length, places, entries, stride_gr, width, column, inside,
    WIDE: tl.constexpr, PIECE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of a cell's members, `length` from `place` on; those of whole pieces are already added."""
    until = tl.minimum(place + length, places)
    place, inner, outer = place.to(until.dtype), until, until
    if pieces is not None:
        whole = length >= 2 * PIECE
        inner = tl.where(whole, tl.cdiv(place, PIECE) * PIECE, until)
        outer = tl.where(whole, until // PIECE * PIECE, until)
    sums = tl.zeros(column.shape, WIDE)
    for part in tl.static_range(2):  # before the pieces, and behind them
        first = place if part == 0 else outer
        last = inner if part == 0 else until
        for start in range(first, last, STEP):
            entry, there = step_of_members(members, start, last, STEP)
            there &= (entry >= 0) & (entry < entries)
            source = rows[None, :] + (entry.to(tl.int64) * stride_gr)[:, None]
            sums += tl.sum(tl.load(source, there[:, None] & inside[None, :], 0.0).to(WIDE), 0)
    if pieces is not None:
        for start in range(inner // PIECE, outer // PIECE, STEP):
            piece = start + tl.arange(0, STEP)
            source = pieces + (piece.to(tl.int64) * width)[:, None] + column[None, :]
            sums += tl.sum(tl.load(source, (piece < outer // PIECE)[:, None] & inside[None, :], 0.0), 0)
    return sums


@triton.jit
def _begin(cu_seqlens, sample, real, per_sample, entries):
    """Return the first entry of a sample, held inside `kept`."""
    if cu_seqlens is None:
        begin = sample * per_sample
    else:
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + sample, real, 0), 0), entries).to(tl.int64)
    return begin


@triton.jit
def _above(cu_seqlens, sample, real, per_sample, prefix_rows, entries, stride_gb, stride_gr):
    """Return the offset of the gradient of a sample's first token."""
    if cu_seqlens is None:
        above = sample * stride_gb + prefix_rows * stride_gr
    else:
        begin = _begin(cu_seqlens, sample, real, per_sample, entries)
        above = (begin + (sample + 1) * prefix_rows) * stride_gr
    return above


@triton.jit
def _zeros(PARTS: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    made = ()
    for _ in tl.static_range(PARTS):
        made += (tl.zeros([BLOCK_D], WIDE),)  # type: ignore[assignment]
    return made


@triton.jit
def _next(sample, cell, cells, SUMMED: tl.constexpr):
    """Return the next sample with the same cell, or else the next (sample, cell)."""
    if SUMMED:
        sample += 1
    else:
        cell += 1
        sample += (cell == cells).to(tl.int64)
        cell = tl.where(cell == cells, 0, cell)
    return sample, cell


@triton.jit(do_not_specialize=["samples", "cells", "entries", "per_sample", "prefix_rows", "group_size"])
def backward_kernel(
    grad, table, lengths, members, pieces, cu_seqlens, to_tokens, to_positions, to_prefix,
    samples, cells, entries, width, per_sample, prefix_rows, group_size, group_stride,
    stride_gb, stride_gr, stride_gd,
    SORTED: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr, TOGETHER: tl.constexpr, BLOCK_D: tl.constexpr,
    PIECE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Sum gradients. `TOGETHER` rows are under way at a time; a row of a cell that nobody chose is zeros, and not read.

    Programs with sums: (cell, then prefix row; group of samples; `PARTS` blocks of columns). A program goes through the
    samples of its group. Programs without: (`TOGETHER` pairs of sample and cell; 1; `PARTS` blocks of columns).
    """
    SUMMED: tl.constexpr = to_positions is not None or to_prefix is not None
    wide: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    column = tl.program_id(2).to(tl.int64) * (PARTS * BLOCK_D) + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    limit = tl.num_programs(2) * (PARTS * BLOCK_D) if EVEN else width
    grad += column * stride_gd
    part_stride = BLOCK_D * stride_gd
    if SUMMED:
        cell, group = tl.program_id(0), tl.program_id(1)
        first = group.to(tl.int64) * group_size
        sample, until = first, tl.minimum((group + 1) * group_size, samples).to(tl.int64)
        last = until
    else:
        first = tl.program_id(0).to(tl.int64) * TOGETHER
        last, until = first + TOGETHER, samples.to(tl.int64) * cells
        sample = first // cells
        cell, group = (first - sample * cells).to(tl.int32), 0
    sums = _zeros(PARTS, BLOCK_D, wide)
    if cell < cells:
        pair = sample * cells + cell
        advance = cells if SUMMED else 1
        for start in range(first, last, TOGETHER):
            chosen, x = (), ()
            least = -1
            for j in tl.static_range(TOGETHER):
                found = tl.load(table + pair + j * advance, start + j < until, -1)
                chosen += (found,)  # type: ignore[assignment]
                least = tl.minimum(least, found)
            own, its = sample, cell
            for j in tl.static_range(TOGETHER):
                real = start + j < until
                above = _above(cu_seqlens, own, real, per_sample, prefix_rows, entries, stride_gb, stride_gr)
                source = grad + (above + chosen[j].to(tl.int64) * stride_gr)
                read = tl.where(chosen[j] >= 0, limit, 0)
                for part in tl.static_range(PARTS):
                    x += (tl.load(source + part * part_stride, column + part * BLOCK_D < read, 0.0),)
                own, its = _next(own, its, cells, SUMMED)
            if to_tokens is not None:
                target = to_tokens + (pair * width + column)
                for j in tl.static_range(TOGETHER):
                    written = tl.where((start + j < until) & (chosen[j] >= -1), limit, 0)
                    for part in tl.static_range(PARTS):
                        there = column + part * BLOCK_D < written
                        tl.store(target + part * BLOCK_D, x[j * PARTS + part], there)
                    target += advance * width
            if to_positions is not None:
                for j in tl.static_range(TOGETHER):
                    if chosen[j] >= 0:
                        more = ()
                        for part in tl.static_range(PARTS):
                            more += (sums[part] + x[j * PARTS + part].to(wide),)  # type: ignore[assignment]
                        sums = more
            if least < -1:  # a token that was kept more than once
                own, its = sample, cell
                for step in range(TOGETHER):
                    real = start + step < until
                    several = tl.load(table + pair + step * advance, real, -1)
                    if several < -1:
                        begin = _begin(cu_seqlens, own, real, per_sample, entries)
                        above = _above(cu_seqlens, own, real, per_sample, prefix_rows, entries, stride_gb, stride_gr)
                        its_pair = pair + step * advance
                        more = ()
                        for part in tl.static_range(PARTS):
                            offset = part * BLOCK_D
                            inside = column + offset < limit
                            total = _sum_of_repeats(
                                grad + (above + part * part_stride), members if SORTED else members + begin, pieces,
                                -2 - several, tl.load(lengths + its_pair), entries if SORTED else entries - begin,
                                entries - begin, stride_gr, width, column + offset, inside, wide, PIECE, STEP,
                            )  # fmt: skip
                            if to_tokens is not None:
                                tl.store(to_tokens + (its_pair * width + column + offset), total, inside)
                            more += (sums[part] + total,)  # type: ignore[assignment]
                        sums = more
                    own, its = _next(own, its, cells, SUMMED)
            pair += TOGETHER * advance
            if SUMMED:
                sample += TOGETHER
        if to_positions is not None:
            target = to_positions + (group.to(tl.int64) * group_stride + cell.to(tl.int64) * width + column)
            for part in tl.static_range(PARTS):
                tl.store(target + part * BLOCK_D, sums[part], column + part * BLOCK_D < limit)
    elif to_prefix is not None:
        row = cell - cells
        target = to_prefix + (group.to(tl.int64) * group_stride + row.to(tl.int64) * width + column)
        for part in tl.static_range(PARTS):
            inside = column + part * BLOCK_D < limit
            total = tl.zeros([BLOCK_D], wide)
            for start in range(first, until, STEP):
                one = start + tl.arange(0, STEP)
                real = one < until
                above = _above(cu_seqlens, one, real, per_sample, prefix_rows, entries, stride_gb, stride_gr)
                offset = above + (row - prefix_rows) * stride_gr + part * part_stride
                source = grad[None, :] + offset[:, None]
                total += tl.sum(tl.load(source, real[:, None] & inside[None, :], 0.0).to(wide), 0)
            tl.store(target + part * BLOCK_D, total, inside)


@triton.jit(do_not_specialize=["cells", "pair_count", "entries", "per_sample", "prefix_rows"])
def pieces_kernel(
    grad, members, pairs, cu_seqlens, pieces,
    cells, pair_count, entries, width, per_sample, prefix_rows, stride_gb, stride_gr, stride_gd,
    PIECE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of PIECE members that lie side by side, where all are one cell's; programs: the pieces."""
    at = tl.program_id(0).to(tl.int64) * PIECE + tl.arange(0, PIECE)
    pair = tl.load(pairs + at, at < entries, -1)
    first = tl.min(pair, 0)
    if (first >= 0) & (first < pair_count) & (tl.max(pair, 0) == first):
        sample = (first // cells).to(tl.int64)
        begin = _begin(cu_seqlens, sample, True, per_sample, entries)
        above = _above(cu_seqlens, sample, True, per_sample, prefix_rows, entries, stride_gb, stride_gr)
        entry = tl.load(members + at)
        there = (entry >= 0) & (begin + entry < entries)
        source = grad + (above + entry.to(tl.int64) * stride_gr)[:, None]
        for start in range(0, width, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            x = tl.load(source + column[None, :] * stride_gd, there[:, None] & (column < width)[None, :], 0.0)
            target = pieces + tl.program_id(0).to(tl.int64) * width + column
            tl.store(target, tl.sum(x.to(pieces.dtype.element_ty), 0), column < width)


@triton.jit(do_not_specialize=["groups"])
def sum_groups_kernel(partial, to_positions, to_prefix, groups, split, total, BLOCK: tl.constexpr):
    """Sum partial (groups, total) over groups: the first `split` numbers for positions, the rest for the prefix."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    sums = tl.load(partial + place, place < total, 0.0)
    source = partial + place
    for _ in range(1, groups):
        source += total
        sums += tl.load(source, place < total, 0.0)
    if to_positions is not None:
        tl.store(to_positions + place, sums, place < split)
    if to_prefix is not None:
        tl.store(to_prefix + place - split, sums, (place >= split) & (place < total))


def forward(
    tokens: Tensor, kept: Tensor, positions: Tensor | None, prefix: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Launch forward; see the raw op for the shapes."""
    samples, cells, width = tokens.shape
    prefix_rows = 0 if prefix is None else prefix.shape[0]
    if cu_seqlens is None:
        out = tokens.new_empty(samples, kept.shape[1] + prefix_rows, width)
    else:
        out = tokens.new_empty(kept.shape[0] + samples * prefix_rows, width)
    if out.numel() == 0:
        return out
    chosen = configuration("masked_gather", "forward", _size_class(tokens.dtype), architecture_of(tokens))
    rows = out.numel() // width
    grid = (triton.cdiv(rows, chosen.blocks["BLOCK_R"]), triton.cdiv(width, chosen.blocks["BLOCK_D"]))
    forward_kernel[grid](
        tokens, kept.contiguous(), positions, prefix if prefix_rows else None, _dense(cu_seqlens), out,
        rows, kept.numel(), samples, cells, width, 0 if cu_seqlens is not None else kept.shape[1], prefix_rows,
        search_steps(samples), *tokens.stride(), *_strides(positions), *_strides(prefix), **chosen.launch,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    kept: Tensor,
    cu_seqlens: Tensor | None,
    samples: int,
    tokens: int,
    prefix: int,
    need_tokens: bool,
    need_positions: bool,
    need_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch backward: the gradients of tokens, positions and prefix, each empty where it is not needed."""
    width = grad.shape[-1]
    to_tokens = grad.new_empty((samples, tokens, width) if need_tokens else (0,))
    to_positions = grad.new_empty((tokens, width) if need_positions else (0,))
    to_prefix = grad.new_empty((prefix, width) if need_prefix else (0,))
    results = (to_tokens, to_positions, to_prefix)
    rows = (tokens if need_tokens or need_positions else 0) + (prefix if need_prefix else 0)
    if samples == 0 or width == 0 or rows == 0:
        return tuple(x.zero_() for x in results)  # type: ignore[return-value]
    kept, cu_seqlens = kept.contiguous(), _dense(cu_seqlens)
    cells = tokens if need_tokens or need_positions else 0
    found = kept_lists.lists(kept, cu_seqlens, samples, cells)
    per_sample = 0 if cu_seqlens is not None else kept.shape[1]
    strides = grad.stride() if cu_seqlens is None else (0, *grad.stride())
    pieces = None
    if found.pairs is not None:
        chosen = configuration("masked_gather", "pieces", _size_class(grad.dtype), architecture_of(grad))
        count = triton.cdiv(kept.numel(), PIECE)
        pieces = grad.new_empty(count, width, dtype=statistics_dtype(grad))
        if count:
            pieces_kernel[(count,)](
                grad, found.members, found.pairs, cu_seqlens, pieces,
                cells, samples * cells, kept.numel(), width, per_sample, prefix, *strides, PIECE=PIECE, **chosen.launch,
            )  # fmt: skip

    summed = (tokens if need_positions else 0) + (prefix if need_prefix else 0)
    groups = min(triton.cdiv(samples, _SAMPLES_A_GROUP), _GROUPS) if summed else 1
    chosen = configuration("masked_gather", "backward", _size_class(grad.dtype), architecture_of(grad))
    together, blocks = chosen.blocks["TOGETHER"], triton.cdiv(width, chosen.blocks["BLOCK_D"])
    parts = next(parts for parts in (3, 2, 1) if blocks % parts == 0)
    group_size = triton.cdiv(samples, groups)
    split = tokens * width if need_positions else 0
    partial = grad.new_empty(groups, summed * width, dtype=statistics_dtype(grad)) if groups > 1 else None
    sums_positions, sums_prefix = (to_positions, to_prefix) if partial is None else (partial, partial.view(-1)[split:])
    programs = cells + prefix * need_prefix if summed else triton.cdiv(samples * cells, together)
    backward_kernel[(programs, groups, blocks // parts)](
        grad, *found[:3], pieces, cu_seqlens, to_tokens if need_tokens else None,
        sums_positions if need_positions else None, sums_prefix if need_prefix else None,
        samples, cells, kept.numel(), width, per_sample, prefix, group_size, summed * width, *strides,
        SORTED=found.pairs is not None, EVEN=width % chosen.blocks["BLOCK_D"] == 0, PARTS=parts,
        PIECE=PIECE, STEP=STEP, **chosen.launch,
    )  # fmt: skip
    if partial is not None:
        adding = configuration("masked_gather", "sum_groups", "any", architecture_of(grad))
        sum_groups_kernel[(triton.cdiv(summed * width, adding.blocks["BLOCK"]),)](
            partial, to_positions if need_positions else None, to_prefix if need_prefix else None,
            groups, split, summed * width, **adding.launch,
        )  # fmt: skip
    return results


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _strides(rows: Tensor | None) -> tuple[int, int]:
    return (0, 0) if rows is None else rows.stride()  # type: ignore[return-value]


def _size_class(dtype: torch.dtype) -> str:
    return f"{dtype.itemsize} bytes"


def compilations() -> list[Compilation]:
    """List all kernels for fixed samples in every dtype, and for ragged ones in bfloat16."""
    made = _compilations(torch.bfloat16, True)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        made.extend(_compilations(dtype, False))
    chosen = configuration("masked_gather", "sum_groups", "any", 80)
    for dtype in (torch.bfloat16, torch.float32):
        target = f"*{triton_type(dtype)}"
        signature = {"partial": "*fp32", "to_positions": target, "to_prefix": target, "groups": "i32", "split": "i32"}
        made.append(
            Compilation(
                f"masked_gather_sum_groups_{target[1:]}", sum_groups_kernel, {**signature, "total": "i32"},
                chosen.blocks, {"split": 16, "total": 16}, chosen.options,
            )
        )  # fmt: skip
    return made


def _compilations(dtype: torch.dtype, ragged: bool) -> list[Compilation]:
    """List forward and backward for contiguous rows of a multiple of 16 numbers, with positions and a prefix."""
    kind, size = f"*{triton_type(dtype)}", _size_class(dtype)
    name = f"{triton_type(dtype)}_{'ragged' if ragged else 'fixed'}"
    boundaries: dict[str, str] = {"cu_seqlens": "*i32"} if ragged else {}
    absent: dict[str, None] = {} if ragged else {"cu_seqlens": None}

    def integers(names: str) -> dict[str, str]:
        return dict.fromkeys(names.split(), "i32")

    chosen = configuration("masked_gather", "forward", size, 80)
    strides = "stride_tb stride_tn stride_pn stride_fr"
    made = [
        Compilation(
            f"masked_gather_forward_{name}",
            forward_kernel,
            {
                **dict.fromkeys(("tokens", "positions", "prefix", "out"), kind), "kept": "*i64", **boundaries,
                **integers(f"rows entries samples cells width per_sample prefix_rows steps {strides}"),
            },
            {**absent, "stride_td": 1, "stride_pd": 1, "stride_fd": 1, **chosen.blocks},
            dict.fromkeys(("width", *strides.split()), 16),
            chosen.options,
        )
    ]  # fmt: skip
    wide = "*fp64" if dtype == torch.float64 else "*fp32"
    lists = dict.fromkeys(("table", "lengths", "members"), "*i32")
    chosen = configuration("masked_gather", "backward", size, 80)
    for sums, is_sorted in ((None, True), (kind, False), (wide, False)):
        targets = {} if sums is None else {"to_positions": sums, "to_prefix": sums}
        pieces = {"pieces": wide} if is_sorted else {}
        made.append(
            Compilation(
                f"masked_gather_backward_{'' if sums is None else 'sums_to_' + sums[1:] + '_'}{name}",
                backward_kernel,
                {
                    "grad": kind, **lists, **pieces, **boundaries, "to_tokens": kind, **targets,
                    **integers("samples cells entries width per_sample prefix_rows group_size group_stride"),
                    **integers("stride_gb stride_gr"),
                },
                {
                    **absent, **({} if targets else {"to_positions": None, "to_prefix": None}), "stride_gd": 1,
                    **({} if pieces else {"pieces": None}), "SORTED": is_sorted, "EVEN": True, "PARTS": 3,
                    "PIECE": PIECE, "STEP": STEP, **chosen.blocks,
                },
                dict.fromkeys(("width", "group_stride", "stride_gb", "stride_gr"), 16),
                chosen.options,
            )
        )  # fmt: skip
    if kind == wide:
        made.pop()
    chosen = configuration("masked_gather", "pieces", size, 80)
    made.append(
        Compilation(
            f"masked_gather_pieces_{name}", pieces_kernel,
            {
                "grad": kind, "members": "*i32", "pairs": "*i32", **boundaries, "pieces": wide,
                **integers("cells pair_count entries width per_sample prefix_rows stride_gb stride_gr"),
            },
            {**absent, "stride_gd": 1, "PIECE": PIECE, **chosen.blocks},
            dict.fromkeys(("width", "stride_gb", "stride_gr"), 16),
            chosen.options,
        )
    )  # fmt: skip
    return made
