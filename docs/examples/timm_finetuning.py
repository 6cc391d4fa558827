"""Fine-tune a timm vision transformer that sees half of its patches, with one line of oner_fast.

python timm_finetuning.py [--steps N]
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

import oner_fast.integrations.timm

oner_fast.integrations.timm.patch()  # the one line

import timm  # noqa: E402


def batch(size: int, side: int) -> tuple[Tensor, Tensor]:
    """Draw noise that is tinted red, green or blue: (B, 3, side, side) and the number of the colour."""
    images, labels = torch.rand(size, 3, side, side), torch.randint(3, (size,))
    images[torch.arange(size), labels] += 1.0
    return images - 0.8, labels


def main(steps: int) -> list[float]:
    """Train and return the losses."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2,
        num_classes=3, patch_drop_rate=0.5,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(steps):
        images, labels = batch(16, 32)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {steps} steps")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    main(parser.parse_args().steps)
