"""open_clip's towers by our ops: its attention and its patch dropout, with its own parameters and its own draws."""

from __future__ import annotations

import math  # noqa: F401  # TorchScript looks up here what the originals' source names
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from oner_fast.integrations.fallback import tell
from oner_fast.integrations.swaps import Function, stands_for
from oner_fast.ops import checks, masked_gather, varlen_attention
from oner_fast.ops.library import constant
from oner_fast.ops.values import is_fake

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def leaves_the_process() -> bool:
    """Whether a model is being traced or exported: what is made of it must not need our package."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def patch_dropout_forward(original: Function) -> Function:
    """Make the forward of PatchDropout by `masked_gather`, from the same draws of the same generator."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if leaves_the_process() or not self.training or self.prob == 0.0:
            kept: Tensor = original(self, x)
            return kept
        if x.ndim != 3 or x.dtype not in checks.FLOATING:
            tell(
                "open_clip.transformer.PatchDropout",
                "its own code",
                f"x is {tuple(x.shape)} {x.dtype}, not floating (B, N, D)",
            )
            kept = original(self, x)
            return kept
        first = int(self.exclude_first_token)
        batch, tokens = x.shape[0], x.shape[1] - first
        count = max(1, int(tokens * (1 - self.prob)))
        index = torch.randn(batch, tokens).topk(count, dim=-1).indices + first
        if first:
            index = F.pad(index, (1, 0))
        return masked_gather(x, index.to(x.device))

    return stands_for(forward, original)


