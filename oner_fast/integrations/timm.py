"""timm's patch dropout and attention on the fused ops: `oner_fast.integrations.timm.patch()`.

timm's own forward passes run. Only the function that gathers the kept patches and the function that computes attention
are replaced, so that state dicts, pickles and every option of the layers stay as they are.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from oner_fast.integrations.fallback import forget
from oner_fast.integrations.replaced import Replaced
from oner_fast.integrations.scaled_dot_product import functional
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
_replaced = Replaced()


def patch(patch_dropout: bool = True, attention: bool = True) -> Replaced:
    """Let timm's layers compute with the fused ops, in models that exist already and in those made later.

    A second call replaces the first. Layers whose `fused_attn` is False keep timm's own softmax, since that is how its
    attention weights are read.

    Args:
        patch_dropout: gather the kept patches of `PatchDropout` and `PatchDropoutWithIndices` by `masked_gather`. The
            random numbers and the results are timm's, bit for bit.
        attention: compute the attention of `Attention`, `AttentionRope`, `EvaAttention`, `AttentionPoolLatent` and the
            parallel blocks of the vision transformer by `padded_attention`. A call that it does not serve goes to
            PyTorch's, with one warning for each reason.

    Returns:
        A context manager, which ends with `unpatch()`.

    Raises:
        ImportError: timm is too old.
    """
    unpatch()
    forget()
    if patch_dropout:
        layers = importlib.import_module("timm.layers.patch_dropout")
        if not hasattr(layers, "patch_dropout_forward"):
            raise ImportError("this timm has no patch_dropout_forward to replace; install timm 1.0.20 or newer")
        forward = _patch_dropout(layers.patch_dropout_forward)
        for name in _PATCH_DROPOUT:
            _replaced.put(importlib.import_module(name), "patch_dropout_forward", forward)
    if attention:
        replacement = functional()
        for name in _ATTENTION:
            _replaced.put(importlib.import_module(name), "F", replacement)
    return _replaced


def unpatch() -> None:
    """Put back what `patch` replaced: the same objects."""
    _replaced.undo()


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
