"""Checks of the arguments of every op, made before any work is done.

Shapes and dtypes are checked on every device. Values (indices, `cu_seqlens`) are always checked on the CPU, and on CUDA
only where `ONER_FAST_DEBUG=1`: reading them back would wait for the stream and break graph capture.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def values_are_checked(tensor: Tensor) -> bool:
    """Return whether the values of an index tensor may be read on the host."""
    if torch.compiler.is_compiling() or tensor.device.type == "meta":
        return False
    return tensor.device.type == "cpu" or os.environ.get("ONER_FAST_DEBUG", "0") == "1"


def is_tensor(op: str, name: str, value: object) -> Tensor:
    """Return `value`, or raise TypeError where it is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    return value


def shape(op: str, name: str, tensor: Tensor, expected: str, sizes: tuple[int | None, ...]) -> None:
    """Raise ValueError unless `tensor` has these sizes (None: any); the message describes them by `expected`."""
    found = tuple(tensor.shape)
    if len(found) != len(sizes) or any(
        want is not None and want != got for want, got in zip(sizes, found, strict=True)
    ):
        needed = ", ".join("*" if size is None else str(size) for size in sizes) + ("," if len(sizes) == 1 else "")
        raise ValueError(f"{op}: {name} must have shape {expected} = ({needed}), got {found}")


def floating(op: str, name: str, tensor: Tensor, like: torch.dtype | None = None) -> None:
    """Raise TypeError unless `tensor` has a floating dtype that the ops know, and the dtype `like` where given."""
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")
    if like is not None and tensor.dtype != like:
        raise TypeError(f"{op}: {name} must have dtype {like} like the first argument, got {tensor.dtype}")


