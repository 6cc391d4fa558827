"""Checks of the arguments of every op, made before any work is done.

Shapes and dtypes are checked on every device. Values (indices, `cu_seqlens`) are checked on the CPU, and on CUDA only
where `ONER_FAST_DEBUG=1`: reading them back would wait for the stream and break graph capture. A tensor that scales or
mixes is never read. `oner_fast.ops.values` says where a tensor has no values at all.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from oner_fast.ops.values import readable, under_autocast

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)
_DTYPES = "float32, float16, bfloat16 or float64"
_INT32 = torch.iinfo(torch.int32)


def is_tensor(op: str, name: str, value: object) -> Tensor:
    """Return `value`, or raise TypeError where it is no tensor, or a tensor without strides."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        _refuse_layout(op, name, value)
    return value


def _refuse_layout(op: str, name: str, value: Tensor) -> None:
    if value.is_nested:
        raise TypeError(f"{op}: {name} must be a dense tensor, got a nested tensor; pack its rows by cu_seqlens")
    raise TypeError(f"{op}: {name} must be a dense tensor, got {value.layout}; pass {name}.to_dense()")


def number(op: str, name: str, value: object, needed: str = "a number") -> None:
    """Raise unless `value` is a Python number that a finite float holds; of a symbolic one, only what is known."""
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be {needed}, got {type(value).__name__}")
    if not (_finite_in_a_graph(value) if torch.compiler.is_compiling() else abs(value) <= sys.float_info.max):
        raise ValueError(f"{op}: {name} must be a finite number, got {_shown(value)}")


def _finite_in_a_graph(value: float) -> bool:
    """Return whether a number that torch.compile traces is finite; true of one that is known only when the graph runs.

    torch.compile traces no `math.isfinite` of a number that may change from call to call.
    """
    from torch.fx.experimental.symbolic_shapes import guard_or_true  # imports SymPy, which is slow

    return guard_or_true(abs(value) <= sys.float_info.max)


def flag(op: str, name: str, value: object) -> None:
    """Raise TypeError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {type(value).__name__}")


def whole(op: str, name: str, value: object, least: int = 0, bits: int = 63) -> None:
    """Raise unless `value` is an int in [least, 2^bits)."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {_shown(value)}")
    if isinstance(value, int) and value.bit_length() > bits:
        raise ValueError(f"{op}: {name} must be less than 2^{bits}, got {_shown(value)}")


def _shown(value: object) -> str:
    """Write a number; one of thousands of digits by its size, as Python refuses to write it."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an int of {value.bit_length()} bits"
    return str(value)


def shape(op: str, name: str, tensor: Tensor, expected: str, sizes: tuple[int | None, ...]) -> None:
    """Raise ValueError unless `tensor` has these sizes (None: any); the message describes them by `expected`."""
    found = tensor.shape
    if len(found) == len(sizes):
        for want, got in zip(sizes, found, strict=True):
            if want is not None and want != got:
                break
        else:
            return
    needed = ", ".join("*" if size is None else str(size) for size in sizes) + ("," if len(sizes) == 1 else "")
    raise ValueError(f"{op}: {name} must have shape {expected} = ({needed}), got {tuple(found)}")


def floating(op: str, name: str, tensor: Tensor, like: torch.dtype | None = None) -> None:
    """Raise TypeError unless `tensor` has a floating dtype that the ops know, and the dtype `like` where given."""
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be {_DTYPES}, got {tensor.dtype}")
    if like is not None and tensor.dtype != like:
        raise TypeError(f"{op}: {name} must have dtype {like} like the first argument, got {tensor.dtype}")


def same_device(op: str, first_name: str, first: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on the device of the first."""
    device = first.device
    for name, tensor in others.items():
        if isinstance(tensor, Tensor) and tensor.device != device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} but {first_name} is on {first.device}; move one of them"
            )


def cu_seqlens(op: str, name: str, tensor: Tensor, total: int | None, batch: int | None = None) -> None:
    """Raise unless `tensor` is (B + 1,) int32 or int64, begins with 0, never decreases, and ends with `total`."""
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{op}: {name} must be int32 or int64, got {tensor.dtype}; "
            "oner_fast.ops.boundaries(counts) makes them of the numbers of rows"
        )
    if tensor.ndim != 1 or tensor.shape[0] < 1:
        raise ValueError(f"{op}: {name} must have shape (B + 1,), got {tuple(tensor.shape)}")
    if batch is not None and tensor.shape[0] != batch + 1:
        raise ValueError(f"{op}: {name} must have shape (B + 1,) = ({batch + 1},), got {tuple(tensor.shape)}")
    known = readable(tensor)
    if known is None:
        return
    for values in [known.tolist()] if known.ndim == 1 else known.flatten(0, -2).tolist():
        if values[0] != 0:
            raise ValueError(f"{op}: {name} must begin with 0, got {values[0]}")
        if any(later < earlier for earlier, later in zip(values, values[1:], strict=False)):
            raise ValueError(f"{op}: {name} must never decrease, got {values[:8]}{'...' if len(values) > 8 else ''}")
        if total is not None and values[-1] != total:
            raise ValueError(f"{op}: {name} must end with the number of packed rows, {total}, got {values[-1]}")


