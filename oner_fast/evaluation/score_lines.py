"""Sentences about localisation, reasoning and fused queries, with chance and trivial answers beside each figure."""

from collections.abc import Iterator
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


def score_lines(evaluation: dict[str, Any]) -> Iterator[str]:
    """Yield the sentences of each entry of an evaluation that has such figures."""
    for key, entry in evaluation.items():
        if not isinstance(entry, dict):
            continue
        title = split_title(key)
        if "localisation" in entry:
            yield from _localisation(title, entry["localisation"])
        if "reasoning" in entry:
            yield from _reasoning(title, entry["reasoning"])
        if "fusions" in (composed := entry.get("image_text_to_image", {})):
            fused = fused_rows(composed, 10)
            beside = ", ".join(f"{name} {percent(share)}" for name, share in fused)
            yield (
                f"image + text → image, {title}, R@10 of {composed['queries']:,} queries: {beside} "
                f"(chance {percent(composed['chance@10'])})"
            )


def fused_rows(composed: dict[str, Any], k: int) -> list[tuple[str, float]]:
    """List R@k of the image alone, the text alone, F(I,T) and each fusion, by title."""
    found = [("image alone", composed["image_only"]), ("text alone", composed["text_only"]), ("F(I,T)", composed)]
    found += [(title, composed["fusions"][name]) for name, title in FUSIONS.items() if name in composed["fusions"]]
    return [(title, float(figures[f"R@{k}"])) for title, figures in found]


def _localisation(title: str, found: dict[str, Any]) -> Iterator[str]:
    pointing, box = found["pointing"], found["box"]
    beside = ", ".join(
        f"{name} {percent(pointing[key])}" for key, name in POINTING.items() if pointing[key] is not None
    )
    yield f"pointing game, {title}: {percent(pointing['hit'])} of {found['phrases']:,} phrases ({beside})"
    beside = ", ".join(f"{name} {box[key]['iou']:.3f}" for key, name in BOXES.items() if box[key]["iou"] is not None)
    model = box["model"]
    yield f"box of the map, {title}: IoU {model['iou']:.3f}, at least 0.5 for {percent(model['iou@0.5'])} ({beside})"


def _reasoning(title: str, found: dict[str, Any]) -> Iterator[str]:
    three, every = found["three_classes"], found["all_classes"]
    shares = ", ".join(f"{name} {percent(three[way])}" for way, name in WAYS.items())
    yield (
        f"guided by a word, {title}, three classes: right answers {shares} of {found['questions']:,} "
        f"(chance {percent(three['chance'])})"
    )
    for way, did in (("moved", "moved to the right answer"), ("spoiled", "spoiled by an unrelated word")):
        parts = [f"{name} {percent(three[way][key])}" for key, name in WAYS.items() if three[way].get(key) is not None]
        if parts:
            yield f"guided by a word, {title}, {did}: {', '.join(parts)} of {three[way]['pictures']:,}"
    shares = ", ".join(f"{name} {percent(every[way]['top1'])}" for way, name in WAYS.items())
    yield (
        f"guided by a word, {title}, {every['classes']:,} classes: top-1 {shares} (chance {percent(every['chance@1'])})"
    )
