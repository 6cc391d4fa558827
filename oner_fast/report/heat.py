"""Heat maps of words over images, for a few captions drawn by seed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image

from oner_fast.data.images import eval_transform
from oner_fast.evaluation.composed import shuffle_key
from oner_fast.evaluation.embed import Encoder, SplitEmbeddings
from oner_fast.evaluation.localisation import heat_map, overlay, patch_scores
from oner_fast.evaluation.splits import words
from oner_fast.report.image_tiles import from_pixels

SIZE = 168  # side of a heat map in px
MOST_WORDS = 3


@dataclass(frozen=True)
class HeatRow:
    """An image, its caption, and (text, data URI) for the caption and each of its words."""

    caption: str
    picture: str
    maps: list[tuple[str, str]]


def heat_rows(
    loaded: Encoder,
    embedded: SplitEmbeddings,
    open_picture: Callable[[int], Image.Image],
    *,
    seed: int,
    count: int = 6,
) -> list[HeatRow]:
    """Draw heat maps of captions with two or three words, chosen by seed; if there are none, of any captions.

    Args:
        loaded: the model.
        embedded: the split.
        open_picture: gives the image of a row of the split.
        seed: seed of the choice.
        count: number of captions.
    """
    captions = [several[0] for several in embedded.captions]
    order = sorted(range(len(captions)), key=lambda row: (shuffle_key(seed, f"heat {captions[row]}"), row))
    fitting = [row for row in order if 2 <= len(words(captions[row])) <= MOST_WORDS]
    rows = []
    for row in (fitting or order)[:count]:
        shown = open_picture(row)
        pixels = loaded.preprocess(shown)
        texts = [captions[row], *dict.fromkeys(words(captions[row])[:MOST_WORDS])]
        with torch.inference_mode():
            patches = loaded.encode_patches(pixels[None]).float().cpu()[0]
            described = loaded.encode_text(texts).float().cpu()
        large = eval_transform(SIZE)(shown)
        maps = heat_map(patch_scores(patches.expand(len(texts), -1, -1), described), (SIZE, SIZE))
        images = [(text, from_pixels(overlay(large, heat))) for text, heat in zip(texts, maps, strict=True)]
        rows.append(HeatRow(captions[row], from_pixels(large), images))
    return rows