def same_device(op: str, first_name: str, first: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on the device of the first."""
    for name, tensor in others.items():
        if tensor is not None and is_tensor(op, name, tensor).device != first.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} but {first_name} is on {first.device}; move one of them"
            )


def cu_seqlens(op: str, name: str, tensor: Tensor, total: int | None, batch: int | None = None) -> None:
    """Raise unless `tensor` is (B + 1,) int32, begins with 0, never decreases, and ends with `total`."""
    if tensor.dtype != torch.int32:
        raise TypeError(f"{op}: {name} must be int32, got {tensor.dtype}")
    if tensor.ndim != 1 or tensor.shape[0] < 1:
        raise ValueError(f"{op}: {name} must have shape (B + 1,), got {tuple(tensor.shape)}")
    if batch is not None and tensor.shape[0] != batch + 1:
        raise ValueError(f"{op}: {name} must have shape (B + 1,) = ({batch + 1},), got {tuple(tensor.shape)}")
    if not values_are_checked(tensor):
        return
    values = tensor.tolist()
    if values[0] != 0:
        raise ValueError(f"{op}: {name} must begin with 0, got {values[0]}")
    if any(later < earlier for earlier, later in zip(values, values[1:], strict=False)):
        raise ValueError(f"{op}: {name} must never decrease, got {values[:8]}{'...' if len(values) > 8 else ''}")
    if total is not None and values[-1] != total:
        raise ValueError(f"{op}: {name} must end with the number of packed rows, {total}, got {values[-1]}")


def indices(op: str, name: str, tensor: Tensor, upper: int) -> None:
    """Raise unless `tensor` is int64 with values in [0, upper)."""
    if tensor.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be int64, got {tensor.dtype}")
    if not values_are_checked(tensor) or tensor.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(tensor))
    if low < 0 or high >= upper:
        raise IndexError(f"{op}: {name} must hold values in [0, {upper}), found {low if low < 0 else high}")


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
    if not isinstance(patch_size, int) or isinstance(patch_size, bool):
        raise TypeError(f"{op}: patch_size must be an int, got {type(patch_size).__name__}")
    if patch_size < 1:
        raise ValueError(f"{op}: patch_size must be at least 1, got {patch_size}")
    batch, channels, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"{op}: the sides of images must be multiples of patch_size {patch_size}, got {height} x {width}"
        )
    if dtype is not None and dtype not in FLOATING:
        raise TypeError(f"{op}: dtype must be float32, float16, bfloat16 or float64, got {dtype}")
    for name, value in (("mean", mean), ("std", std)):
        if value is None:
            continue
        found = value.numel() if isinstance(value, Tensor) else len(value)
        if found != channels:
            raise ValueError(f"{op}: {name} must hold one number a channel, {channels}, got {found}")
    same_device(op, "images", images, kept=kept, cu_seqlens=cu)
    _kept(op, kept, batch, (height // patch_size) * (width // patch_size), cu)


def _kept(op: str, kept: Tensor, batch: int, cells: int, cu: Tensor | None) -> None:
    if cu is None:
        shape(op, "kept", kept, "(B, K)", (batch, None))
    else:
        shape(op, "kept", kept, "(T,)", (None,))
        cu_seqlens(op, "cu_seqlens", is_tensor(op, "cu_seqlens", cu), kept.shape[0], batch)
    indices(op, "kept", kept, cells)


def mixup_info_nce(
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor | float,
    query_other: Tensor | None,
    key_other: Tensor | None,
    mix: Tensor | float,
    partner: Tensor | None,
    partner_weight: Tensor | None,
    total: int | None,
) -> None:
    """Check the arguments of `oner_fast.ops.mixup_info_nce`; `total` counts the rows of all ranks (None: no group)."""
    op = "mixup_info_nce"
    floating(op, "query", is_tensor(op, "query", query))
    shape(op, "query", query, "(N, D)", (None, None))
    rows, width = query.shape
    if rows == 0 and total in (None, 0):
        raise ValueError(f"{op}: query must hold at least one row, got shape {tuple(query.shape)}")
    for name, tensor in (("key", key), ("query_other", query_other), ("key_other", key_other)):
        if tensor is None and name != "key":
            continue
        floating(op, name, is_tensor(op, name, tensor), query.dtype)
        shape(op, name, tensor, "(N, D)", (rows, width))  # type: ignore[arg-type]
    if isinstance(logit_scale, Tensor):
        if not logit_scale.is_floating_point():
            raise TypeError(f"{op}: logit_scale must be a number or a floating 0-d tensor, got {logit_scale.dtype}")
        shape(op, "logit_scale", logit_scale, "()", ())
    elif isinstance(logit_scale, bool) or not isinstance(logit_scale, (int, float)):
        raise TypeError(f"{op}: logit_scale must be a number or a 0-d tensor, got {type(logit_scale).__name__}")
    if isinstance(mix, Tensor):
        if not mix.is_floating_point():
            raise TypeError(f"{op}: mix must be a number or a floating tensor, got {mix.dtype}")
        if mix.ndim:
            shape(op, "mix", mix, "(N,)", (rows,))
    elif isinstance(mix, bool) or not isinstance(mix, (int, float)):
        raise TypeError(f"{op}: mix must be a number or a (N,) tensor, got {type(mix).__name__}")
    if partner_weight is not None and partner is None:
        raise ValueError(f"{op}: partner_weight was given without partner")
    if partner is not None:
        shape(op, "partner", is_tensor(op, "partner", partner), "(N,)", (rows,))
        indices(op, "partner", partner, rows if total is None else total)
    if partner_weight is not None:
        if not is_tensor(op, "partner_weight", partner_weight).is_floating_point():
            raise TypeError(f"{op}: partner_weight must be floating, got {partner_weight.dtype}")
        shape(op, "partner_weight", partner_weight, "(N,)", (rows,))
    same_device(
        op, "query", query, key=key, query_other=query_other, key_other=key_other, partner=partner,
        partner_weight=partner_weight, mix=mix if isinstance(mix, Tensor) and mix.ndim else None,
    )  # fmt: skip


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, scale: float | None
) -> None:
    """Check the arguments of `oner_fast.ops.varlen_attention`."""
    op = "varlen_attention"
    floating(op, "query", is_tensor(op, "query", query))
    shape(op, "query", query, "(T, H, Dh)", (None, None, None))
    _, heads, width = query.shape
    floating(op, "key", is_tensor(op, "key", key), query.dtype)
    shape(op, "key", key, "(Tk, Hk, Dh)", (None, None, width))
    floating(op, "value", is_tensor(op, "value", value), query.dtype)
    shape(op, "value", value, "(Tk, Hk, Dh)", tuple(key.shape))
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"{op}: the heads of key and value must divide the {heads} heads of query, got {key.shape[1]}")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        raise TypeError(f"{op}: scale must be a number, got {type(scale).__name__}")
    same_device(op, "query", query, key=key, value=value, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    cu_seqlens(op, "cu_seqlens_q", is_tensor(op, "cu_seqlens_q", cu_seqlens_q), query.shape[0])
    if cu_seqlens_k is None:
        cu_seqlens(op, "cu_seqlens_q (which bounds key too)", cu_seqlens_q, key.shape[0])
    else:
        batch = cu_seqlens_q.shape[0] - 1
        cu_seqlens(op, "cu_seqlens_k", is_tensor(op, "cu_seqlens_k", cu_seqlens_k), key.shape[0], batch)


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
