"""varlen_attention by other packages: flash-attn 3 and 2, PyTorch's varlen_attn and xFormers.

The packages are looked up without being imported; the first call imports one. Cases that their kernels leave undefined
are handled here, so that each keeps the contract of the op: a query that sees no key gives 0 and takes no gradient, a
key that no query sees takes none, and gradients are the same bits every time. `docs/implementations.md` says when each
package is chosen, and why.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from oner_fast.ops import attention_checks
from oner_fast.ops.library import constant

HALF = (torch.float16, torch.bfloat16)
FLASH_ATTN_OLDEST = (2, 7)
TORCH_OLDEST = (2, 13)


@cache
def _find(module: str, distribution: str) -> str | None:
    try:
        if importlib.util.find_spec(module) is None:
            return None
    except (ImportError, ValueError):
        return None
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "?"


@constant
def _version(module: str, distribution: str) -> str | None:
    """Return the version of an installed package ("?" if it states none), or None; looked up once a process."""
    return _find(module, distribution)


@constant
def _capability() -> tuple[int, int] | None:
    """Return the compute capability of the current GPU, or None where torch can use no GPU."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def _older(version: str, oldest: tuple[int, int]) -> bool:
    numbers = version.split("+")[0].split(".")[:2]
    return all(number.isdigit() for number in numbers) and tuple(map(int, numbers)) < oldest


def _why_no_gpu(device: str, least: tuple[int, int], most: tuple[int, int] = (99, 9)) -> list[str]:
    if device != "cuda":
        return []
    capability = _capability()
    if capability is None:
        return ["torch can use no CUDA GPU"]
    if not least <= capability <= most:
        wanted = f"sm_{least[0]}{least[1]}" + ("" if most[0] == 99 else f" to sm_{most[0]}{most[1]}")
        return [
            f"needs a GPU of {wanted}{' or newer' if most[0] == 99 else ''}, this is sm_{capability[0]}{capability[1]}"
        ]
    return []


def why_no_dropout(device: str = "", **facts: Any) -> list[str]:
    """List why a package cannot take a call that drops weights: it draws them in a way of its own."""
    if not facts.get("dropout_p"):
        return []
    return [f"drops other weights than oner_fast does: dropout_p must be 0, got {facts['dropout_p']}"]


def _why_not_these_tensors(facts: dict[str, Any]) -> list[str]:
    """List why the flash kernels cannot take this dtype, head dimension, scale, dropout or call without lengths."""
    found = why_no_dropout(**facts)
    if facts.get("dtype") not in (None, *HALF):
        found.append(f"takes float16 and bfloat16, not {facts['dtype']}")
    head_dim = facts.get("head_dim")
    if head_dim is not None and (head_dim % 8 or head_dim == 0 or head_dim > 256):
        found.append(f"takes head dimensions that are multiples of 8 up to 256, not {head_dim}")
    if facts.get("scale") is not None and not facts["scale"] > 0:
        found.append(f"takes the maximum before it scales: scale must be positive, got {facts['scale']}")
    for name in ("max_seqlen_q", "max_seqlen_k"):
        if name in facts and facts[name] is None:
            found.append(f"needs {name}= on the host, or it would have to wait for the device to read it")
    return found


def why_not_flash_attn_3(device: str, **facts: Any) -> list[str]:
    """List every reason why flash-attn 3 cannot take a call on `device` with these facts."""
    version = _version("flash_attn_interface", "flash_attn_3")
    found = [] if version else ["flash-attn 3 is not installed (hopper/ of github.com/Dao-AILab/flash-attention)"]
    return [*found, *_why_no_gpu(device, (9, 0), (9, 0)), *_why_not_these_tensors(facts)]


def why_not_flash_attn(device: str, **facts: Any) -> list[str]:
    """List every reason why flash-attn 2 cannot take a call on `device` with these facts."""
    version = _version("flash_attn", "flash-attn")
    found = [] if version else ["flash-attn is not installed (pip install --no-build-isolation flash-attn)"]
    if version and _older(version, FLASH_ATTN_OLDEST):
        found.append(f"flash-attn {version} is older than 2.7, which torch.compile can trace")
    return [*found, *_why_no_gpu(device, (8, 0)), *_why_not_these_tensors(facts)]


