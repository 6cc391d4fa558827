"""The pictures of a page: what is shown, what the model sees, and their embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from oner_fast.data.dataset import PairDataset
from oner_fast.data.images import decode
from oner_fast.evaluation.embed import embed_pairs, spaced
from oner_fast.loading import Loaded
from oner_fast.report.image_tiles import tile


@dataclass(frozen=True)
class Library:
    """N pictures.

    Attributes:
        pictures: `source` (a data URI) and `caption` of each.
        pixels: (N, 3, S, S) uint8, as the model sees them.
        embeddings: (N, E) float32, L2-normalised.
    """

    pictures: list[dict[str, Any]]
    pixels: NDArray[np.uint8]
    embeddings: NDArray[np.float32]


def build_library(loaded: Loaded, dataset: PairDataset, limit: int) -> Library:
    """Embed the pictures of a split, at most `limit`, evenly spaced; a damaged one is left out and named in the log.

    Raises ValueError where none can be read.
    """
    image, rows, pairs, _ = embed_pairs(loaded, dataset, spaced(len(dataset), limit), label="pictures")
    contents = [dataset.picture(row) for row in rows]
    pixels = torch.stack([loaded.preprocess(decode(content)) for content in contents])
    pictures = [
        {"source": tile(content), "caption": caption} for content, (caption, _) in zip(contents, pairs, strict=True)
    ]
    return Library(pictures, pixels.numpy(), image.numpy())
