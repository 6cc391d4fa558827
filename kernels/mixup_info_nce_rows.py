"""The operands of mixup_info_nce: rows mixed from two, their norms, and backpropagation through the normalisation.

Rows that are not mixed enter the products unchanged, and their inverse norms are applied to the logits, so nothing is
copied. Mixed rows are mixed in float32, normalised, and rounded once to a buffer (N, D) in the inputs' dtype. Every
stripe of tiles reads that buffer; to mix during those loads would read both sources each time, twice the bytes.

| kernel | FLOPs | reads | writes |
|---|---|---|---|
| `_inverse_norms` | 2 N D (5 N D mixed) | x (and other) once | 4 N |
| `_unit_rows` (mixed rows alone) | 4 N D | x, other once | x once |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from oner_fast.kernels.launch import Compilation, Configuration, architecture_of, configuration, triton_type
from oner_fast.kernels.mixup_info_nce_tiles import OP, RANGES, compilation, range_factor
from oner_fast.kernels.norms import divisor_of


@dataclass(frozen=True)
class Side:
    """Query or key with dense rows: row i is inverse_norm[i] * ((1 - mix_i) x_i + mix_i other_i).

    Without inverse norms the mixed rows enter the logits as they are.
    """

    x: Tensor
    other: Tensor | None
    mix: Tensor | None
    inverse_norm: Tensor | None

    @staticmethod
    def of(x: Tensor, other: Tensor | None, mix: Tensor | None, inverse_norm: Tensor | None) -> Side:
        """Copy rows that are not dense, and convert `mix` to float32."""
        if other is None:
            return Side(dense_rows(x), None, None, inverse_norm)
        assert mix is not None
        return Side(dense_rows(x), dense_rows(other), mix.float().contiguous(), inverse_norm)

    @property
    def sources(self) -> tuple[Any, ...]:
        """The arguments of kernels: x, its stride, other, its stride, and mix."""
        if self.other is None:
            return self.x, self.x.stride(0), self.x, 0, self.x
        return self.x, self.x.stride(0), self.other, self.other.stride(0), self.mix

    @property
    def flags(self) -> dict[str, bool]:
        """The constexpr arguments of kernels that load the rows."""
        return {"MIXED": self.other is not None, "MIX_EACH": self.mix is not None and self.mix.dim() == 1}

    def operand(self) -> tuple[Tensor, Tensor | None]:
        """Return the rows (N, D) for products, and the factors of the logits that they leave (None for none)."""
        return (self.x, self.inverse_norm) if self.other is None else (self.unit_rows(), None)

    def unit_rows(self) -> Tensor:
        """Return the rows of the logits (N, D), contiguous and in the inputs' dtype."""
        if self.inverse_norm is None and self.other is None:
            return self.x.contiguous()
        rows, width = self.x.shape
        out = torch.empty_like(self.x, memory_format=torch.contiguous_format)
        blocks = row_configuration("rows", width, self.x)
        _unit_rows[(triton.cdiv(rows, blocks.blocks["BLOCK_M"]), triton.cdiv(width, blocks.blocks["BLOCK_D"]))](
            *self.sources, out if self.inverse_norm is None else self.inverse_norm, out, rows, width,
            UNIT=self.inverse_norm is None, **self.flags, **blocks.launch,
        )  # fmt: skip
        return out


