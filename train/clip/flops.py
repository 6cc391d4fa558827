"""Count the floating-point operations that a step of a two-tower CLIP needs."""

from __future__ import annotations

from collections.abc import Sequence

from oner_fast.models import forward_flops as flops
from oner_fast.models.clip import CLIPConfig
from oner_fast.train.engine.throughput import FORWARD_AND_BACKWARD


def step_flops(model: CLIPConfig, lengths: Sequence[int], batch_size: int) -> float:
    """Count the operations of a step on some pairs, a rank's part: both towers and the contrast, forward and backward.

    Recomputation is not counted, and nothing is padded.

    Args:
        model: the towers.
        lengths: tokens of each caption, its start and end included.
        batch_size: pairs of the whole batch, the N of the contrast.
    """
    pairs = len(lengths)
    towers = flops.clip_flops(model, lengths)
    contrast = flops.contrast_flops(batch_size, model.embed_dim) * pairs / batch_size
    return FORWARD_AND_BACKWARD * (towers + contrast)