def block_attention(original: Function) -> Function:
    """Make the `attention` of ResidualAttentionBlock by `varlen_attention`, with the parameters of its `attn`."""

    def attention(
        self: Any, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        own = self.attn
        reason = "" if leaves_the_process() else _why_not_block(own, q_x, k_x, v_x, attn_mask)
        if reason is not None:
            if reason:
                tell("open_clip.transformer.ResidualAttentionBlock", "its own code", reason)
            found: Tensor = original(self, q_x, k_x, v_x, attn_mask)
            return found
        query, key, value = _projected(own, q_x, q_x if k_x is None else k_x, q_x if v_x is None else v_x)
        if not own.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        mixed = F.linear(_attend(query, key, value, attn_mask is not None), own.out_proj.weight, own.out_proj.bias)
        return mixed if own.batch_first else mixed.transpose(0, 1)

    return stands_for(attention, original)


def attention_forward(original: Function) -> Function:
    """Make the forward of open_clip's own Attention by `varlen_attention`; norms, scales and projections stay."""

    def forward(self: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        reason = "" if leaves_the_process() else _why_not_attention(self, x, attn_mask)
        if reason is not None:
            if reason:
                tell("open_clip.transformer.Attention", "its own code", reason)
            found: Tensor = original(self, x, attn_mask)
            return found
        packed = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = packed.unbind(2)
        mixed = _attend(self.ln_q(query), self.ln_k(key), value, attn_mask is not None)
        if self.head_scale is not None:
            mixed = (mixed.unflatten(-1, (self.num_heads, -1)) * self.head_scale.squeeze(-1)).flatten(2)
        result: Tensor = self.out_drop(self.out_proj(self.ln_inner(mixed)))
        return result

    return stands_for(forward, original)


def _projected(own: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Project the inputs as MultiheadAttention does, to heads: (..., H, Dh) each."""
    width, heads = own.embed_dim, (own.num_heads, -1)
    weight, bias = own.in_proj_weight, own.in_proj_bias
    if query is key and key is value:
        return F.linear(query, weight, bias).unflatten(-1, (3, *heads)).unbind(-3)
    of_query, of_rest = (None, None) if bias is None else bias.split((width, 2 * width))
    to_query, to_rest = weight.split((width, 2 * width))
    first = F.linear(query, to_query, of_query).unflatten(-1, heads)
    if key is value:
        return first, *F.linear(key, to_rest, of_rest).unflatten(-1, (2, *heads)).unbind(-3)
    biases = (None, None) if of_rest is None else of_rest.chunk(2)
    parts = zip((key, value), to_rest.chunk(2), biases, strict=True)
    return first, *(F.linear(x, w, b).unflatten(-1, heads) for x, w, b in parts)


def _attend(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Attend with query (B, N, H, Dh), key and value (B, M, H, Dh): (B, N, H * Dh)."""
    batch, rows, others = query.shape[0], query.shape[1], key.shape[1]
    boundaries, of_keys = _boundaries(batch, rows, query), None if rows == others else _boundaries(batch, others, query)
    packed = varlen_attention(
        query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), boundaries, of_keys, max_seqlen_q=rows,
        max_seqlen_k=others, causal=causal,
    )  # fmt: skip
    return packed.unflatten(0, (batch, rows)).flatten(2)


def _boundaries(batch: int, length: int, like: Tensor) -> Tensor:
    return torch.arange(batch + 1, dtype=torch.int32, device=like.device) * length


def _why_not_block(
    own: Any, q_x: Tensor, k_x: Tensor | None, v_x: Tensor | None, attn_mask: Tensor | None
) -> str | None:
    """Say why our attention cannot serve a call of a block; None where it can."""
    if type(own) is not nn.MultiheadAttention:
        return f"attn is {type(own).__name__}, not torch.nn.MultiheadAttention"
    if any(getattr(own, name) for name in _HOOKS):
        return "attn has hooks, which its own forward calls"
    if not own._qkv_same_embed_dim or own.bias_k is not None or own.add_zero_attn:
        return "attn has weights by themselves for key and value, bias_k, bias_v or add_zero_attn"
    if own.training and own.dropout > 0:
        return f"attn drops attention weights (dropout {own.dropout})"
    for x in (q_x, k_x, v_x):
        if x is not None and (x.is_nested or x.ndim != 3 or x.dtype not in checks.FLOATING or x.numel() == 0):
            return f"an input is {x.dtype} of {x.ndim} dimensions, nested or empty, not floating (B, N, D)"
    if attn_mask is not None and (k_x is not None or v_x is not None):
        return "keys of another tensor have an attn_mask"
    return _why_not_mask(attn_mask, q_x.shape[1 if own.batch_first else 0])


def _why_not_attention(own: Any, x: Tensor, attn_mask: Tensor | None) -> str | None:
    """Say why our attention cannot serve a call of open_clip's Attention; None where it can."""
    if own.logit_scale is not None:
        return "scaled_cosine attention has a scale for each head"
    if own.training and own.attn_drop.p > 0:
        return f"it drops attention weights (attn_drop {own.attn_drop.p})"
    if x.ndim != 3 or x.dtype not in checks.FLOATING or x.numel() == 0:
        return f"the input is {tuple(x.shape)} {x.dtype}, not floating (B, N, D) or empty"
    return _why_not_mask(attn_mask, x.shape[1])


def _why_not_mask(attn_mask: Tensor | None, length: int) -> str | None:
    if attn_mask is None:
        return None
    if attn_mask.shape != (length, length) or not attn_mask.is_floating_point():
        return f"attn_mask is {attn_mask.ndim}-dimensional {attn_mask.dtype}, not one additive (N, N) for the batch"
    return None if exactly_causal(attn_mask) else "attn_mask is not exactly causal: 0 to the diagonal, -inf behind it"


_answers: dict[tuple[Any, ...], tuple[StorageWeakRef, int, bool]] = {}
_MOST_ANSWERS = 64


@constant
def exactly_causal(mask: Tensor) -> bool:
    """Whether an additive mask (N, N) is 0 up to the diagonal and -inf behind it.

    The answer is kept as long as the mask's memory is, so that a GPU is waited for once. torch.compile reads the mask
    when it traces, and keeps the answer. A tensor without values gives False.
    """
    if mask.is_meta or is_fake(mask):
        return False
    storage = StorageWeakRef(mask.untyped_storage())
    place = (storage.cdata, mask.storage_offset(), *mask.shape, *mask.stride(), mask.dtype)
    version = -1 if mask.is_inference() else mask._version
    known = _answers.get(place)
    if known is not None and known[1] == version >= 0:
        return known[2]
    answer = torch.equal(mask, torch.full_like(mask, float("-inf")).triu_(1))
    if len(_answers) >= _MOST_ANSWERS:
        for old in [key for key, (memory, _, _) in _answers.items() if memory.expired()] or list(_answers):
            del _answers[old]
    _answers[place] = (storage, version, answer)
    return answer
