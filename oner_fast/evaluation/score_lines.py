"""Sentences about localisation, reasoning and fused queries, with chance and trivial answers beside each figure."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from oner_fast.evaluation.table import percent, split_title

POINTING = {
    "chance": "chance",
    "random_cell": "a random cell",
    "centre": "the centre",
    "largest_box": "the largest box",
    "other_phrase": "another phrase's map",
}
BOXES = {
    "whole_picture": "the whole picture",
    "largest_box": "the largest box",
    "other_phrase": "another phrase's map",
}
WAYS = {"joint": "F(I,T)", "mean": "F(I) + F(T)", "image_only": "image alone", "text_only": "text alone"}
FUSIONS = {
    "mean": "F(I) + F(T)",
    "sum": "F(I) + F(T) + F(I,T)",
    "standardised": "F(I) + F(T) standardised",
    "weighted": "weights for all three",
    "shift": "F(I) + shift by the word",
    "weighted_shift": "F(I) + weighted shift",
}


@dataclass(frozen=True)
class Score:
    """One question: the figures of the model first, then those of chance and of trivial answers, and what it is of."""

    question: str
    parts: list[tuple[str, str]]
    of: str


def score_lines(evaluation: dict[str, Any]) -> Iterator[str]:
    """Yield one sentence for each question that an entry of the evaluation has figures of."""
    for key, entry in evaluation.items():
        if isinstance(entry, dict):
            for one in scores_of(entry):
                figures = ", ".join(f"{name} {figure}" for name, figure in one.parts)
                yield f"{one.question}, {split_title(key)}, {one.of}: {figures}"


def scores_of(entry: dict[str, Any]) -> Iterator[Score]:
    """Yield the questions of localisation, reasoning and fusion that one entry has figures of."""
    if "localisation" in entry:
        yield from _localisation(entry["localisation"])
    if "reasoning" in entry:
        yield from _reasoning(entry["reasoning"])
    composed = entry.get("image_text_to_image", {})
    if "fusions" in composed:
        fused = [(title, percent(share)) for title, share in fused_shares(composed, 10)]
        chance = ("chance", percent(composed["chance@10"]))
        yield Score("image + text → image, R@10", [*fused, chance], f"{composed['queries']:,} queries")


def fused_shares(composed: dict[str, Any], k: int) -> list[tuple[str, float]]:
    """List R@k of the image alone, the text alone, F(I,T) and each fusion, by title."""
    found = [("image alone", composed["image_only"]), ("text alone", composed["text_only"]), ("F(I,T)", composed)]
    found += [(title, composed["fusions"][name]) for name, title in FUSIONS.items() if name in composed["fusions"]]
    return [(title, float(figures[f"R@{k}"])) for title, figures in found]


def _localisation(found: dict[str, Any]) -> Iterator[Score]:
    pointing, box, of = found["pointing"], found["box"], f"{found['phrases']:,} phrases"
    beside = [(name, percent(pointing[key])) for key, name in POINTING.items() if pointing[key] is not None]
    yield Score("pointing game", [("the word's map", percent(pointing["hit"])), *beside], of)
    boxes = {"model": "the word's map", **BOXES}
    beside = [(name, f"{box[key]['iou']:.3f}") for key, name in boxes.items() if box[key]["iou"] is not None]
    yield Score("IoU of the map's box", beside, of)


def _reasoning(found: dict[str, Any]) -> Iterator[Score]:
    three, every = found["three_classes"], found["all_classes"]
    right = [(name, percent(three[way])) for way, name in WAYS.items()]
    of = f"{found['questions']:,} questions"
    yield Score("guided by a word, right of three", [*right, ("chance", percent(three["chance"]))], of)
    for way, did in (("moved", "moved to the right one"), ("spoiled", "spoiled by an unrelated word")):
        parts = [(name, percent(three[way][key])) for key, name in WAYS.items() if three[way].get(key) is not None]
        if parts:
            yield Score(f"guided by a word, {did}", parts, f"{three[way]['pictures']:,} questions")
    top = [(name, percent(every[way]["top1"])) for way, name in WAYS.items()]
    chance = ("chance", percent(every["chance@1"]))
    yield Score(f"guided by a word, right of {every['classes']:,}", [*top, chance], of)
