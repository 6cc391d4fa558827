"""Plan a scene: which pictures stand where on the canvas. Everything follows from the seed and the scene's name."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

# Sides of the squares that hold the pictures, as shares of the canvas's side. Our choice.
SMALLEST, LARGEST = 0.28, 0.5
FEWEST = 2
_TRIES = 40
_SHRINK = 0.9


@dataclass(frozen=True)
class Placed:
    """A picture of a scene: its number, and the square of the canvas that holds it, in pixels."""

    picture: int
    left: int
    top: int
    side: int


def plan_scene(concepts: Sequence[tuple[str, Sequence[int]]], most: int, size: int, seed: str) -> list[Placed]:
    """Plan one scene: from two to `most` pictures of different concepts, whose squares do not overlap.

    No two concepts of a scene share a word, so that each name means one picture.

    Args:
        concepts: each concept with the numbers of its pictures.
        most: greatest number of pictures.
        size: pixels a side of the canvas.
        seed: decides everything; scenes of one data set have different seeds.

    Raises:
        ValueError: no two of the concepts are without a common word.
    """
    draw = _Draw(seed)
    wanted = FEWEST + draw.below(most - FEWEST + 1)
    chosen: list[int] = []
    taken: set[str] = set()
    for number in draw.order(len(concepts)):
        name, pictures = concepts[number]
        if taken.isdisjoint(words := set(name.split())):
            chosen.append(pictures[draw.below(len(pictures))])
            taken |= words
        if len(chosen) == wanted:
            break
    if len(chosen) < FEWEST:
        raise ValueError(f"a scene needs at least {FEWEST} pictures without a common word in their names")
    return _place(chosen, size, draw)


class _Draw:
    """Random numbers from a text. Only `random.random` is used, whose values never change between Pythons."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed).random

    def below(self, end: int) -> int:
        return int(self._random() * end)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self._random()

    def order(self, count: int) -> "_Order":
        return _Order(count, self)


class _Order:
    """The numbers below `count` in random order, without a list of all of them."""

    def __init__(self, count: int, draw: _Draw) -> None:
        self._left, self._draw, self._moved = count, draw, dict[int, int]()

    def __iter__(self) -> "_Order":
        return self

    def __next__(self) -> int:
        if not self._left:
            raise StopIteration
        place = self._draw.below(self._left)
        self._left -= 1
        found = self._moved.get(place, place)
        self._moved[place] = self._moved.get(self._left, self._left)
        return found


def _place(pictures: Sequence[int], size: int, draw: _Draw) -> list[Placed]:
    """Choose a side and a place for each picture; where they do not fit, all become smaller."""
    scale = 1.0
    while True:
        placed: list[Placed] = []
        for picture in pictures:
            side = max(1, round(draw.between(SMALLEST, LARGEST) * scale * size))
            for _ in range(_TRIES):
                one = Placed(picture, draw.below(size - side + 1), draw.below(size - side + 1), side)
                if not any(_overlap(one, other) for other in placed):
                    placed.append(one)
                    break
            else:
                break
        if len(placed) == len(pictures):
            return placed
        scale *= _SHRINK


def _overlap(one: Placed, other: Placed) -> bool:
    return (
        one.left < other.left + other.side
        and other.left < one.left + one.side
        and one.top < other.top + other.side
        and other.top < one.top + one.side
    )
