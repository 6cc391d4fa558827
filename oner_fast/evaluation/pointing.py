"""Score word-patch localisation by boxes: the pointing game, and the overlap of the map's own box.

Each picture is padded with white to a square, so that all of it is seen and nothing is stretched. The map of a phrase
(`localisation.patch_scores`, then bicubic) is computed on `SIDE` x `SIDE` pixels of that square and read inside the
picture alone. These rules are our choice:

* Pointing game: a hit where the map's greatest pixel is in a box of the phrase. Where several pixels are greatest, all
  of them have to be; a flat map is a miss.
* Box: of the pixels with at least `THRESHOLD` of the map's range, those connected to the greatest one (over edges) span
  a box. Its score is the intersection over union (IoU) with the phrase's nearest box.

Trivial answers stand beside both: pointing at random, at a random cell of the patch grid, at the picture's centre, at
the picture's largest box; the map of another phrase of the same picture; the whole picture as the box.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from oner_fast.data.images import decode
from oner_fast.evaluation.boxes import Box, BoxedPicture
from oner_fast.evaluation.embed import Encoder, embed_texts, name_left_out, shown
from oner_fast.evaluation.localisation import heat_map, patch_scores
from oner_fast.evaluation.sharing import gathered, mine

SIDE = 112
THRESHOLD = 0.5
IOU = 0.5

Scores = dict[str, float]
"""Scores of one phrase; `None` values are left out where an answer does not exist."""


def evaluate_localisation(loaded: Encoder, pictures: Sequence[BoxedPicture], *, batch_size: int = 64) -> dict[str, Any]:
    """Score every phrase of the pictures.

    Returns:
        `pictures`, `phrases`, `damaged`, `grid` (rows and columns of patches), and two dicts. `pointing` holds the
        shares of hits of the model (`hit`), of `chance` (a pixel of the picture at random), `random_cell`, `centre`,
        `largest_box` and `other_phrase`. `box` holds, for `model`, `whole_picture`, `largest_box` and `other_phrase`,
        the mean IoU (`iou`) and the share of phrases with at least `IOU` (`iou@0.5`). The figures of `other_phrase`
        are of the pictures with several phrases, `phrases_with_another` of them.

    Raises:
        ValueError: there is no picture that can be read.
    """
    texts = list(dict.fromkeys(phrase.text for picture in pictures for phrase in picture.phrases))
    if not texts:
        raise ValueError("need at least one phrase with a box")
    place = {text: row for row, text in enumerate(texts)}
    described = embed_texts(loaded, texts, batch_size=batch_size)
    batches = math.ceil(len(pictures) / batch_size)
    numbers = mine(batches)
    done: list[tuple[list[Scores], list[str], int]] = []
    for number in shown(range(len(numbers)), "looking for words"):
        start = numbers[number] * batch_size
        done.append(_batch(loaded, pictures[start : start + batch_size], lambda text: described[place[text]]))
    every = gathered(done, batches)
    scores = [one for several, _, _ in every for one in several]
    damaged = [sentence for _, sentences, _ in every for sentence in sentences]
    name_left_out(damaged)
    if not scores:
        raise ValueError(f"none of {len(pictures)} pictures could be read; first: {damaged[0]}")
    return {
        "pictures": len(pictures) - len(damaged),
        "phrases": len(scores),
        "phrases_with_another": sum("hit/other_phrase" in one for one in scores),
        "damaged": len(damaged),
        "grid": max(grid for _, _, grid in every),
        "threshold": THRESHOLD,
        "pointing": {
            ("hit" if name == "model" else name): _mean(scores, f"hit/{name}")
            for name in ("model", "chance", "random_cell", "centre", "largest_box", "other_phrase")
        },
        "box": {
            name: {"iou": _mean(scores, f"iou/{name}"), f"iou@{IOU}": _share(scores, f"iou/{name}")}
            for name in ("model", "whole_picture", "largest_box", "other_phrase")
        },
    }


def _batch(
    loaded: Encoder, pictures: Sequence[BoxedPicture], text: Callable[[str], Tensor]
) -> tuple[list[Scores], list[str], int]:
    """Score the phrases of some pictures; also return why pictures were left out, and the side of the patch grid."""
    good: list[tuple[BoxedPicture, tuple[int, int]]] = []
    pixels, damaged = [], []
    for picture in pictures:
        try:
            image = decode(picture.read(), picture.name)
            _check_shape(picture, image.size)
        except (OSError, ValueError) as error:
            damaged.append(str(error))
            continue
        good.append((picture, image.size))
        pixels.append(loaded.preprocess(padded(image)))
    if not good:
        return [], damaged, 0
    with torch.inference_mode():
        patches = loaded.encode_patches(torch.stack(pixels)).float().cpu()
    grid = math.isqrt(patches.shape[1])
    scores = []
    for (picture, size), outputs in zip(good, patches, strict=True):
        described = torch.stack([text(phrase.text) for phrase in picture.phrases])
        shares = patch_scores(outputs.expand(len(described), -1, -1), described)
        boxes = [[_on_map(box, size) for box in phrase.boxes] for phrase in picture.phrases]
        scores += score_maps(heat_map(shares, (SIDE, SIDE)), boxes, _on_map((0, 0, *size), size), grid)
    return scores, damaged, grid


def _check_shape(picture: BoxedPicture, size: tuple[int, int]) -> None:
    """Raise ValueError where the picture is too narrow for the map, or a box shows no part of it."""
    if max(size) > SIDE * min(size):
        raise ValueError(
            f"{picture.name} has {size[0]} x {size[1]} pixels; a side needs to be at most {SIDE} times the other one"
        )
    for phrase in picture.phrases:
        for box in phrase.boxes:
            if not _on_map(box, size).area:
                raise ValueError(
                    f"{picture.name} has {size[0]} x {size[1]} pixels, and the box {box} of {phrase.text!r} lies "
                    "beside them; boxes are left, top, width and height in the picture's own pixels"
                )


def padded(image: Image.Image) -> Image.Image:
    """Centre a picture on a white square of its longer side."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


