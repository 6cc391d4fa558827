"""Embeddings of the same validation pairs over a training, for the report's map and modality gap."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from oner_fast.data.dataset import CorruptSample, PairDataset
from oner_fast.data.images import decode, eval_transform
from oner_fast.data.tokenizer import Tokenizer
from oner_fast.models.oner import OneR
from oner_fast.train.engine.batches import is_stream
from oner_fast.train.oner.settings import OneRConfiguration

_log = logging.getLogger(__name__)


class Snapshots:
    """Snapshots of the embeddings: `take(step)` writes `snapshots/step-%08d.npz`.

    A file holds `image` (n, E) and `text` (n, E), float16 and L2-normalised, and `step`.
    """

    def __init__(self, config: OneRConfiguration, folder: Path, tokenizer: Tokenizer, tower: OneR) -> None:
        self.folder, self.tower = folder / "snapshots", tower
        wanted = config.run.snapshot_every and not is_stream(config.data.train_data)
        images, captions = _pairs(config) if wanted else ([], [])
        self.images = torch.stack(images) if images else None
        self.text = tokenizer(captions, config.model.max_text_tokens) if captions else None

    @torch.no_grad()
    def take(self, step: int) -> None:
        """Embed the pairs with the tower as it is now; do nothing where there are no pairs."""
        if self.images is None or self.text is None:
            return
        device, training = self.tower.cls_token.device, self.tower.training
        self.tower.eval()
        text = self.text.to(device)
        image = F.normalize(self.tower.encode_image(self.images.to(device)).float(), dim=-1)
        words = F.normalize(self.tower.encode_text(text.input_ids, text.cu_seqlens).float(), dim=-1)
        self.tower.train(training)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:08d}.npz"
        arrays = {"image": image.half().cpu().numpy(), "text": words.half().cpu().numpy(), "step": np.int64(step)}
        np.savez(path, **arrays)  # type: ignore[arg-type]


def _pairs(config: OneRConfiguration) -> tuple[list[torch.Tensor], list[str]]:
    """Read pairs spread evenly over the validation split; none where there is no such split."""
    try:
        dataset = PairDataset(config.data.train_data, config.data.val_split)
    except ValueError as error:
        _log.warning("no snapshots of embeddings: %s", error)
        return [], []
    transform = eval_transform(config.model.image_size)
    images, captions = [], []
    count = min(config.run.snapshot_pairs, len(dataset))
    for index in range(count):
        row = index * len(dataset) // count
        try:
            pair = dataset.read(row, meta=False)
            images.append(transform(decode(pair.image, dataset.name(row))))
        except CorruptSample as error:
            _log.warning("left out of the snapshots: %s", error)
            continue
        captions.append(pair.caption)
    return images, captions