def as_int32(op: str, name: str, cu_seqlens: MaybeTensor) -> MaybeTensor:
    """Cast boundaries of int64 to int32, which the kernels read; return others as they are, to be checked."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int64:
        return cu_seqlens
    known = readable(is_tensor(op, name, cu_seqlens))
    if known is not None and known.numel():
        low, high = (int(value) for value in torch.aminmax(known))
        if low < _INT32.min or high > _INT32.max:
            beyond = low if low < _INT32.min else high
            raise ValueError(f"{op}: {name} must count fewer than 2^31 rows, which int32 holds, got {beyond}")
    return cu_seqlens.to(torch.int32)


def indices(op: str, name: str, tensor: Tensor, upper: int) -> None:
    """Raise unless `tensor` is int64 with values in [0, upper)."""
    if tensor.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be int64, got {tensor.dtype}")
    known = readable(tensor)
    if known is None or known.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(known))
    if low < 0 or high >= upper:
        raise IndexError(f"{op}: {name} must hold values in [0, {upper}), found {low if low < 0 else high}")


def cast_like(first: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, cast other floating dtypes to that of `first`; their gradients come back in their own."""
    if not under_autocast(first):
        return others
    return tuple(
        x.to(first.dtype) if isinstance(x, Tensor) and x.dtype != first.dtype and x.dtype in FLOATING else x
        for x in others
    )


def common_dtype(first: Tensor, *others: Tensor | None) -> torch.dtype | None:
    """Return the dtype that floating tensors are cast to; None where nothing is to cast, or is not a floating tensor.

    It is the widest of their dtypes. Under autocast it is the autocast dtype, unless one of them is float64.
    """
    tensors = [first, *(x for x in others if x is not None)]
    if not all(isinstance(x, Tensor) and x.dtype in FLOATING for x in tensors):
        return None
    dtypes = {x.dtype for x in tensors}
    if under_autocast(first) and torch.float64 not in dtypes:
        wanted = torch.get_autocast_dtype(first.device.type)
    elif len(dtypes) == 1:
        return None
    else:
        wanted = torch.float64 if torch.float64 in dtypes else torch.float32  # two half types have no common one
    return None if dtypes == {wanted} else wanted


def masked_gather(
    tokens: Tensor, kept: Tensor, positions: Tensor | None, prefix: Tensor | None, cu: Tensor | None
) -> None:
    """Check the arguments of `oner_fast.ops.masked_gather`."""
    op = "masked_gather"
    is_tensor(op, "tokens", tokens)
    is_tensor(op, "kept", kept)
    floating(op, "tokens", tokens)
    shape(op, "tokens", tokens, "(B, N, D)", (None, None, None))
    batch, cells, width = tokens.shape
    if positions is not None:
        floating(op, "positions", is_tensor(op, "positions", positions), tokens.dtype)
        shape(op, "positions", positions, "(N, D)", (cells, width))
    if prefix is not None:
        floating(op, "prefix", is_tensor(op, "prefix", prefix), tokens.dtype)
        shape(op, "prefix", prefix, "(P, D)", (None, width))
    same_device(op, "tokens", tokens, kept=kept, positions=positions, prefix=prefix, cu_seqlens=cu)
    _kept(op, kept, batch, cells, cu)


