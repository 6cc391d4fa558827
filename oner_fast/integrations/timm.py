"""timm's patch dropout and attention on the fused ops: `oner_fast.integrations.timm.patch()`.

timm's own forward passes run. Only the function that gathers the kept patches and the function that computes attention
are replaced, so that state dicts, pickles and every option of the layers stay as they are.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oner_fast.integrations.scaled_dot_product import with_our_attention
from oner_fast.integrations.swaps import Swap, Swapped, Swaps
from oner_fast.models.optional_packages import optional_package
from oner_fast.ops import masked_gather

PatchDropoutForward = Callable[[Tensor, float, int, bool, bool], tuple[Tensor, Tensor | None]]

# Attention, AttentionRope and the pooling by attention; the blocks of the plain, parallel and EVA transformers.
_ATTENTION = (
    "timm.layers.attention",
    "timm.layers.attention_pool",
    "timm.models.eva",
    "timm.models.vision_transformer",
)
_PATCH_DROPOUT = ("timm.layers.patch_dropout", "timm.layers")

optional_package("timm")
_swaps = Swaps("timm")


def patch(patch_dropout: bool = True, attention: bool = True) -> Swapped:
    """Let timm's layers compute with the fused ops, in models that exist already and in those made later.

    Calling it again swaps what is not swapped yet. A `with` block puts back at its end what its own call swapped.
    Layers whose `fused_attn` is False keep timm's own softmax, since that is how its attention weights are read.

    Args:
        patch_dropout: gather the kept patches of `PatchDropout` and `PatchDropoutWithIndices` by `masked_gather`. The
            random numbers and the results are timm's, bit for bit.
        attention: compute the attention of `Attention`, `AttentionRope`, `EvaAttention`, `AttentionPoolLatent` and the
            parallel blocks of the vision transformer by `padded_attention`. A call that it does not serve goes to
            PyTorch's, with one warning for each reason.

    Returns:
        A context manager that puts back what this call swapped.

    Raises:
        RuntimeError: the installed timm has no such function, or one of other arguments; nothing is swapped.
    """
    swaps: list[Swap] = []
    if patch_dropout:
        swaps += _swaps_of(_PATCH_DROPOUT, "patch_dropout_forward", _patch_dropout)
    if attention:
        swaps += _swaps_of(_ATTENTION, "F", with_our_attention)
    return _swaps.replace(swaps)


def unpatch() -> None:
    """Put all of timm's own objects back, the same ones; nothing happens where nothing is swapped.

    Raises:
        RuntimeError: someone else replaced one of them after `patch()`; nothing is put back.
    """
    _swaps.put_back()


def _swaps_of(modules: tuple[str, ...], name: str, make: Callable[[Any], Any]) -> list[Swap]:
    return [Swap(importlib.import_module(module), name, make, f"{module}.{name}") for module in modules]


def _patch_dropout(original: PatchDropoutForward) -> PatchDropoutForward:
    """Return timm's function with another gather: it draws rows of indices, by which one op gathers the tokens."""

    def patch_dropout_forward(
        x: Tensor, prob: float, num_prefix_tokens: int, ordered: bool, training: bool
    ) -> tuple[Tensor, Tensor | None]:
        if torch.jit.is_scripting():
            return original(x, prob, num_prefix_tokens, ordered, training)
        else:
            return _drop(original, x, prob, num_prefix_tokens, ordered, training)

    return patch_dropout_forward


def _drop(
    original: PatchDropoutForward, x: Tensor, prob: float, num_prefix_tokens: int, ordered: bool, training: bool
) -> tuple[Tensor, Tensor | None]:
    dropped = training and prob != 0 and isinstance(x, Tensor) and x.ndim == 3 and x.is_floating_point()
    if not dropped:
        return original(x, prob, num_prefix_tokens, ordered, training)
    tokens = torch.arange(x.shape[1], device=x.device).view(1, -1, 1).expand(x.shape[0], -1, 1)
    rows, kept = original(tokens, prob, num_prefix_tokens, ordered, training)
    return masked_gather(x, rows.squeeze(2)), kept
