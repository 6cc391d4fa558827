"""Embeddings of the same validation pairs over a training: the modality gap in each space, and the report's map."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from oner_fast.atomic import write_atomic
from oner_fast.data.dataset import CorruptSample
from oner_fast.data.images import decode, eval_transform
from oner_fast.data.splits import is_stream, open_split, splits_of
from oner_fast.train.config.common import Data, Run

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Embedded:
    """Unmasked embeddings of some pairs.

    Attributes:
        image, text: (n, E) projections by the trained tower, not normalised.
        gaps: the modality gap in each space, by the space's name.
    """

    image: Tensor
    text: Tensor
    gaps: dict[str, float]


class Snapshots:
    """Snapshots of the embeddings: `take(step)` writes `snapshots/step-%08d.npz` and returns the modality gaps.

    A file holds `image` (n, E) and `text` (n, E), float16 and L2-normalised, and `step`. One that cannot be written is
    left out.

    Args:
        data: where the pairs come from: the validation split, and its pairs evenly spaced.
        run: how often and of how many pairs a snapshot is taken.
        image_size: side of the images, in pixels.
        folder: the run.
        embed: embeds images, uint8 (n, 3, S, S), and their n captions.
    """

    def __init__(
        self, data: Data, run: Run, image_size: int, folder: Path, embed: Callable[[Tensor, list[str]], Embedded]
    ) -> None:
        self.folder, self.embed = folder / "snapshots", embed
        wanted = run.snapshot_every and not is_stream(_source(data))
        images, self.captions = _pairs(data, run.snapshot_pairs, image_size) if wanted else ([], [])
        self.images = torch.stack(images) if images else None

    @torch.no_grad()
    def take(self, step: int) -> dict[str, float]:
        """Embed the pairs as the model is now; where there are no pairs, do nothing and return nothing.

        Returns:
            `gap/SPACE` for each space.
        """
        if self.images is None:
            return {}
        found = self.embed(self.images, self.captions)
        image, text = (F.normalize(each.float(), dim=-1).half().cpu().numpy() for each in (found.image, found.text))
        path = self.folder / f"step-{step:08d}.npz"
        arrays = {"image": image, "text": text, "step": np.int64(step)}
        try:
            # Without its parents: a run folder that was moved away must not come back with a snapshot alone.
            self.folder.mkdir(exist_ok=True)
            write_atomic(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
        except OSError as error:
            _log.warning("no snapshot of step %d, and the run goes on: %s", step, error)
        return {f"gap/{space}": gap for space, gap in found.gaps.items()}


def _source(data: Data) -> str:
    """Return the data that snapshots are taken from."""
    return data.val_data or data.train_data


def _pairs(data: Data, most: int, image_size: int) -> tuple[list[Tensor], list[str]]:
    """Read pairs spread evenly over the validation split; none where there is no such split."""
    try:
        unnamed = "val" if data.val_data else "train"
        splits = splits_of(_source(data), unnamed)
        if data.val_split not in splits:
            raise ValueError(f"{_source(data)} has no split {data.val_split!r}; it has {', '.join(splits)}")
        dataset = open_split(_source(data), data.val_split, unnamed)
    except ValueError as error:
        _log.warning("no snapshots of embeddings: %s", error)
        return [], []
    transform = eval_transform(image_size)
    images, captions = [], []
    count = min(most, len(dataset))
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
