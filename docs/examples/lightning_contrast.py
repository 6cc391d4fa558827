"""Train two towers with the contrast of oner_fast under Lightning, which needs no integration.

python lightning_contrast.py [--steps N]

With several devices, `group` makes the loss that of the batch they hold together.
"""

import argparse

import lightning
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from oner_fast.ops import mixup_info_nce


class TwoTowers(lightning.LightningModule):
    """A linear tower for each side, and a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(24, 16), nn.Linear(12, 16)
        self.log_scale = nn.Parameter(torch.tensor(2.0))
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        images, texts = batch
        group = dist.group.WORLD if dist.is_initialized() else None
        loss = mixup_info_nce(self.image(images), self.text(texts), self.log_scale.exp(), group=group)
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def pairs(count: int) -> TensorDataset:
    """Draw pairs whose sides are two views of the same numbers."""
    hidden = torch.randn(count, 8)
    return TensorDataset(hidden @ torch.randn(8, 24), hidden @ torch.randn(8, 12))


def main(steps: int) -> list[float]:
    """Train and return the losses."""
    lightning.seed_everything(0)
    model = TwoTowers()
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="auto", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(pairs(256), batch_size=32, shuffle=True))
    print(f"loss {model.losses[0]:.3f} -> {model.losses[-1]:.3f} in {steps} steps")
    return model.losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
