"""Train two towers with the contrast of oner_fast under Accelerate, which needs no integration.

python accelerate_contrast.py [--steps N], or accelerate launch accelerate_contrast.py

With several processes, `group` makes the loss that of the batch they hold together.
"""

import argparse
from itertools import cycle, islice

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from oner_fast.ops import mixup_info_nce


class TwoTowers(nn.Module):
    """A linear tower for each side, and a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(24, 16), nn.Linear(12, 16)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.image(images), self.text(texts), self.log_scale.exp()


def pairs(count: int) -> TensorDataset:
    """Draw pairs whose sides are two views of the same numbers."""
    hidden = torch.randn(count, 8)
    return TensorDataset(hidden @ torch.randn(8, 24), hidden @ torch.randn(8, 12))


def main(steps: int) -> list[float]:
    """Train and return the losses."""
    set_seed(0)
    accelerator = Accelerator()
    model = TwoTowers()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, DataLoader(pairs(256), batch_size=32, shuffle=True)
    )
    losses = []
    for images, texts in islice(cycle(loader), steps):
        group = dist.group.WORLD if dist.is_initialized() else None
        with accelerator.autocast():
            image, text, scale = model(images, texts)
            loss = mixup_info_nce(image, text, scale, group=group)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    accelerator.print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {steps} steps")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
