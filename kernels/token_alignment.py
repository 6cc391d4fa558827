"""token_alignment in Triton: one pass over the rows of student and teacher in forward, one in backward.

Both are bound by memory. With R = B K rows of D numbers of s bytes, for student and teacher alike:

| kernel | reads | writes | FLOPs |
|---|---|---|---|
| forward | 2 R D s, kept 8 R | factors 8 R, sums of programs 4 min(R, 8192) | 6 R D |
| mean | 4 min(R, 8192) | 4 | |
| backward | 2 R D s, kept 8 R, factors 8 R | R D s | 3 R D |

One warp handles a row, so that its sums need no shared memory. The rows of a program and the order of all sums depend
on the shapes alone, so that the result has the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from oner_fast.kernels.launch import Compilation, Configuration, architecture_of, configuration, triton_type
from oner_fast.kernels.norms import divisor_of

PROGRAMS = 8192  # the most programs of forward; each passes one number to the mean
LEAST = tl.constexpr(1e-30)  # a smaller factor, times the gradient of the loss, may underflow float32
WIDE_BLOCK = tl.constexpr(128)  # numbers of a row that are converted to float64 at a time
MEAN = Configuration({"BLOCK": 1024}, num_warps=4, num_stages=3)


@triton.jit
def _sums(student_row, teacher_row, width, STATISTICS: tl.constexpr, BLOCK: tl.constexpr):
    """Compute s . s, t . t and s . t for two rows."""
    ss = tl.full((), 0, STATISTICS)
    tt = tl.full((), 0, STATISTICS)
    st = tl.full((), 0, STATISTICS)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)  # [BLOCK]
        inside = columns < width
        s = tl.load(student_row + columns, mask=inside, other=0).to(STATISTICS)
        t = tl.load(teacher_row + columns, mask=inside, other=0).to(STATISTICS)
        ss += tl.sum(s * s)
        tt += tl.sum(t * t)
        st += tl.sum(s * t)
    return ss, tt, st


@triton.jit
def _inverse_norm(squares):
    """Return 1 / sqrt(squares), correctly rounded: 0 for a row that counts as zeros, NaN where squares overflow."""
    one = tl.full((), 1, squares.dtype)
    if squares.dtype is tl.float64:
        norm = tl.sqrt(squares)
        inverse = one / divisor_of(norm)
    else:
        norm = tl.sqrt_rn(squares)
        inverse = tl.div_rn(one, divisor_of(norm))
    return inverse


@triton.jit
def _pair(ss, tt, st):
    """Return the cosine and the factors of s and t in its gradient, t / (|s| |t|) - s cos / |s|^2.

    All are 0 where either row counts as zeros.
    """
    by_student, by_teacher = _inverse_norm(ss), _inverse_norm(tt)
    cosine = st * by_student * by_teacher
    return cosine, -cosine * by_student * by_student, by_student * by_teacher


@triton.jit
def _rows(
    student, teacher, kept, row, per_sample, cells,
    student_sample, student_token, teacher_sample, teacher_token, kept_sample, kept_token, HAS_KEPT: tl.constexpr,
):  # fmt: skip
    """Return pointers to row `row` of the student and to the teacher row it is aligned with, with int64 offsets."""
    sample = (row // per_sample).to(tl.int64)
    token = (row % per_sample).to(tl.int64)
    chosen = token
    if HAS_KEPT:
        chosen = tl.load(kept + sample * kept_sample + token * kept_token)
        chosen = tl.minimum(tl.maximum(chosen, 0), cells - 1)
    student_row = student + sample * student_sample + token * student_token
    return student_row, teacher + sample * teacher_sample + chosen * teacher_token


@triton.jit(do_not_specialize=["rows", "rows_each", "per_sample", "cells"])
def _forward(
    student, teacher, kept, factors, sums, rows, rows_each, per_sample, cells, width,
    student_sample, student_token, teacher_sample, teacher_token, kept_sample, kept_token,
    HAS_KEPT: tl.constexpr, STATISTICS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    first = program.to(tl.int64) * rows_each
    total = tl.full((), 0, STATISTICS)
    for row in range(first, tl.minimum(first + rows_each, rows)):
        student_row, teacher_row = _rows(
            student, teacher, kept, row, per_sample, cells, student_sample, student_token, teacher_sample,
            teacher_token, kept_sample, kept_token, HAS_KEPT,
        )  # fmt: skip
        ss, tt, st = _sums(student_row, teacher_row, width, STATISTICS, BLOCK_D)
        cosine, to_student, to_teacher = _pair(ss, tt, st)
        tl.store(factors + 2 * row, to_student)
        tl.store(factors + 2 * row + 1, to_teacher)
        total += cosine
    tl.store(sums + program, total)


@triton.jit(do_not_specialize=["programs", "rows"])
def _mean(sums, loss, programs, rows, BLOCK: tl.constexpr):
    total = tl.full((), 0, tl.float64)
    for start in range(0, programs, BLOCK):
        places = start + tl.arange(0, BLOCK)  # [BLOCK]
        total += tl.sum(tl.load(sums + places, mask=places < programs, other=0).to(tl.float64))
    tl.store(loss, (-total / rows.to(tl.float64)).to(loss.dtype.element_ty))


@triton.jit(do_not_specialize=["rows", "per_sample", "cells"])
def _backward(
    grad, student, teacher, kept, factors, out, rows, per_sample, cells, width,
    student_sample, student_token, teacher_sample, teacher_token, kept_sample, kept_token,
    HAS_KEPT: tl.constexpr, STATISTICS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student_row, teacher_row = _rows(
        student, teacher, kept, row, per_sample, cells, student_sample, student_token, teacher_sample,
        teacher_token, kept_sample, kept_token, HAS_KEPT,
    )  # fmt: skip
    out_row = out + row * width
    scale = -tl.load(grad).to(STATISTICS) / rows.to(STATISTICS)
    to_student, to_teacher = tl.load(factors + 2 * row), tl.load(factors + 2 * row + 1)
    exact = True
    if STATISTICS is tl.float32:
        # Factors that underflow float32, or are 0 as for orthogonal rows and rows of zeros, are computed in float64.
        underflow = (tl.abs(to_student) < LEAST) | (to_teacher < LEAST)
        exact = underflow == 0
    if exact:
        _combine(out_row, student_row, teacher_row, width, scale * to_student, scale * to_teacher, BLOCK_D)
    else:
        ss, tt, st = _sums(student_row, teacher_row, width, tl.float64, WIDE_BLOCK)
        _, wide_student, wide_teacher = _pair(ss, tt, st)
        wide = scale.to(tl.float64)
        _combine(out_row, student_row, teacher_row, width, wide * wide_student, wide * wide_teacher, WIDE_BLOCK)


@triton.jit
def _combine(out_row, student_row, teacher_row, width, to_student, to_teacher, BLOCK: tl.constexpr):
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)  # [BLOCK]
        inside = columns < width
        s = tl.load(student_row + columns, mask=inside, other=0).to(to_student.dtype)
        t = tl.load(teacher_row + columns, mask=inside, other=0).to(to_student.dtype)
        mixed = to_teacher * t + to_student * s
        tl.store(out_row + columns, mixed.to(out_row.dtype.element_ty), mask=inside)


def forward(student: Tensor, teacher: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the loss, and the factors of both rows in the gradient of their cosine, (rows, 2)."""
    student, teacher = _with_dense_rows(student), _with_dense_rows(teacher)
    batch, per_sample, width = student.shape
    rows = batch * per_sample
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    loss = student.new_empty((), dtype=wide)
    factors = student.new_empty((rows, 2), dtype=wide)
    rows_each = triton.cdiv(rows, PROGRAMS)
    programs = triton.cdiv(rows, rows_each)
    sums = student.new_empty(programs, dtype=wide)
    _forward[(programs,)](
        student, teacher, kept, factors, sums, rows, rows_each, per_sample, teacher.shape[1], width,
        *_strides(student, teacher, kept), HAS_KEPT=kept is not None, STATISTICS=_statistics(student.dtype),
        **_configuration("forward", width, student).launch,
    )  # fmt: skip
    _mean[(1,)](sums, loss, programs, rows, **MEAN.launch)
    return loss, factors


