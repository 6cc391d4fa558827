"""Train OneR's tower under Accelerate: `accelerate launch accelerate_contrast.py`, or with python."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from oner_fast import ops
from oner_fast.data.batch import TokenizedText
from oner_fast.data.tokenizer import Tokenizer
from oner_fast.models.oner import ImageInput, OneR, OneRConfig, Pass, TextInput

COLOURS = ("red", "green", "blue", "white", "black", "grey", "pink", "brown")
TOKENIZER = Tokenizer.train([f"a {colour} picture" for colour in COLOURS], 300)
CONFIG = OneRConfig(
    image_size=32, patch_size=8, width=64, depth=2, heads=2, vocab_size=TOKENIZER.vocab_size, max_text_tokens=12,
    embed_dim=32, projector_hidden=64,
)  # fmt: skip


def pairs(count: int) -> list[tuple[Tensor, str]]:
    """Draw noisy pictures of a colour each, with captions."""
    random = torch.Generator().manual_seed(0)
    shades = torch.randint(40, 215, (len(COLOURS), 3, 1, 1), generator=random)
    noise = torch.randint(-40, 41, (count, 3, CONFIG.image_size, CONFIG.image_size), generator=random)
    kinds = [number % len(COLOURS) for number in range(count)]
    return [
        ((shades[kind] + noise[row]).to(torch.uint8), f"a {COLOURS[kind]} picture") for row, kind in enumerate(kinds)
    ]


def collate(batch: Sequence[tuple[Tensor, str]]) -> tuple[Tensor, TokenizedText]:
    """Stack uint8 images, and pack the captions without padding."""
    return torch.stack([image for image, _ in batch]), TOKENIZER([caption for _, caption in batch])


class Contrast(nn.Module):
    """OneR's tower with the contrast of F(I) and F(T), over all ranks where there are several."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = OneR(CONFIG)
        self.tower.patch_embedding.mask_token.requires_grad_(False)  # no loss reaches it
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor, text: TokenizedText) -> Tensor:
        """Compute the loss of a batch."""
        passes = [
            Pass("image", image=ImageInput(images)),
            Pass("text", text=TextInput(text.input_ids, text.cu_seqlens)),
        ]
        found = self.tower.project_cls(self.tower(passes, {}))  # both passes as one packed batch
        # Gradients are scaled for the mean that DDP takes.
        group = dist.group.WORLD if dist.is_initialized() else None
        return ops.mixup_info_nce(found["image"], found["text"], self.log_scale.exp(), mix=0.0, group=group)


def main(steps: int = 20, mixed_precision: str = "no") -> float:
    """Train for some steps, and return the last loss."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    model = Contrast()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(pairs(8 * steps), batch_size=8, collate_fn=collate)
    model, optimiser, loader = accelerator.prepare(model, optimiser, loader)
    loss = torch.zeros(())
    for images, text in loader:
        loss = model(images, text)
        accelerator.backward(loss)
        optimiser.step()
        optimiser.zero_grad()
    return float(loss)


if __name__ == "__main__":
    print(f"loss {main():.3f}")
