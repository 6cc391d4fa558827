"""Our attention under transformers' models: `oner_fast.integrations.transformers.register()`.

Then `attn_implementation="oner_fast"` chooses it, at `from_pretrained`, at `from_config` or by
`model.set_attn_implementation`. Packed sequences, by `cu_seq_lens_q` or by `position_ids` alone, padding, key-value
caches and grouped heads are served. What is not goes to transformers' own SDPA function, with one warning for each
reason.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from oner_fast.integrations import dense_attention, transformers_masks, transformers_packing
from oner_fast.integrations.fallback import forget, tell
from oner_fast.integrations.swaps import Function, Swap, Swaps, stands_for
from oner_fast.models.optional_packages import optional_package
from oner_fast.ops import varlen_attention

for _name in ("transformers", "transformers.modeling_utils"):  # the second imports torchvision
    optional_package(_name)
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import AttentionMaskInterface  # noqa: E402
from transformers.modeling_utils import AttentionInterface, PreTrainedModel  # noqa: E402

NAME = "oner_fast"
# Arguments that change the result, and that SDPA would pass over in silence.
_SINKS = ("s_aux", "sinks")
_CHOSEN = ("indices", "block_indices")  # of keys, by an indexer: its model makes a mask of them for "sdpa" alone
_project = Swaps("transformers")


class Registered:
    """End the registration when a `with` block is left."""

    def __enter__(self) -> Registered:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unregister()


def register() -> Registered:
    """Make `attn_implementation="oner_fast"` known to transformers; return a context manager that ends with it.

    A model that computes attention by itself, or that transformers does not run by SDPA, keeps its default
    implementation, with one warning that names the model: it could not read our masks.

    Raises:
        RuntimeError: the installed transformers chooses implementations in another way.
    """
    forget()
    name = "get_correct_attn_implementation"
    _project.replace([Swap(PreTrainedModel, name, _choice, f"transformers.PreTrainedModel.{name}")])
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, transformers_masks.make_mask)
    return Registered()


def unregister() -> None:
    """Make the name unknown again; a model that still asks for it raises transformers' KeyError."""
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(NAME, None)
    _project.put_back()