def dense_rows(x: Tensor) -> Tensor:
    """Return x where its rows are dense, else a contiguous copy."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def size_class(width: int, largest: int) -> str:
    """Return the power of two that holds a row, at least 64, or "deep" beyond the largest that a kernel holds."""
    size = max(64, triton.next_power_of_2(width))
    return str(size) if size <= largest else "deep"


def row_configuration(kernel: str, width: int, x: Tensor) -> Configuration:
    """Return the tile of a kernel that walks over rows of this width."""
    return configuration(OP, kernel, size_class(width, 256), architecture_of(x))


@triton.jit
def mixed_rows(
    x, x_stride, other, other_stride, mix, row, here, column, width,
    MIXED: tl.constexpr, MIX_EACH: tl.constexpr,
):  # fmt: skip
    """Load (1 - mix) x + mix other in float32, other - x where MIXED, and the mix of each row."""
    mask = here[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None]
    mixed = tl.load(x + at * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
    difference = mixed
    share = tl.zeros([row.shape[0]], tl.float32)
    if MIXED:
        second = tl.load(other + at * other_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if MIX_EACH:
            share = tl.load(mix + row, mask=here, other=0.0)
        else:
            share += tl.load(mix)
        difference = second - mixed
        mixed = (1 - share)[:, None] * mixed + share[:, None] * second
    return mixed, difference, share


@triton.jit(do_not_specialize=["rows"])
def _inverse_norms(
    x, x_stride, other, other_stride, mix, out, rows, width,
    MIXED: tl.constexpr, MIX_EACH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = row < rows
    squares = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, width, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        mixed, _, _ = mixed_rows(x, x_stride, other, other_stride, mix, row, here, column, width, MIXED, MIX_EACH)
        squares += mixed * mixed
    norm = tl.sqrt_rn(tl.sum(squares, 1))
    tl.store(out + row, tl.div_rn(1.0, divisor_of(norm)), mask=here)


@triton.jit(do_not_specialize=["rows"])
def _unit_rows(
    x, x_stride, other, other_stride, mix, inverse_norm, out, rows, width,
    UNIT: tl.constexpr, MIXED: tl.constexpr, MIX_EACH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = row < rows
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    unit, _, _ = mixed_rows(x, x_stride, other, other_stride, mix, row, here, column, width, MIXED, MIX_EACH)
    if not UNIT:
        unit = unit * tl.load(inverse_norm + row, mask=here, other=0.0)[:, None]
    at = out + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(at, unit.to(out.dtype.element_ty), mask=here[:, None] & (column < width)[None, :])


@triton.jit
def along_rows(
    u, x, x_stride, other, other_stride, mix, row, here, first, width,
    MIXED: tl.constexpr, MIX_EACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute <mixed row, u> over the BLOCK columns from `first` on, for u [BLOCK_M, BLOCK]: [BLOCK_M]."""
    column = first + tl.arange(0, BLOCK)
    mixed, _, _ = mixed_rows(x, x_stride, other, other_stride, mix, row, here, column, width, MIXED, MIX_EACH)
    return tl.sum(u * mixed, 1)


