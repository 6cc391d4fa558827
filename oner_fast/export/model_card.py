"""The README of an exported folder: how to load it, the run's figures, and the licences of its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oner_fast.evaluation.folder import find_training_data, read_config, recipe_of
from oner_fast.evaluation.record import read_figures
from oner_fast.evaluation.table import DIRECTIONS, KS, percent, rows, split_title
from oner_fast.report.attribution import credits_of_data
from oner_fast.report.origins import described, origins, run_of


def model_card(run: Path, config: dict[str, Any], parameters: int, loading: str) -> str:
    """Write the card of a run's model as Markdown.

    Args:
        run: the run folder; `evaluation.json` and the listing of its training data are read where they exist.
        config: sizes, as `oner_fast.export.convert.plain_config` gives them.
        parameters: number of the tower's parameters.
        loading: Markdown that shows how this folder is loaded.

    Raises:
        ValueError: `evaluation.json` or the listing of the data cannot be read.
    """
    name, recipe = _cell(run.resolve().name), recipe_of(read_config(run))
    towers = "One transformer reads" if config["shared_trunk"] else "Two transformers read"
    side = config["image_size"]
    together = ", and an image with a text," if config["shared_trunk"] else ""
    begun = f" Its training followed the recipe `{recipe}`." if recipe else ""
    if before := origins(run):
        begun += f" It began with the weights of {', then '.join(_cell(described(one)) for one in before)}."
    return f"""---
license: other
tags: [oner, image-text-retrieval]
---

# {name}

{towers} images and texts{together} into one space of {config["embed_dim"]} numbers, in which the cosine says how
well an image and a text fit (OneR, arXiv 2211.11153). The tower has {parameters:,} parameters and sees images of
{side} x {side} pixels and texts of up to {config["max_text_tokens"]} word pieces.{begun}

{loading}
## Figures

{_figures(run)}
## Data

{_data(run)}
## Limits

A model knows the words and the kind of pictures of its training data, and repeats their errors. It was trained to rank
pictures and captions; nothing filters what it finds.
"""


def _figures(run: Path) -> str:
    record = read_figures(run)
    lines = []
    for split, direction, figures in rows(record):
        try:
            cells = [f"{percent(figures[f'R@{k}'])} ({percent(figures[f'chance@{k}'])})" for k in KS]
            counts = f"{int(figures['queries']):,} | {int(figures['gallery']):,}"
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{run}: evaluation.json lacks a figure of {split} ({error}); run `oner-fast eval` again"
            ) from error
        lines.append(f"| {split_title(split)} | {DIRECTIONS[direction]} | {counts} | {' | '.join(cells)} |")
    if not lines:
        return "The run has not been evaluated (`oner-fast eval`).\n"
    return (
        "R@k is the share of queries with a right answer among the first k; chance stands in brackets.\n\n"
        f"| Split | Query → gallery | Queries | Gallery | {' | '.join(f'R@{k}' for k in KS)} |\n"
        f"|---|---|---|---|{'---|' * len(KS)}\n" + "\n".join(lines) + "\n"
    )


def _data(run: Path) -> str:
    """List the works that the weights were trained on, in this run and in those whose weights it began with."""
    credits: list[dict[str, Any]] = []
    unknown = []
    for folder, name in [(run, ""), *((run_of(one), described(one)) for one in origins(run))]:
        try:
            found = credits_of_data(find_training_data(folder))
        except FileNotFoundError:
            found = []
        credits += [credit for credit in found if credit not in credits]
        if name and not found:
            unknown.append(_cell(name))
    more = f"\nThe data of {', '.join(unknown)}, with whose weights it began, are not listed here.\n" if unknown else ""
    return _table(credits) + more


def _table(credits: list[dict[str, Any]]) -> str:
    if not credits:
        return "The training data state no licence. Who passes the weights on needs to know where they came from.\n"
    lines = [
        f"| {_cell(each['title'])} | {_cell(each['author'])} | {_cell(each['licence'])} | {each['samples']:,} |"
        for each in credits
    ]
    return (
        "The weights were trained on these works; their licences ask for this credit.\n\n"
        "| Work | Author | Licence | Pictures |\n|---|---|---|---|\n" + "\n".join(lines) + "\n"
    )


def _cell(text: str) -> str:
    """Text that keeps its place in a table of Markdown."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