@dataclass(frozen=True)
class _Rectangle:
    """A rectangle on the map, in its pixels; right and bottom are excluded."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def area(self) -> float:
        return max(0.0, self.right - self.left) * max(0.0, self.bottom - self.top)

    @property
    def centre(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2

    def holds(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.left <= x) & (x < self.right) & (self.top <= y) & (y < self.bottom)

    def holds_point(self, point: tuple[float, float]) -> bool:
        return self.left <= point[0] < self.right and self.top <= point[1] < self.bottom

    def cut(self, other: "_Rectangle") -> "_Rectangle":
        return _Rectangle(
            max(self.left, other.left),
            max(self.top, other.top),
            min(self.right, other.right),
            min(self.bottom, other.bottom),
        )

    def iou(self, other: "_Rectangle") -> float:
        common = self.cut(other).area
        return common / (self.area + other.area - common) if common else 0.0


def _on_map(box: Box, size: tuple[int, int]) -> _Rectangle:
    """Move a box of a picture of `size` (width, height) onto the map of its padded square, cut to the picture."""
    side = max(size)
    across, down = (side - size[0]) // 2, (side - size[1]) // 2
    scale = SIDE / side
    left, top = max(0.0, box[0]), max(0.0, box[1])
    right, bottom = min(float(size[0]), box[0] + box[2]), min(float(size[1]), box[1] + box[3])
    return _Rectangle((left + across) * scale, (top + down) * scale, (right + across) * scale, (bottom + down) * scale)


def score_maps(maps: Tensor, boxes: Sequence[Sequence[_Rectangle]], picture: _Rectangle, grid: int) -> list[Scores]:
    """Score the maps (P, SIDE, SIDE) of one picture's P phrases by the boxes of each.

    Args:
        maps: the maps, in [0, 1].
        boxes: the boxes of each phrase, on the map.
        picture: the part of the map that is the picture.
        grid: rows and columns of patches.
    """
    middles = torch.arange(SIDE) + 0.5
    x, y = middles[None, :], middles[:, None]
    inside = picture.holds(x, y)
    points = _greatest(maps, inside)
    spans = [_box_of(mask) for mask in _connected(maps, points, inside)]
    cells = (torch.arange(grid) + 0.5) * (SIDE / grid)
    cell_x, cell_y = cells[None, :], cells[:, None]
    seen = picture.holds(cell_x, cell_y)
    largest = max((box for several in boxes for box in several), key=lambda box: box.area)
    found = []
    for number, own in enumerate(boxes):
        mask = torch.stack([box.holds(x, y) for box in own]).any(0)
        at_cells = torch.stack([box.holds(cell_x, cell_y) for box in own]).any(0)
        one: Scores = {
            "hit/model": _hit(points[number], mask),
            "hit/chance": int((mask & inside).sum()) / int(inside.sum()),
            "hit/random_cell": int((at_cells & seen).sum()) / max(1, int(seen.sum())),
            "hit/centre": float(any(box.holds_point(picture.centre) for box in own)),
            "hit/largest_box": float(any(box.holds_point(largest.centre) for box in own)),
            "iou/model": max(spans[number].iou(box) for box in own),
            "iou/whole_picture": max(picture.iou(box) for box in own),
            "iou/largest_box": max(largest.iou(box) for box in own),
        }
        if len(boxes) > 1:
            other = (number + 1) % len(boxes)
            one["hit/other_phrase"] = _hit(points[other], mask)
            one["iou/other_phrase"] = max(spans[other].iou(box) for box in own)
        found.append(one)
    return found


def _greatest(maps: Tensor, inside: Tensor) -> Tensor:
    """Mark the greatest pixels of each map inside the picture: (P, SIDE, SIDE) bool."""
    within = maps.masked_fill(~inside, -1.0)
    return within == within.amax((1, 2), keepdim=True)


def _hit(points: Tensor, mask: Tensor) -> float:
    return float(bool((mask | ~points).all()))


def _connected(maps: Tensor, points: Tensor, inside: Tensor) -> Tensor:
    """Mark the pixels over the threshold that are connected to a greatest one: (P, SIDE, SIDE) bool."""
    over = (maps >= THRESHOLD) & inside | points
    found = points
    while True:
        wider = _spread(_spread(found, over, 2), over, 1)
        if bool((wider == found).all()):
            return found
        found = wider


def _spread(found: Tensor, over: Tensor, dim: int) -> Tensor:
    """Fill each run of `over` along a dimension that holds a found pixel."""
    runs = (~over).cumsum(dim)  # the pixels of a run have one number
    sides = list(over.shape)
    sides[dim] += 1
    reached = torch.zeros(sides, dtype=torch.uint8).scatter_reduce_(dim, runs, found.to(torch.uint8), "amax")
    return reached.gather(dim, runs).bool() & over


def _box_of(mask: Tensor) -> _Rectangle:
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return _Rectangle(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def _mean(scores: Sequence[Scores], name: str) -> float | None:
    values = [one[name] for one in scores if name in one]
    return sum(values) / len(values) if values else None


def _share(scores: Sequence[Scores], name: str) -> float | None:
    values = [one[name] >= IOU for one in scores if name in one]
    return sum(values) / len(values) if values else None
