"""The machine's limits: its highest rates of multiplying and of copying.

The limits are timed in turn with the ops, so that both figures of a share come from the same minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from oner_fast.benchmarks.timing import Candidate, Rotation

# Rows, columns and depth of the products that MKL and oneDNN compute fastest, in float32 and in bfloat16.
GEMM_SHAPES = ((4096, 4096, 256), (2304, 768, 3072))
# A GPU needs larger products to reach its best rate.
GEMM_SHAPES_OF_GPUS = ((8192, 8192, 8192), (16384, 3072, 768))
COPY_BYTES = 64 * 2**20
COPY_BYTES_OF_GPUS = 512 * 2**20
# A limit takes longer than a small op, whose rounds should be many.
ROUNDS = 12


@dataclass(frozen=True)
class Limit:
    """A candidate whose rate is a limit of the machine; `work` is the FLOPs ("gemm") or bytes ("copy") of a run."""

    candidate: Candidate
    work: float
    kind: str = "gemm"


def gemm_limits(dtype: torch.dtype, device: str = "cpu") -> list[Limit]:
    """Make PyTorch's fastest products in `dtype`: `torch.mm` at two shapes and, on the CPU, oneDNN's convolution.

    The highest rate is the machine's limit; which product reaches it differs between machines. On the CPU the limits of
    16-bit numbers include float32's, since some processors multiply 16-bit numbers faster once they are widened.
    """
    if device == "cpu" and dtype.itemsize == 2:
        return _products(dtype, device) + _products(torch.float32, device, " widened")
    return _products(dtype, device)


def _products(dtype: torch.dtype, device: str, how: str = "") -> list[Limit]:
    limits = []
    for rows, columns, depth in GEMM_SHAPES if device == "cpu" else GEMM_SHAPES_OF_GPUS:
        left = torch.randn(rows, depth, device=device).to(dtype)
        right = torch.randn(depth, columns, device=device).to(dtype)
        out = torch.empty(rows, columns, dtype=dtype, device=device)

        def multiply(call: int, left: torch.Tensor = left, right: torch.Tensor = right, out: Any = out) -> object:
            return torch.mm(left, right, out=out)

        name = f"limit: mm {rows} x {depth} x {columns}{how}"
        limits.append(Limit(Candidate(name, multiply, most_rounds=ROUNDS), 2.0 * rows * columns * depth))
    if device == "cpu" and torch.backends.mkldnn.is_available():
        limits.append(_onednn_limit(dtype, how))
    return limits


def _onednn_limit(dtype: torch.dtype, how: str) -> Limit:
    """Make a product that is always oneDNN's, a 1 x 1 convolution in channels-last order; `torch.mm` may be MKL's."""
    rows, columns, depth = GEMM_SHAPES[-1]
    image = torch.randn(1, 1, rows, depth).to(dtype).permute(0, 3, 1, 2)
    weight = torch.randn(columns, depth, 1, 1).to(dtype)

    def convolve(call: int) -> object:
        with torch.no_grad():
            return F.conv2d(image, weight)

    name = f"limit: oneDNN {rows} x {depth} x {columns}{how}"
    return Limit(Candidate(name, convolve, most_rounds=ROUNDS), 2.0 * rows * columns * depth)


def copy_limit(device: str = "cpu") -> Limit:
    """Copy between buffers that together exceed the caches; the work counts the bytes read and written."""
    size = COPY_BYTES if device == "cpu" else COPY_BYTES_OF_GPUS

    def pair(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        source = torch.full((size // 4,), float(index), device=device)
        return source, torch.zeros_like(source)

    buffers = Rotation(pair, 2 * size, device=device)

    def copy(call: int) -> object:
        source, target = buffers[call]
        return target.copy_(source)

    return Limit(Candidate("limit: copy", copy, most_rounds=ROUNDS), 2.0 * size, "copy")


def limits(dtype: torch.dtype, kind: str, device: str = "cpu") -> list[Limit]:
    """Make the limits of a `kind`: "gemm" (FLOPs) or "copy" (bytes)."""
    makers: dict[str, Callable[[], list[Limit]]] = {
        "gemm": lambda: gemm_limits(dtype, device),
        "copy": lambda: [copy_limit(device)],
    }
    if kind not in makers:
        raise ValueError(f"kind must be one of {', '.join(makers)}, got {kind!r}")
    return makers[kind]()
