"""An objective of your own: copy this file, change it, and train.

oner-fast train oner --recipe my_objective.py:oner_spread_pictograms_cpu
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from oner_fast.train.config.registry import recipe
from oner_fast.train.oner.recipes import oner_tiny_pictograms_cpu
from oner_fast.train.oner.settings import CustomObjective, OneRConfiguration


def spread(
    query: Mapping[str, Tensor],
    key: Mapping[str, Tensor],
    logit_scale: Tensor,
    *,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Push the images of a batch apart on the sphere (uniformity; Wang and Isola, 2020).

    Each rank spreads its own part of the batch, so `group` is not needed.
    """
    image = F.normalize(query["image"].float(), dim=-1)
    squared_distance = 2 - 2 * image @ image.T
    others = ~torch.eye(len(image), dtype=torch.bool, device=image.device)
    return (-2 * squared_distance[others]).exp().mean().log()


@recipe
def oner_spread_pictograms_cpu() -> OneRConfiguration:
    """The demo, and images that are pushed apart."""
    base = oner_tiny_pictograms_cpu()
    own = CustomObjective("my_objective.py:spread", weight=0.1)
    return replace(
        base,
        objectives=replace(base.objectives, custom=(own,)),
        run=replace(base.run, run_dir="runs/spread"),
    )
