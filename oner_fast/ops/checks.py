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
import torch.distributed as dist
from torch import Tensor

from oner_fast.ops.values import inside_vmap, readable, under_autocast

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


def matrix(op: str, name: str, x: Tensor) -> None:
    """Raise unless `x` is a floating tensor (N, D)."""
    floating(op, name, is_tensor(op, name, x))
    shape(op, name, x, "(N, D)", (None, None))


def rows_of_one_dtype(
    query: Tensor, key: Tensor, query_other: Tensor | None, key_other: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Cast the rows of a contrast to their common dtype; return what is no tensor as it is, to be refused."""
    dtype = common_dtype(query, key, query_other, key_other)
    if dtype is None:
        return query, key, query_other, key_other
    query_other, key_other = (None if x is None else x.to(dtype) for x in (query_other, key_other))
    return query.to(dtype), key.to(dtype), query_other, key_other


def contrast(
    op: str,
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor | float,
    query_other: Tensor | None,
    key_other: Tensor | None,
    mix: Tensor | float,
    partner: Tensor | None,
    partner_weight: Tensor | None,
    logit_bias: Tensor | float | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    total: int | None,
) -> None:
    """Check the arguments of `mixup_info_nce` or `sigmoid_loss`; `total` counts the rows of all ranks (None: no group).

    With a group, `matrix` comes first: the ranks tell each other their numbers of rows.
    """
    matrix(op, "query", query)
    rows, width = query.shape
    if rows == 0 and total in (None, 0):
        raise ValueError(f"{op}: query must hold at least one row, got shape {tuple(query.shape)}")
    for name, tensor in (("key", key), ("query_other", query_other), ("key_other", key_other)):
        if tensor is None and name != "key":
            continue
        floating(op, name, is_tensor(op, name, tensor))
        shape(op, name, tensor, "(N, D)", (rows, width))  # type: ignore[arg-type]
    one_number(op, "logit_scale", logit_scale, query)
    if logit_bias is not None:
        one_number(op, "logit_bias", logit_bias, query)
    if isinstance(mix, Tensor):
        if is_tensor(op, "mix", mix).dtype not in FLOATING:
            raise TypeError(f"{op}: mix must be a number or a floating tensor, got {mix.dtype}")
        if mix.ndim:
            shape(op, "mix", mix, "(N,)", (rows,))
        else:
            _same_device_or_cpu(op, "mix", mix, query)
    else:
        number(op, "mix", mix, "a number or a (N,) tensor")
    if partner_weight is not None and partner is None:
        raise ValueError(f"{op}: partner_weight was given without partner")
    if partner is not None:
        shape(op, "partner", is_tensor(op, "partner", partner), "(N,)", (rows,))
        indices(op, "partner", partner, rows if total is None else total)
    if partner_weight is not None:
        if is_tensor(op, "partner_weight", partner_weight).dtype not in FLOATING:
            raise TypeError(f"{op}: partner_weight must be floating, got {partner_weight.dtype}")
        shape(op, "partner_weight", partner_weight, "(N,)", (rows,))
    for name, ids in (("query_ids", query_ids), ("key_ids", key_ids)):
        if ids is not None:
            shape(op, name, ids, "(N,)", (rows,))
    same_device(
        op, "query", query, key=key, query_other=query_other, key_other=key_other, partner=partner,
        partner_weight=partner_weight, mix=mix if isinstance(mix, Tensor) and mix.ndim else None, query_ids=query_ids,
        key_ids=key_ids,
    )  # fmt: skip


def one_number(op: str, name: str, value: Tensor | float, query: Tensor) -> None:
    """Raise unless `value` is a finite number, or a floating tensor of shape () or (1,), whose value is not read."""
    if not isinstance(value, Tensor):
        number(op, name, value, "a number or a tensor of one number")
        return
    if is_tensor(op, name, value).dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be a number or a floating tensor, got {value.dtype}")
    if value.ndim > 1 or value.numel() != 1:
        raise ValueError(f"{op}: {name} must have shape () or (1,), got {tuple(value.shape)}")
    _same_device_or_cpu(op, name, value, query)


def _same_device_or_cpu(op: str, name: str, value: Tensor, query: Tensor) -> None:
    """Raise ValueError unless a tensor of one number is on the device of the query, or on the CPU."""
    if value.device.type != "cpu":
        same_device(op, "query", query, **{name: value})


def contrast_options(
    op: str, normalized: bool, partner: Tensor | None, query_ids: Tensor | None, key_ids: Tensor | None, same: str,
    group: dist.ProcessGroup | None,
) -> None:  # fmt: skip
    """Check the options of `mixup_info_nce` or `sigmoid_loss` before any rank sends anything."""
    flag(op, "normalized", normalized)
    if not isinstance(same, str):
        raise TypeError(f"{op}: same must be 'positive' or 'ignore', got {type(same).__name__}")
    if same not in ("positive", "ignore"):
        raise ValueError(f"{op}: same must be 'positive' or 'ignore', got {same!r}")
    for name, ids in (("query_ids", query_ids), ("key_ids", key_ids)):
        if ids is not None and is_tensor(op, name, ids).dtype != torch.int64:
            raise TypeError(f"{op}: {name} must be int64, got {ids.dtype}; pass {name}.long()")
    if key_ids is not None and query_ids is None:
        raise ValueError(f"{op}: key_ids was given without query_ids; alone, query_ids serves both sides")
    if query_ids is not None and partner is not None:
        raise ValueError(f"{op}: partner and query_ids both say what the targets of a row are; give one of them")
    if group is None:
        return
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{op}: group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")
    if inside_vmap():
        raise ValueError(f"{op}: group= lets ranks exchange rows, which torch.vmap cannot batch; loop over the batch")


_KINDS_OF_IDS = ("no ids", "same='ignore'", "same='positive'")


def kind_of_ids(query_ids: Tensor | None, same: str) -> int:
    """Return the number by which ranks tell each other what they were given."""
    return 0 if query_ids is None else 1 if same == "ignore" else 2


def ids_of_ranks(op: str, kinds: Sequence[int]) -> None:
    """Raise ValueError on every rank unless all were given ids for the same purpose, or none."""
    if len(set(kinds)) > 1:
        raise ValueError(
            f"{op}: every rank must pass query_ids with the same `same`, or none of them; got "
            + ", ".join(f"{_KINDS_OF_IDS[kind]} on rank {rank}" for rank, kind in enumerate(kinds))
        )


def _heads(op: str, query: Tensor, key: Tensor, value: Tensor, scale: float | None, *, batched: bool) -> None:
    """Check query, key and value, packed (T, H, Dh) or `batched` (B, H, N, Dh), and the scale of the scores."""
    of_query, of_key = ("(B, H, N, Dh)", "(B, Hk, Nk, Dh)") if batched else ("(T, H, Dh)", "(Tk, Hk, Dh)")
    floating(op, "query", is_tensor(op, "query", query))
    shape(op, "query", query, of_query, (None,) * (4 if batched else 3))
    heads, width = query.shape[1], query.shape[-1]
    if width == 0:
        raise ValueError(f"{op}: the heads of query must hold at least one number, got shape {tuple(query.shape)}")
    floating(op, "key", is_tensor(op, "key", key), query.dtype)
    shape(op, "key", key, of_key, (query.shape[0], None, None, width) if batched else (None, None, width))
    floating(op, "value", is_tensor(op, "value", value), query.dtype)
    shape(op, "value", value, of_key, tuple(key.shape))
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"{op}: the heads of key and value must divide the {heads} heads of query, got {key.shape[1]}")
    if scale is not None:
        number(op, "scale", scale)


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, scale: float | None
) -> None:
    """Check the tensors and the scale of `oner_fast.ops.varlen_attention`."""
    op = "varlen_attention"
    _heads(op, query, key, value, scale, batched=False)
    same_device(op, "query", query, key=key, value=value, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    cu_seqlens(op, "cu_seqlens_q", is_tensor(op, "cu_seqlens_q", cu_seqlens_q), query.shape[0])
    if cu_seqlens_k is None:
        if key.shape[0] != query.shape[0]:
            cu_seqlens(op, "cu_seqlens_q (which bounds key too)", cu_seqlens_q, key.shape[0])
    else:
        batch = cu_seqlens_q.shape[0] - 1
        cu_seqlens(op, "cu_seqlens_k", is_tensor(op, "cu_seqlens_k", cu_seqlens_k), key.shape[0], batch)


def padded_attention(
    query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, key_mask: Tensor | None, scale: float | None
) -> None:
    """Check the tensors and the scale of `oner_fast.ops.padded_attention`."""
    op = "padded_attention"
    _heads(op, query, key, value, scale, batched=True)
    batch, keys = key.shape[0], key.shape[2]
    if key_lengths is not None and key_mask is not None:
        raise ValueError(f"{op}: key_lengths and key_mask both say which keys are padding; give one of them")
    if key_lengths is not None:
        if is_tensor(op, "key_lengths", key_lengths).dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: key_lengths must be int32 or int64, got {key_lengths.dtype}")
        shape(op, "key_lengths", key_lengths, "(B,)", (batch,))
    if key_mask is not None:
        if is_tensor(op, "key_mask", key_mask).dtype != torch.bool:
            raise TypeError(f"{op}: key_mask must be bool, True where a key is attended to, got {key_mask.dtype}")
        shape(op, "key_mask", key_mask, "(B, Nk)", (batch, keys))
    same_device(op, "query", query, key=key, value=value, key_lengths=key_lengths, key_mask=key_mask)
    known = None if key_lengths is None else readable(key_lengths)
    if known is not None and known.numel():
        low, high = (int(value) for value in torch.aminmax(known))
        if low < 0 or high > keys:
            raise ValueError(f"{op}: key_lengths must be in [0, {keys}], found {low if low < 0 else high}")


def attention_options(op: str, causal: bool, scale: float | None, **longest: int | None) -> None:
    """Check the options by which an implementation of attention is chosen; `longest` bounds lengths."""
    flag(op, "causal", causal)
    if scale is not None:
        number(op, "scale", scale)
    for name, most in longest.items():
        if most is not None:
            whole(op, name, most)


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