def backward(grad: Tensor, student: Tensor, teacher: Tensor, kept: Tensor | None, factors: Tensor) -> Tensor:
    """Return the gradient with respect to the student, contiguous."""
    out = student.new_empty(student.shape)
    student, teacher = _with_dense_rows(student), _with_dense_rows(teacher)
    batch, per_sample, width = student.shape
    rows = batch * per_sample
    _backward[(rows,)](
        grad, student, teacher, kept, factors, out, rows, per_sample, teacher.shape[1], width,
        *_strides(student, teacher, kept), HAS_KEPT=kept is not None, STATISTICS=_statistics(student.dtype),
        **_configuration("backward", width, student).launch,
    )  # fmt: skip
    return out


def _with_dense_rows(x: Tensor) -> Tensor:
    """Return x where the numbers of a token are adjacent, else a contiguous copy."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _strides(student: Tensor, teacher: Tensor, kept: Tensor | None) -> tuple[int, ...]:
    return *student.stride()[:2], *teacher.stride()[:2], *((0, 0) if kept is None else kept.stride())


def _statistics(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _shape_class(width: int, dtype: torch.dtype) -> str:
    size = "narrow" if width <= 256 else "wide"
    return f"{size} float64" if dtype == torch.float64 else size


def _configuration(kernel: str, width: int, student: Tensor) -> Configuration:
    return configuration("token_alignment", kernel, _shape_class(width, student.dtype), architecture_of(student))


def compilations() -> list[Compilation]:
    """List both kernels for each dtype used in training, at the width of the towers and at a narrow one."""
    dtypes = [
        (torch.bfloat16, torch.bfloat16, 1024), (torch.float16, torch.float16, 1024),
        (torch.float32, torch.float32, 1024), (torch.bfloat16, torch.float32, 1024),
        (torch.float64, torch.float64, 1024), (torch.bfloat16, torch.bfloat16, 256),
    ]  # fmt: skip
    found = []
    for student, teacher, width in dtypes:
        for kernel in ("forward", "backward"):
            found.append(_compilation(kernel, student, teacher, width, chosen=True))
    found.append(_compilation("forward", torch.bfloat16, torch.bfloat16, 1024, chosen=False))
    mean = {"sums": "*fp32", "loss": "*fp32", "programs": "i32", "rows": "i32"}
    found.append(Compilation("token_alignment mean", _mean, mean, MEAN.blocks, options=MEAN.options))
    return found


def _compilation(kernel: str, student: torch.dtype, teacher: torch.dtype, width: int, chosen: bool) -> Compilation:
    wide = "*fp64" if student == torch.float64 else "*fp32"
    tensors = {"student": f"*{triton_type(student)}", "teacher": f"*{triton_type(teacher)}", "factors": wide}
    numbers = {"rows": "i32", "per_sample": "i32", "cells": "i32", "width": "i32"}
    if kernel == "forward":
        tensors["sums"], numbers["rows_each"] = wide, "i32"
    else:
        tensors |= {"grad": wide, "out": f"*{triton_type(student)}"}
    if chosen:
        tensors["kept"] = "*i64"
    strides = ["student_sample", "student_token", "teacher_sample", "teacher_token", "kept_sample"]
    shape_class = _shape_class(width, student)
    used = configuration("token_alignment", kernel, shape_class, 80)
    constexprs = {"HAS_KEPT": chosen, "STATISTICS": _statistics(student), "kept_token": 1, **used.blocks}
    if not chosen:
        constexprs["kept"] = None
    dtype = f"{triton_type(student)} of {triton_type(teacher)}"
    return Compilation(
        name=f"token_alignment {kernel} {dtype}, D {width}{'' if chosen else ', all tokens'}",
        kernel=_forward if kernel == "forward" else _backward,
        signature=tensors | numbers | dict.fromkeys(strides, "i32"),
        constexprs=constexprs,
        divisible={"width": 16, **dict.fromkeys(strides[:4], 16)},
        options=used.options,
    )
