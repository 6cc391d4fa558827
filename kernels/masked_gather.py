"""masked_gather in Triton: bound by memory, with no arithmetic except the sum with positions.

Bytes, for B samples of N tokens of D numbers of e bytes, K kept tokens and P prefix rows. Forward reads B K D e, writes
B (P + K) D e, and reads N D e of positions and 8 B K of indices. Backward reads B (P + K) D e once for all three
gradients, and writes B N D e once, zeros included. It moves 16 B K + 8 B N of indices and lists (`kernels.kept`).

The programs that write the tokens' gradient also make the sums over samples for positions and prefix: each owns some
cells of a group of samples. A single group writes the sums to their place. Several groups (for many samples) write
partial sums, 8 (N + P) D bytes for each group written and read again, which a second kernel adds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from oner_fast.dtypes import statistics_dtype
from oner_fast.kernels import kept as kept_lists
from oner_fast.kernels.kept import next_entry, sample_of_row, search_steps
from oner_fast.kernels.launch import Compilation, architecture_of, configuration, triton_type

_SAMPLES_A_GROUP = 64  # groups depend on shapes alone, so that the bits of a gradient do not depend on the GPU
_GROUPS = 16
_GRID_LIMIT = 65535  # the most programs along every axis but the first


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


@triton.jit(do_not_specialize=["samples", "cells", "entries", "per_sample", "prefix_rows", "rows", "group_size"])
def backward_kernel(
    grad, head, following, cu_seqlens, to_tokens, to_positions, to_prefix,
    samples, cells, entries, width, per_sample, prefix_rows, rows, group_size, group_stride,
    stride_gb, stride_gr, stride_gd,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum gradients; programs: (block of cells, then of prefix rows; group of samples; block of columns)."""
    cell = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    is_cell = (cell < cells)[None, :]
    is_prefix = ((cell >= cells) & (cell < rows))[None, :]
    inside = (column < width)[None, None, :]
    place = column.to(tl.int64)[None, None, :]
    wide: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    sums = tl.zeros([BLOCK_N, BLOCK_D], wide)
    group = tl.program_id(1)
    until = tl.minimum((group + 1) * group_size, samples)
    for start in range(group * group_size, until, BLOCK_S):
        sample = (start + tl.arange(0, BLOCK_S))[:, None]  # [BLOCK_S, 1]
        real = sample < until
        sample = sample.to(tl.int64)
        if cu_seqlens is None:
            begin, above = sample * per_sample, sample * stride_gb
        else:
            begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + sample, real, 0), 0), entries).to(tl.int64)
            above = (begin + sample * prefix_rows) * stride_gr
        entry = tl.load(head + sample * cells + cell[None, :], real & is_cell, -1)  # [BLOCK_S, BLOCK_N]
        there = (entry >= 0) | (real & is_prefix)
        row = tl.where(is_cell, prefix_rows + entry, cell[None, :] - cells).to(tl.int64)
        source = grad + (above + row * stride_gr)[:, :, None] + place * stride_gd
        x = tl.load(source, there[:, :, None] & inside, 0.0).to(wide)  # [BLOCK_S, BLOCK_N, BLOCK_D]
        entry = next_entry(following, begin, entry, entries)
        while tl.max(tl.max(entry, 1), 0) >= 0:  # a token that was kept more than once
            row = (prefix_rows + entry).to(tl.int64)
            source = grad + (above + row * stride_gr)[:, :, None] + place * stride_gd
            x += tl.load(source, (entry >= 0)[:, :, None] & inside, 0.0).to(wide)
            entry = next_entry(following, begin, entry, entries)
        if to_tokens is not None:
            target = to_tokens + ((sample * cells + cell[None, :]) * width)[:, :, None] + place
            tl.store(target, x, (real & is_cell)[:, :, None] & inside)
        sums += tl.sum(x, 0)
    cell, inside = cell[:, None], (column < width)[None, :]
    target = group.to(tl.int64) * group_stride + column[None, :]
    if to_positions is not None:
        tl.store(to_positions + target + cell.to(tl.int64) * width, sums, (cell < cells) & inside)
    if to_prefix is not None:
        front = (cell - cells).to(tl.int64)
        tl.store(to_prefix + target + front * width, sums, (cell >= cells) & (cell < rows) & inside)


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
    head, following = kept_lists.lists(kept, cu_seqlens, samples, cells)

    summed = (tokens if need_positions else 0) + (prefix if need_prefix else 0)
    groups = min(max(samples // _SAMPLES_A_GROUP, 1), _GROUPS) if summed else 0
    chosen = configuration("masked_gather", "backward_sums" if summed else "backward", _size_class(grad.dtype),
                           architecture_of(grad))  # fmt: skip
    group_size = triton.cdiv(samples, groups or min(samples, _GRID_LIMIT))
    split = tokens * width if need_positions else 0
    partial = grad.new_empty(groups, summed * width, dtype=statistics_dtype(grad)) if groups > 1 else None
    sums_positions, sums_prefix = (to_positions, to_prefix) if partial is None else (partial, partial.view(-1)[split:])
    grid = (
        triton.cdiv(rows, chosen.blocks["BLOCK_N"]),
        triton.cdiv(samples, group_size),
        triton.cdiv(width, chosen.blocks["BLOCK_D"]),
    )
    strides = grad.stride() if cu_seqlens is None else (0, *grad.stride())
    backward_kernel[grid](
        grad, head, following, cu_seqlens, to_tokens if need_tokens else None,
        sums_positions if need_positions else None, sums_prefix if need_prefix else None,
        samples, cells, kept.numel(), width, 0 if cu_seqlens is not None else kept.shape[1], prefix, rows, group_size,
        summed * width, *strides, **chosen.launch,
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
    for kernel, sums in (("backward", None), ("backward_sums", kind), ("backward_sums", wide)):
        chosen = configuration("masked_gather", kernel, size, 80)
        targets = {} if sums is None else {"to_positions": sums, "to_prefix": sums}
        made.append(
            Compilation(
                f"masked_gather_{kernel}_{'' if sums is None else 'to_' + sums[1:] + '_'}{name}",
                backward_kernel,
                {
                    "grad": kind, "head": "*i32", "following": "*i32", **boundaries, "to_tokens": kind, **targets,
                    **integers("samples cells entries width per_sample prefix_rows rows group_size group_stride"),
                    **integers("stride_gb stride_gr"),
                },
                {
                    **absent, **({} if targets else {"to_positions": None, "to_prefix": None}), "stride_gd": 1,
                    **chosen.blocks,
                },
                dict.fromkeys(("width", "group_stride", "stride_gb", "stride_gr"), 16),
                chosen.options,
            )
        )  # fmt: skip
    return made[:3] if kind == wide else made
