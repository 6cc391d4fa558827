"""Embeddings of the same validation pairs over a training, for the report's map and modality gap."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from oner_fast.atomic import write_atomic
from oner_fast.data.dataset import CorruptSample
from oner_fast.data.images import decode, eval_transform
from oner_fast.data.splits import open_split, splits_of
from oner_fast.data.tokenizer import Tokenizer
from oner_fast.models.oner import OneR
from oner_fast.train.engine.batches import is_stream
from oner_fast.train.oner.settings import OneRConfiguration

_log = logging.getLogger(__name__)


class Snapshots:
    """Snapshots of the embeddings: `take(step)` writes `snapshots/step-%08d.npz`.

    One that cannot be written is left out. A file holds `image` (n, E) and `text` (n, E), float16 and L2-normalised,
    and `step`.
    """

    def __init__(self, config: OneRConfiguration, folder: Path, tokenizer: Tokenizer, tower: OneR) -> None:
        self.folder, self.tower = folder / "snapshots", tower
        wanted = config.run.snapshot_every and not is_stream(_data(config))
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
        path = self.folder / f"step-{step:08d}.npz"
        arrays = {"image": image.half().cpu().numpy(), "text": words.half().cpu().numpy(), "step": np.int64(step)}
        try:
            # Without its parents: a run folder that was moved away must not come back with a snapshot alone.
            self.folder.mkdir(exist_ok=True)
            write_atomic(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
        except OSError as error:
            _log.warning("no snapshot of step %d, and the run goes on: %s", step, error)


def _data(config: OneRConfiguration) -> str:
    """Return the data that snapshots are taken from."""
    return config.data.val_data or config.data.train_data


def _pairs(config: OneRConfiguration) -> tuple[list[torch.Tensor], list[str]]:
    """Read pairs spread evenly over the validation split; none where there is no such split."""
    try:
        unnamed = "val" if config.data.val_data else "train"
        splits = splits_of(_data(config), unnamed)
        if config.data.val_split not in splits:
            raise ValueError(f"{_data(config)} has no split {config.data.val_split!r}; it has {', '.join(splits)}")
        dataset = open_split(_data(config), config.data.val_split, unnamed)
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
