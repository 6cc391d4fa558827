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
    """Draw noise with a bright square in one of the four quarters: (B, 3, side, side) and the number of the quarter."""
    images, labels = torch.rand(size, 3, side, side), torch.randint(4, (size,))
    half = side // 2
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left = label // 2 * half, label % 2 * half
        image[:, top : top + half, left : left + half] += 1.0
    return images - images.mean(), labels


def main(steps: int) -> list[float]:
    """Train and return the losses."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=64, embed_dim=64, depth=2, num_heads=2, num_classes=4,
        patch_drop_rate=0.5,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(steps):
        images, labels = batch(16, 64)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {steps} steps")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    main(parser.parse_args().steps)