def why_not_torch_varlen(device: str, **facts: Any) -> list[str]:
    """List every reason why PyTorch's varlen_attn cannot take a call on `device` with these facts."""
    version = str(torch.__version__)
    found = []
    if _older(version, TORCH_OLDEST):
        found.append(f"torch {version} is older than 2.13, whose varlen_attn takes scale and grouped heads")
    elif _version("torch.nn.attention.varlen", "torch") is None:
        found.append("this torch has no torch.nn.attention.varlen")
    if device == "cuda" and not torch.backends.cuda.is_flash_attention_available():
        found.append("torch was built without flash attention")
    return [*found, *_why_no_gpu(device, (8, 0)), *_why_not_the_same_bits(facts), *_why_not_these_tensors(facts)]


def why_not_xformers(device: str, **facts: Any) -> list[str]:
    """List every reason why xFormers cannot take a call on `device` with these facts."""
    found = (
        [] if _version("xformers", "xformers") else ["xformers is not installed (pip install 'oner_fast[xformers]')"]
    )
    found += _why_no_gpu(device, (7, 0))
    if torch.compiler.is_compiling() or (device == "cuda" and _capturing()):
        found.append("its masks are made of lengths on the host, which no graph can wait for")
    found += [*_why_not_the_same_bits(facts), *why_no_dropout(**facts)]
    dtype, head_dim = facts.get("dtype"), facts.get("head_dim")
    if dtype not in (None, torch.float32, *HALF):
        found.append(f"takes float32, float16 and bfloat16, not {dtype}")
    elif dtype is not None and head_dim is not None and (head_dim * dtype.itemsize % 16 or head_dim == 0):
        found.append(f"takes rows of whole 16 bytes, not of {head_dim} numbers of {dtype}")
    if facts.get("scale") is not None and not facts["scale"] > 0:
        found.append(f"takes the maximum before it scales: scale must be positive, got {facts['scale']}")
    return found


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _why_not_the_same_bits(facts: dict[str, Any]) -> list[str]:
    if facts.get("needs_grad") and not torch.are_deterministic_algorithms_enabled():
        return ["adds gradients in any order unless torch.use_deterministic_algorithms(True)"]
    return []


class _WithoutGradient(torch.autograd.Function):
    """Return x unchanged, and give its rows `dropped` a gradient of 0 whatever comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(dropped)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.masked_fill(ctx.saved_tensors[0][:, None, None], 0), None


def _rows_without_partner(cu_seqlens: Tensor, others: Tensor, rows: int, causal: bool) -> Tensor:
    """Mark the queries without a key, or the keys without a query: (rows,) bool, on the device of the tensors."""
    row = torch.arange(rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
    met = others.diff()[sequence]
    if not causal:
        return met == 0
    return row - cu_seqlens[sequence] + met - cu_seqlens.diff()[sequence] < 0


def _zero_without_keys(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, causal: bool,
) -> Tensor:  # fmt: skip
    """Call `attend(query, key, value, cu_seqlens_k)`, with zeros for queries that see no key."""
    if query.numel() == 0 or key.numel() == 0:
        return query.masked_fill(torch.ones_like(query, dtype=torch.bool), 0)
    if cu_seqlens_k is None:
        return attend(query, key, value, cu_seqlens_q)
    without_keys = _rows_without_partner(cu_seqlens_q, cu_seqlens_k, query.shape[0], causal)
    without_queries = _rows_without_partner(cu_seqlens_k, cu_seqlens_q, key.shape[0], False)
    query = _WithoutGradient.apply(query, without_keys)
    key, value = _WithoutGradient.apply(key, without_queries), _WithoutGradient.apply(value, without_queries)
    return attend(query, key, value, cu_seqlens_k).masked_fill(without_keys[:, None, None], 0)


def _check_and_call(
    attend: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """Check the arguments and call `attend(query, key, value, cu_q, cu_k, max_q, max_k, scale)`."""
    attention_checks.varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, scale)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    longest_q = query.shape[0] if max_seqlen_q is None else max_seqlen_q
    longest_k = longest_q if cu_seqlens_k is None else key.shape[0] if max_seqlen_k is None else max_seqlen_k

    def on(query: Tensor, key: Tensor, value: Tensor, cu_k: Tensor) -> Tensor:
        result = attend(query, key, value, cu_seqlens_q, cu_k, longest_q, longest_k, scale)
        return result[0] if isinstance(result, tuple) else result

    return _zero_without_keys(on, query, key, value, cu_seqlens_q, cu_seqlens_k, causal)


def flash_attn_3(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = None, *,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, causal: bool = False, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attend with flash-attn 3; arguments and result are those of `oner_fast.ops.varlen_attention`."""
    package = importlib.import_module("flash_attn_interface")

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, most_q: int, most_k: int, by: float) -> Any:
        return package.flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, most_q, most_k, softmax_scale=by, causal=causal, deterministic=True
        )

    return _check_and_call(
        attend, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale
    )  # fmt: skip


