"""open_clip with our ops: `patch()` swaps its losses, its patch dropout and its attention; `unpatch()` swaps back.

`import oner_fast.integrations.open_clip; oner_fast.integrations.open_clip.patch()` is the one line.

What is swapped are functions of open_clip's classes: modules, parameters, state dicts and pickles stay open_clip's, and
models that exist already are served as well. A call that our ops cannot serve goes to open_clip's own code, with one
warning that names the reason.
"""

from __future__ import annotations

from oner_fast.integrations.open_clip_losses import (
    ClipLoss,
    CoCaLoss,
    DistillClipLoss,
    clip_forward,
    distill_forward,
)
from oner_fast.integrations.open_clip_siglip import SigLipLoss, siglip_forward
from oner_fast.integrations.open_clip_towers import attention_forward, block_attention, patch_dropout_forward
from oner_fast.integrations.swaps import Swap, Swapped, Swaps
from oner_fast.models.optional_packages import optional_package

_losses, _towers = optional_package("open_clip").loss, optional_package("open_clip").transformer
_swaps = Swaps("open_clip")

# CoCaLoss calls the forward of ClipLoss for its contrastive half.
_LOSSES = (
    Swap(_losses.ClipLoss, "forward", clip_forward, "open_clip.loss.ClipLoss"),
    Swap(_losses.DistillClipLoss, "forward", distill_forward, "open_clip.loss.DistillClipLoss"),
    Swap(_losses.SigLipLoss, "forward", siglip_forward, "open_clip.loss.SigLipLoss"),
)
_PATCH_DROPOUT = (Swap(_towers.PatchDropout, "forward", patch_dropout_forward, "open_clip.transformer.PatchDropout"),)
_ATTENTION = (
    Swap(_towers.ResidualAttentionBlock, "attention", block_attention, "open_clip.transformer.ResidualAttentionBlock"),
    Swap(_towers.Attention, "forward", attention_forward, "open_clip.transformer.Attention"),
)


def patch(loss: bool = True, patch_dropout: bool = True, attention: bool = True) -> Swapped:
    """Let open_clip's classes compute with our ops, from now on or for the length of a `with` block.

    Calling it again swaps what is not swapped yet. A `with` block puts back at its end what its own call swapped.
    Call it before `torch.compile`, since a graph that was traced before keeps what it traced.

    Args:
        loss: swap the forward of ClipLoss, of CoCaLoss' contrastive half, of DistillClipLoss and of SigLipLoss.
        patch_dropout: swap the forward of PatchDropout.
        attention: swap the attention of the transformer blocks of both towers.

    Returns:
        A context manager that puts back what this call swapped.

    Raises:
        RuntimeError: the installed open_clip has functions of other arguments; nothing is swapped.
    """
    chosen = ((loss, _LOSSES), (patch_dropout, _PATCH_DROPOUT), (attention, _ATTENTION))
    return _swaps.replace(swap for wanted, swaps in chosen if wanted for swap in swaps)


def unpatch() -> None:
    """Put all of open_clip's own functions back, the same objects; nothing happens where nothing is swapped.

    Raises:
        RuntimeError: someone else replaced one of the functions after `patch()`; nothing is put back.
    """
    _swaps.put_back()


__all__ = ["ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss", "patch", "unpatch"]