def gather_patches(
    images: Tensor,
    kept: Tensor,
    patch_size: int,
    mean: Tensor | Sequence[float] | None,
    std: Tensor | Sequence[float] | None,
    dtype: torch.dtype | None,
    cu: Tensor | None,
) -> None:
    """Check the arguments of `oner_fast.ops.gather_patches`."""
    op = "gather_patches"
    is_tensor(op, "images", images)
    is_tensor(op, "kept", kept)
    if images.dtype != torch.uint8 and images.dtype not in FLOATING:
        raise TypeError(f"{op}: images must be uint8 or floating, got {images.dtype}")
    shape(op, "images", images, "(B, C, H, W)", (None, None, None, None))
    whole(op, "patch_size", patch_size, least=1)
    batch, channels, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"{op}: the sides of images must be multiples of patch_size {patch_size}, got {height} x {width}"
        )
    if dtype is not None and dtype not in FLOATING:
        got = dtype if isinstance(dtype, torch.dtype) else type(dtype).__name__
        raise TypeError(f"{op}: dtype must be {_DTYPES}, got {got}")
    for name, value in (("mean", mean), ("std", std)):
        if value is not None and (found := _count(op, name, value)) != channels:
            raise ValueError(f"{op}: {name} must hold one number a channel, {channels}, got {found}")
    same_device(op, "images", images, kept=kept, cu_seqlens=cu)
    _kept(op, kept, batch, (height // patch_size) * (width // patch_size), cu)


def _count(op: str, name: str, values: Tensor | Sequence[float]) -> int:
    """Count the numbers of a tensor or a sequence, and check each of a sequence."""
    if isinstance(values, Tensor):
        dtype = is_tensor(op, name, values).dtype
        if dtype not in FLOATING and dtype not in (torch.int64, torch.int32, torch.uint8):
            raise TypeError(f"{op}: {name} must hold {_DTYPES} or integers, got {dtype}")
        return values.numel()
    if hasattr(values, "tolist"):  # an array of NumPy
        values = values.tolist()
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TypeError(f"{op}: {name} must be a tensor or a sequence of numbers, got {type(values).__name__}")
    for value in values:
        number(op, f"each number of {name}", value)
    return len(values)


def _kept(op: str, kept: Tensor, batch: int, cells: int, cu: Tensor | None) -> None:
    if cu is None:
        shape(op, "kept", kept, "(B, K)", (batch, None))
    else:
        shape(op, "kept", kept, "(T,)", (None,))
        cu_seqlens(op, "cu_seqlens", is_tensor(op, "cu_seqlens", cu), kept.shape[0], batch)
    indices(op, "kept", kept, cells)


def masks(op: str, samples: Tensor, step: int | Tensor, *numbers: tuple[str, int]) -> None:
    """Check the arguments of the ops of `oner_fast.ops.patch_masks`, except their ranges."""
    is_tensor(op, "samples", samples)
    if samples.dtype != torch.int64:
        raise TypeError(f"{op}: samples must be int64, got {samples.dtype}")
    shape(op, "samples", samples, "(B,)", (None,))
    if isinstance(step, Tensor):
        if is_tensor(op, "step", step).dtype != torch.int64:
            raise TypeError(f"{op}: step must be an int or a 0-d int64 tensor, got {step.dtype}")
        shape(op, "step", step, "()", ())
        same_device(op, "samples", samples, step=step)
    else:
        whole(op, "step", step)
    for name, value in numbers:
        whole(op, name, value, bits=64)


def counts(op: str, tensor: Tensor) -> None:
    """Check the numbers of rows that `oner_fast.ops.boundaries` adds up."""
    if is_tensor(op, "counts", tensor).dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: counts must be int32 or int64, got {tensor.dtype}")
    shape(op, "counts", tensor, "(B,)", (None,))
    known = readable(tensor)
    if known is None or known.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(known))
    if low < 0:
        raise ValueError(f"{op}: counts must be at least 0, got {low}")
    if high * tensor.shape[0] > _INT32.max:
        total = max(sum(each) for each in known.reshape(-1, tensor.shape[0]).tolist())
        if total > _INT32.max:
            raise ValueError(f"{op}: counts must add up to fewer than 2^31 rows, which int32 holds, got {total}")


def token_alignment(student: Tensor, teacher: Tensor, kept: Tensor | None) -> None:
    """Check the arguments of `oner_fast.ops.token_alignment`."""
    op = "token_alignment"
    floating(op, "student", is_tensor(op, "student", student))
    floating(op, "teacher", is_tensor(op, "teacher", teacher))
    shape(op, "student", student, "(B, K, D)", (None, None, None))
    batch, visible, width = student.shape
    if student.numel() == 0:
        raise ValueError(f"{op}: student must hold at least one token, got shape {tuple(student.shape)}")
    if kept is None:
        shape(op, "teacher", teacher, "(B, K, D)", (batch, visible, width))
    else:
        shape(op, "teacher", teacher, "(B, N, D)", (batch, None, width))
        shape(op, "kept", is_tensor(op, "kept", kept), "(B, K)", (batch, visible))
        indices(op, "kept", kept, teacher.shape[1])
    same_device(op, "student", student, teacher=teacher, kept=kept)