def flash_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = None, *,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, causal: bool = False, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attend with flash-attn 2; arguments and result are those of `oner_fast.ops.varlen_attention`."""
    package = importlib.import_module("flash_attn")

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, most_q: int, most_k: int, by: float) -> Any:
        return package.flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, most_q, most_k, dropout_p=0.0, softmax_scale=by, causal=causal, deterministic=True
        )

    return _check_and_call(
        attend, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale
    )  # fmt: skip


def torch_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = None, *,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, causal: bool = False, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attend with PyTorch's varlen_attn; arguments and result are those of `oner_fast.ops.varlen_attention`."""
    package = importlib.import_module("torch.nn.attention.varlen")

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, most_q: int, most_k: int, by: float) -> Any:
        return package.varlen_attn(
            q, k, v, cu_q, cu_k, most_q, most_k, scale=by, window_size=(-1, 0) if causal else (-1, -1),
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip

    return _check_and_call(
        attend, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale
    )  # fmt: skip


def xformers(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = None, *,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, causal: bool = False, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attend with xFormers; arguments and result are those of `oner_fast.ops.varlen_attention`.

    Only sequences and queries that have a key are passed on, as xFormers' causal mask allows no query before the first
    key.
    """
    attention_checks.varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, scale)
    package = importlib.import_module("xformers.ops")
    masks = importlib.import_module("xformers.ops.fmha.attn_bias")
    cu_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    pairs = list(zip(cu_seqlens_q.diff().tolist(), cu_k.diff().tolist(), strict=True))
    meeting = [(min(lq, lk) if causal else lq, lk) for lq, lk in pairs if lq and lk]
    if not meeting or query.numel() == 0:
        return query.masked_fill(torch.ones_like(query, dtype=torch.bool), 0)
    mask = masks.BlockDiagonalMask.from_seqlens([lq for lq, _ in meeting], [lk for _, lk in meeting])
    if causal:
        mask = mask.make_causal_from_bottomright()
    every = all(lq and lk and (lq <= lk or not causal) for lq, lk in pairs)
    queries_with_keys = None if every else ~_rows_without_partner(cu_seqlens_q, cu_k, query.shape[0], causal)
    keys_with_queries = None if every else ~_rows_without_partner(cu_k, cu_seqlens_q, key.shape[0], False)
    group = query.shape[1] // key.shape[1]
    q = query if queries_with_keys is None else query[queries_with_keys]
    k, v = (x if keys_with_queries is None else x[keys_with_queries] for x in (key, value))
    k, v = (x if group == 1 else x.repeat_interleave(group, 1) for x in (k, v))
    out = package.memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask, scale=scale)[0]
    return out if queries_with_keys is None else query.new_zeros(query.shape).index_put((queries_with_keys,), out)
