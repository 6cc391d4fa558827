"""open_clip's SigLipLoss by our ops: the same value and gradients, and no matrix of logits.

Over W ranks open_clip returns the part of the loss that belongs to the rank's images. The gradient of its texts is that
of the sum of all ranks' parts, and those of scale and bias are of the rank's part.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from oner_fast.integrations.fallback import tell
from oner_fast.integrations.open_clip_losses import why_not
from oner_fast.integrations.swaps import Function, stands_for
from oner_fast.models.optional_packages import optional_package
from oner_fast.ops import sigmoid_loss
from oner_fast.ops.local_sigmoid_loss import local_sigmoid_loss

_SIGLIP = optional_package("open_clip").loss.SigLipLoss
_PARTS = {name: getattr(_SIGLIP, name) for name in ("get_logits", "get_ground_truth", "_loss")}


def siglip_forward(original: Function) -> Function:
    """Make the forward of SigLipLoss by our ops; `original` serves what they cannot."""

    def forward(
        self: Any,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Any,
        logit_bias: Any,
        output_dict: bool = False,
    ) -> Any:
        given = (image_features, text_features, logit_scale, logit_bias)
        if reason := why_not(self, _PARTS, *given):
            tell("open_clip.loss.SigLipLoss", "its own code", reason)
            return original(self, *given, output_dict)
        group = dist.group.WORLD if self.world_size > 1 else None
        loss = sigmoid_loss(*given, normalized=True) if group is None else local_sigmoid_loss(*given, group)
        return {"contrastive_loss": loss} if output_dict else loss

    return stands_for(forward, original)


class SigLipLoss(_SIGLIP):  # type: ignore[misc, valid-type]
    """open_clip's SigLipLoss by `sigmoid_loss`: the same flags, values and gradients.

    Every `dist_impl` gives the same loss, and here the same exchange: the keys of the ranks pass around a ring.
    """

    forward = siglip_forward(_SIGLIP.forward)
