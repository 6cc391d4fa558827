"""Train OneR's tower under Lightning: nothing of the library needs to know. Run with `python lightning_contrast.py`."""

from collections.abc import Sequence
from typing import Any

import lightning
import torch
import torch.distributed as dist
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


class Contrast(lightning.LightningModule):
    """OneR's tower with the contrast of F(I) and F(T), over all ranks where there are several."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = OneR(CONFIG)
        self.tower.patch_embedding.mask_token.requires_grad_(False)  # no loss reaches it
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def training_step(self, batch: tuple[Tensor, TokenizedText], _: int) -> Tensor:
        """Compute the loss of a batch."""
        images, text = batch
        passes = [
            Pass("image", image=ImageInput(images)),
            Pass("text", text=TextInput(text.input_ids, text.cu_seqlens)),
        ]
        found = self.tower.project_cls(self.tower(passes, {}))  # both passes as one packed batch
        # Gradients are scaled for the mean that DDP takes.
        group = dist.group.WORLD if dist.is_initialized() else None
        loss = ops.mixup_info_nce(found["image"], found["text"], self.log_scale.exp(), mix=0.0, group=group)
        self.log("loss", loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimiser."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(steps: int = 20, **options: Any) -> float:
    """Train for some steps, and return the last loss."""
    lightning.seed_everything(0, verbose=False)
    model = Contrast()
    loader = DataLoader(pairs(8 * steps), batch_size=8, collate_fn=collate)
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(model, loader)
    return float(trainer.callback_metrics["loss"])


if __name__ == "__main__":
    print(f"loss {main():.3f}")
