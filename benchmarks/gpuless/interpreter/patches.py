"""Replacements for functions of Triton's interpreter, with the same names and arguments."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as stock

from oner_fast.benchmarks.gpuless.interpreter.rounding import BFLOAT16, BitMover, round_tf32
from oner_fast.benchmarks.gpuless.interpreter.shadow import Memory
from oner_fast.benchmarks.gpuless.interpreter.state import current, stats

Builder, TensorHandle = stock.InterpreterBuilder, stock.TensorHandle


def numpy_dtype(kind: Any) -> Any:
    """NumPy's dtype of one of Triton's."""
    element = kind.element_ty if isinstance(kind, tl.block_type) else kind
    return BFLOAT16 if element == tl.bfloat16 else current.stock["_get_np_dtype"](kind)


def _wide_floats(*kinds: Any) -> bool:
    return all(kind.scalar.is_floating() and kind.scalar.primitive_bitwidth > 8 for kind in kinds)


def _element_bytes(pointers: Any) -> int:
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


# Casts


def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
    """Cast; NumPy rounds to nearest where Triton's interpreter truncates."""
    with_bfloat16 = tl.bfloat16 in (src.dtype.scalar, dst_type.scalar)
    if _wide_floats(src.dtype, dst_type) or (with_bfloat16 and dst_type.scalar.primitive_bitwidth > 8):
        return TensorHandle(src.data.astype(numpy_dtype(dst_type.scalar)), dst_type.scalar)
    return current.stock["cast_impl"](self, src, dst_type)


def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
    """Cast between floating-point types."""
    if _wide_floats(src.dtype, dst_type) and rounding_mode in (None, stock._ir.ROUNDING_MODE.RTNE):
        return TensorHandle(src.data.astype(numpy_dtype(dst_type.scalar)), dst_type.scalar)
    return current.stock["create_fp_to_fp"](self, src, dst_type, rounding_mode)


def get_bf16(self: Any, value: float) -> Any:
    """Make a bfloat16 constant."""
    return TensorHandle(np.array([value], dtype=BFLOAT16), tl.bfloat16)


# Arithmetic


def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """Multiply matrices: float32 operands as TF32, bfloat16 ones in float32."""
    stats.dot_flops += 2 * a.data.size * b.data.shape[-1]
    if a.dtype.scalar == tl.float32 and current.settings.tf32 and str(input_precision).endswith(".TF32"):
        a, b = (TensorHandle(round_tf32(x.data), x.dtype) for x in (a, b))
    if BFLOAT16 in (a.data.dtype, b.data.dtype):
        a, b = (TensorHandle(x.data.astype(np.float32), tl.float32) for x in (a, b))
    return current.stock["create_dot"](self, a, b, d, input_precision, max_num_imprecise_acc)


def counted(name: str) -> Callable[[Any, Any], Any]:
    """Wrap the stock function of that name, so that the numbers passed to it are counted as exponentials."""

    def run(self: Any, arg: Any) -> Any:
        stats.exponentials += arg.data.size
        return current.stock[name](self, arg)

    return run


# Memory


def create_masked_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
    """Load; lanes that are masked off without `other` get NaN, or 0x55 where they hold integers."""
    current.memory.access(self, pointers.data, mask.data, _element_bytes(pointers), "load")
    if current.settings.poison and other is None and not np.asarray(mask.data).all():
        kind = pointers.get_element_ty()
        dtype = numpy_dtype(kind)
        value = np.nan if dtype.kind == "f" or dtype == BFLOAT16 else 0x55
        shape = np.broadcast(pointers.data, np.asarray(mask.data)).shape
        other = TensorHandle(np.full(shape, value, dtype=dtype), kind)
    return current.stock["create_masked_load"](self, pointers, mask, other, *rest, **named)


def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
    """Store."""
    current.memory.access(self, pointers.data, mask.data, _element_bytes(pointers), "store")
    return current.stock["create_masked_store"](self, pointers, value, mask, *rest, **named)


def create_atomic_rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
    """Read, modify and write atomically."""
    current.memory.access(self, pointers.data, mask.data, _element_bytes(pointers), "atomic")
    return current.stock["create_atomic_rmw"](self, op, pointers, value, mask, *rest)


def create_atomic_cas(self: Any, pointers: Any, expected: Any, value: Any, *rest: Any) -> Any:
    """Compare and swap atomically."""
    every = np.ones_like(pointers.data, dtype=bool)
    current.memory.access(self, pointers.data, every, _element_bytes(pointers), "atomic")
    return current.stock["create_atomic_cas"](self, pointers, expected, value, *rest)


# Launches


def set_grid_idx(self: Any, x: int, y: int, z: int) -> Any:
    """Begin the next program; with `shuffle`, programs come in random order."""
    if current.settings.shuffle is not None:
        if (x, y, z) == (0, 0, 0):
            count = int(np.prod(self.grid_dim))
            self.program_order = random.Random(current.settings.shuffle).sample(range(count), count)
        place = self.program_order[np.ravel_multi_index((x, y, z), self.grid_dim)]
        x, y, z = map(int, np.unravel_index(place, self.grid_dim))
    return current.stock["set_grid_idx"](self, x, y, z)


def init_args_hst(self: Any, args_dev: Any, kwargs: Any) -> Any:
    """Copy the arguments of a launch to the host, and make the shadow of their memory."""
    args, named = current.stock["_init_args_hst"](self, args_dev, kwargs)
    current.memory = Memory(list(_tensors_in([*args, *named.values()])))
    return args, named


def call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a launch, and count what it touched."""
    current.memory = None
    try:
        return current.stock["__call__"](self, *args, **kwargs)
    finally:
        if current.memory is not None:
            stats.unique_read_bytes = current.memory.touched("read")
            stats.unique_write_bytes = current.memory.touched("write")


def _tensors_in(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _tensors_in(value)
        elif hasattr(value, "data_ptr"):
            yield stock._unwrap_tensor(value)
        elif hasattr(value, "base"):  # a tensor descriptor
            yield value.base


PATCHES: Mapping[Any, Mapping[str, Any]] = {
    stock: {"_get_np_dtype": numpy_dtype, "_interpreter": BitMover()},
    stock.GridExecutor: {"_init_args_hst": init_args_hst, "__call__": call},
    Builder: {
        "cast_impl": cast_impl,
        "create_fp_to_fp": create_fp_to_fp,
        "get_bf16": get_bf16,
        "create_dot": create_dot,
        "set_grid_idx": set_grid_idx,
        "create_masked_load": create_masked_load,
        "create_masked_store": create_masked_store,
        "create_atomic_rmw": create_atomic_rmw,
        "create_atomic_cas": create_atomic_cas,
        **{name: counted(name) for name in ("create_exp", "create_exp2", "create_log", "create_log2")},
    },
}