@triton.jit
def store_gradient(
    u, along, factor, x, x_stride, other, other_stride, mix, to_x, to_other, row, here, first, width,
    UNIT: tl.constexpr, MIXED: tl.constexpr, MIX_EACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the gradients of x and other for some columns; return what these columns add to the gradient of mix.

    The gradient of the mixed rows is factor * (u - along * mixed row). UNIT: the rows have no norm, and it is factor *
    u.
    """
    column = first + tl.arange(0, BLOCK)
    mask = here[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    to_mix = along
    if UNIT and not MIXED:
        gradient = factor[:, None] * u
    else:
        mixed, difference, share = mixed_rows(
            x, x_stride, other, other_stride, mix, row, here, column, width, MIXED, MIX_EACH
        )
        gradient = factor[:, None] * (u if UNIT else u - along[:, None] * mixed)
        if MIXED:
            to_mix = tl.sum(gradient * difference, 1)
            tl.store(to_other + at, (share[:, None] * gradient).to(to_other.dtype.element_ty), mask=mask)
            gradient = (1 - share)[:, None] * gradient
    tl.store(to_x + at, gradient.to(to_x.dtype.element_ty), mask=mask)
    return to_mix


@triton.jit
def norm_factors(along, scale, inverse_norm, dot, row, here, UNIT: tl.constexpr, DOT: tl.constexpr):
    """Compute `along` and `factor` of store_gradient from <mixed row, u>, and store <row of the logits, u>."""
    factor = tl.zeros_like(along) + scale
    if not UNIT:
        inverse = tl.load(inverse_norm + row, mask=here, other=0.0)
        along = along * inverse
    if DOT:
        tl.store(dot + row, along, mask=here)
    if not UNIT:
        along = along * inverse
        factor = factor * inverse
    return along, factor


@triton.jit(do_not_specialize=["rows"])
def _finish(
    sums, ranges, logit_scale, x, x_stride, other, other_stride, mix, inverse_norm, to_x, to_other, to_mix, dot, rows,
    width,
    RANGED: tl.constexpr, KIND: tl.constexpr, RANGES: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr,
    MIXED: tl.constexpr, MIX_EACH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    u = tl.load(sums + row.to(tl.int64)[:, None] * width + column[None, :], mask=mask, other=0.0)
    if RANGED:
        u = u / range_factor(ranges, KIND, RANGES)
    scale = tl.load(logit_scale).to(tl.float32)
    here = row < rows
    along = tl.zeros([BLOCK_M], tl.float32)
    if DOT or not UNIT:
        along = along_rows(u, x, x_stride, other, other_stride, mix, row, here, 0, width, MIXED, MIX_EACH, BLOCK_D)
    along, factor = norm_factors(along, scale, inverse_norm, dot, row, here, UNIT, DOT)
    mixes = store_gradient(
        u, along, factor, x, x_stride, other, other_stride, mix, to_x, to_other, row, here, 0, width, UNIT, MIXED,
        MIX_EACH, BLOCK_D,
    )  # fmt: skip
    if MIXED:
        tl.store(to_mix + row, mixes, mask=here)


@dataclass(frozen=True)
class Gradients:
    """The gradients of a side's x, other and mix; empty where it has none.

    `sums` says that x has instead the gradient with respect to the rows of the logits, in float32.
    """

    x: Tensor
    other: Tensor
    mix: Tensor
    sums: bool = False

    @staticmethod
    def of(side: Side, needed: bool, sums: bool = False) -> Gradients:
        """Allocate the gradients."""
        x, mixed, wide = side.x, needed and not sums and side.other is not None, torch.float32
        dtype = wide if sums or not needed else x.dtype
        return Gradients(
            torch.empty(x.shape if needed else (0,), dtype=dtype, device=x.device),
            torch.empty(x.shape if mixed else (0,), dtype=dtype, device=x.device),
            torch.empty(x.shape[0] if mixed else 0, dtype=wide, device=x.device),
            sums,
        )

    def flags_of(self, side: Side) -> tuple[bool, bool]:
        """Return whether these gradients pass no norm (UNIT of kernels), and whether they pass a mix (MIXED)."""
        return self.sums or side.inverse_norm is None, side.other is not None and not self.sums

    def finish(self, side: Side, sums: Tensor, logit_scale: Tensor, ranges: Tensor | None, dot: Tensor | None) -> None:
        """Compute the gradients from sums (N, D), which carry the range factor of the queries' inverse norms."""
        rows, width = side.x.shape
        unit, mixed = self.flags_of(side)
        chosen = configuration(OP, "finish", size_class(width, 1024), architecture_of(sums))
        _finish[(triton.cdiv(rows, chosen.blocks["BLOCK_M"]),)](
            sums, sums if ranges is None else ranges, logit_scale, *side.sources,
            sums if side.inverse_norm is None else side.inverse_norm, self.x, self.other, self.mix,
            sums if dot is None else dot, rows, width,
            RANGED=ranges is not None, KIND=2, RANGES=RANGES, UNIT=unit, DOT=dot is not None, MIXED=mixed,
            MIX_EACH=side.flags["MIX_EACH"], BLOCK_D=max(64, triton.next_power_of_2(width)), **chosen.launch,
        )  # fmt: skip


def inverse_norms(x: Tensor, other: Tensor | None, mix: Tensor | None) -> Tensor:
    """Launch the inverse norms (N,) of the mixed rows, in float32."""
    side = Side.of(x, other, mix, None)
    rows, width = x.shape
    out = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        blocks = row_configuration("rows", width, x)
        _inverse_norms[(triton.cdiv(rows, blocks.blocks["BLOCK_M"]),)](
            *side.sources, out, rows, width, **side.flags, **blocks.launch
        )
    return out


def compilations() -> list[Compilation]:
    """List the kernels of rows for every dtype, plain and mixed."""
    found = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        element = triton_type(dtype)
        for width in ("64", "128", "256"):
            for mixed in (False, True):
                name = f"{element}_{width}{'_mixed' if mixed else ''}"
                flags, chosen = {"MIXED": mixed, "MIX_EACH": mixed}, configuration(OP, "rows", width, 80)
                found.append(compilation(f"inverse_norms_{name}", _inverse_norms, flags, chosen, "x other", element))
                flags = {**flags, "UNIT": False}
                found.append(compilation(f"unit_rows_{name}", _unit_rows, flags, chosen, "x other out", element))
        for block in (64, 256, 1024, 2048):
            constants = {
                "RANGED": dtype == torch.float16, "KIND": 2, "RANGES": RANGES, "UNIT": False, "DOT": True,
                "MIXED": True, "MIX_EACH": True, "BLOCK_D": block,
            }  # fmt: skip
            chosen = configuration(OP, "finish", size_class(block, 1024), 80)
            found.append(
                compilation(f"finish_{element}_{block}", _finish, constants, chosen, "x other to_x to_other", element)
            )
    return found
