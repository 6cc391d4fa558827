"""The raw ops in plain PyTorch, for machines on which nothing is compiled.

They have the schemas of the compiled raw ops and keep their promises: the autograd functions save what they save for
those, no buffer grows with the product of two sizes of the inputs, and sums are taken in a fixed order. They work in
parts, with temporary buffers of some `PART_NUMBERS` numbers. One module holds one op.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

PART_NUMBERS = 1 << 22  # numbers in a temporary buffer: the fastest of 1 << 18 to 1 << 24


def parts(count: int, numbers_each: int, least: int = 1) -> Iterator[slice]:
    """Cut `count` items of `numbers_each` numbers into slices of PART_NUMBERS, of at least `least` items."""
    size = max(least, PART_NUMBERS // max(numbers_each, 1))
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def add_rows(to: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add rows (T, ...) to the rows `index` (T,) of `to`, in place and in a fixed order on every device."""
    if to.device.type == "cpu":
        to.index_add_(0, index, rows)
    else:
        to.index_put_((index,), rows, accumulate=True)