def _choice(original: Function) -> Function:
    """Make the function by which a model checks its implementation: ours needs a model that SDPA serves."""

    def get_correct_attn_implementation(self: Any, requested_attention: str | None, is_init_check: bool = False) -> str:
        if requested_attention == NAME and not (self._supports_sdpa and self._can_set_attn_implementation()):
            reason = "it does not run by SDPA through AttentionInterface, for which our masks are made"
            tell(f"the attention of {type(self).__name__}", "its own code", reason)
            requested_attention = None
        chosen: str = original(self, requested_attention, is_init_check)
        return chosen

    return stands_for(get_correct_attn_implementation, original)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of one layer: transformers' `AttentionInterface` calls this.

    Args:
        module: the layer, whose `is_causal` counts where the argument is None.
        query: (B, H, N, Dh).
        key: (B, Hk, Nk, Dh), those of the cache included.
        value: (B, Hk, Nk, Dh).
        attention_mask: a mask of `oner_fast.integrations.transformers_masks`, or any that SDPA takes.
        dropout: the rate at which attention weights are dropped.
        scaling: the factor of the scores.
        is_causal: whether a position sees only itself and what is before it, where no mask says so.
        others: `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`, `max_length_k`, `position_ids` and options of SDPA.

    Returns:
        (B, N, H, Dh), and None in place of the attention weights.

    Raises:
        ValueError: boundaries come with a mask that hides keys, or the layer has attention sinks, or keys that an
            indexer chose.
    """
    for names, what, other in ((_SINKS, "attention sinks", "eager"), (_CHOSEN, "keys that an indexer chose", "sdpa")):
        if any(others.get(name) is not None for name in names):
            raise ValueError(f'oner_fast serves no {what}; load this model with attn_implementation="{other}"')
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    boundaries = _boundaries(module, query, key, attention_mask, others)
    numbers = None if boundaries is not None else _numbers(module, query, attention_mask, others)
    reason = dense_attention.why_not(query, key, value) or _why_not(attention_mask, boundaries, others)
    if reason is None and numbers is not None:
        reason = "its packed rows have hidden positions"
    if boundaries is not None:
        causal = is_causal or (attention_mask is not None and attention_mask.dtype == transformers_masks.SEQUENCES)
        if reason is None:
            return _packed(query, key, value, boundaries, causal, dropout, scaling, others), None
        dense_attention.leave_to_pytorch(reason)
        return _packed_by_sdpa(module, query, key, value, boundaries, causal, dropout, scaling, others)
    mask, causal = attention_mask, is_causal and query.shape[2] > 1 and attention_mask is None
    if reason is not None:
        dense_attention.leave_to_pytorch(reason)
        if mask is not None and transformers_masks.is_ours(mask):
            width = mask.shape[3]
            key, value = key[:, :, :width], value[:, :, :width]
            if others.get("position_bias") is not None:
                others["position_bias"] = others["position_bias"][..., :width]
            mask = transformers_masks.pairs(mask, query.shape[2])
        if mask is not None and numbers is not None:
            mask = mask & (numbers[:, None, :, None] == numbers[:, None, None])
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
        )
    keys = None
    if mask is not None:
        keys, causal = mask[:, 0, 0].bool().expand(query.shape[0], -1), mask.dtype == transformers_masks.CAUSAL
        key, value = key[:, :, : keys.shape[1]], value[:, :, : keys.shape[1]]
    elif causal:  # an empty static cache: its later keys are unwritten
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    out = dense_attention.attend(query, key, value, key_mask=keys, causal=causal, scale=scaling, dropout=dropout)
    return out, None


def _why_not(
    mask: Tensor | None, boundaries: tuple[Tensor, Tensor | None] | None, others: dict[str, Any]
) -> str | None:
    if others.get("position_bias") is not None:
        return "it has an additive bias"
    if others.get("softcap") is not None:
        return "it caps its scores"
    if others.get("output_attentions"):
        return "attention weights are asked for"
    if mask is None or boundaries is not None or transformers_masks.is_ours(mask):
        return None
    if mask.dtype != torch.bool:
        return "its mask is an additive bias"
    if others.get("sliding_window") is not None:
        return "it has a sliding window"
    return "its mask differs between queries or heads"


def _boundaries(
    module: torch.nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, others: dict[str, Any]
) -> tuple[Tensor, Tensor | None] | None:
    """Return the boundaries (S + 1,) of the packed sequences, or None where none is packed.

    They are those of the queries and those of the keys, or None for the keys where they are the same.
    """
    given = others.get("cu_seq_lens_q")
    if given is not None:
        _check_alone(module, mask, others)
        of_key = others.get("cu_seq_lens_k")
        return given, None if of_key is given else of_key
    found = None
    if mask is not None and transformers_masks.is_ours(mask) and mask.dtype == transformers_masks.SEQUENCES:
        found = transformers_packing.of_numbers(mask)
    elif mask is None and query.shape[2] == key.shape[2] and not _is_cross(module):
        found = transformers_packing.of_positions(others.get("position_ids"), query.shape[0], query.shape[2])
    return None if found is None else (found, None)


def _numbers(module: torch.nn.Module, query: Tensor, mask: Tensor | None, others: dict[str, Any]) -> Tensor | None:
    """Return the number of each position's sequence (B, N) where positions restart beside a mask, or None.

    transformers' own masks know nothing of the sequences where keys are hidden, or where there is a cache. A mask of
    pairs counts as its own where the layer has a window; another is the caller's, and stands as it is. So does one
    number a key inside torch.compile, where nobody can read whether rows are packed.
    """
    if mask is None or mask.ndim != 4 or mask.shape[3] != query.shape[2] or _is_cross(module):
        return None
    if transformers_masks.is_ours(mask) and mask.dtype != transformers_masks.SEQUENCES:
        seen = mask[:, 0, 0].bool()
        if transformers_packing.unreadable(mask):
            return None
    elif mask.dtype == torch.bool and mask.shape[2] == query.shape[2] and others.get("sliding_window") is not None:
        seen = mask[:, 0].diagonal(dim1=1, dim2=2)
    else:
        return None
    return transformers_packing.numbers_beside(mask, seen, others.get("position_ids"), query.shape[0])


def _is_cross(module: torch.nn.Module) -> bool:
    """Return whether a layer attends to another sequence; a decoder gives it the positions of its queries."""
    return bool(getattr(module, "is_cross_attention", False)) or "cross" in type(module).__name__.lower()


def _check_alone(module: torch.nn.Module, mask: Tensor | None, others: dict[str, Any]) -> None:
    """Raise ValueError where boundaries come with what they cannot be combined with."""
    if _is_cross(module):
        raise ValueError(
            "cu_seq_lens_q reached a cross-attention, whose keys have other boundaries; give padded rows to this model"
        )
    if mask is not None:
        ours = transformers_masks.is_ours(mask)
        if mask.dtype != transformers_masks.SEQUENCES and (ours or not torch.compiler.is_compiling()):
            raise ValueError(
                "cu_seq_lens_q was given together with a mask that hides keys; give packed rows or an attention_mask"
            )
    window, longest = others.get("sliding_window"), others.get("max_length_k")
    if window is not None and not (isinstance(longest, int) and longest <= window):
        raise ValueError(
            f"a sliding window of {window} is not served for cu_seq_lens_q unless max_length_k says that no sequence "
            "is longer; give position_ids alone"
        )


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: tuple[Tensor, Tensor | None],
    causal: bool,
    dropout: float,
    scale: float | None,
    others: dict[str, Any],
) -> Tensor:
    """Compute attention within the packed sequences of (B, H, N, Dh): (B, N, H, Dh)."""
    longest: list[int | None] = [query.shape[2], key.shape[2]]
    if others.get("cu_seq_lens_q") is not None:
        given = others.get("max_length_q"), others.get("max_length_k")
        longest = [x if isinstance(x, int) else None for x in given]
    q, k, v = (dense_attention.rows(x) for x in (query, key, value))
    out = varlen_attention(
        q,
        k,
        v,
        *boundaries,
        max_seqlen_q=longest[0],
        max_seqlen_k=longest[1],
        causal=causal,
        scale=scale,
        dropout_p=dropout,
    )
    return out.view(query.shape[0], query.shape[2], *out.shape[1:])


def _packed_by_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: tuple[Tensor, Tensor | None],
    causal: bool,
    dropout: float,
    scale: float | None,
    others: dict[str, Any],
) -> tuple[Tensor, None]:
    """Compute the same by transformers' SDPA function, as one row with a mask of all its pairs."""
    if others.get("position_bias") is not None and query.shape[0] > 1:
        raise ValueError(
            f"{query.shape[0]} rows of packed sequences come with an additive bias; oner_fast serves one row of them"
        )
    q, k, v = (dense_attention.rows(x).transpose(0, 1)[None] for x in (query, key, value))
    mask = transformers_packing.sequence_pairs(*boundaries, q.shape[2], k.shape[2], causal)
    out, _ = sdpa_attention_forward(module, q, k, v, mask, dropout=dropout, scaling=scale, is_causal=False, **others)
    return out.view(query.shape[0], query.shape[2], *out.shape[2:]), None
