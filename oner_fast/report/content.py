"""Gather the content of a report from a run folder, its data and its model."""

import importlib.metadata
import json
import platform
import shlex
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from oner_fast import bounded_json
from oner_fast.data.dataset import PairDataset, sources_of
from oner_fast.data.images import decode
from oner_fast.evaluation.composed import composed_queries
from oner_fast.evaluation.embed import Encoder, JointEncoder, SplitEmbeddings, embed_split
from oner_fast.evaluation.folder import processor, read_config, read_metrics, recipe_of
from oner_fast.evaluation.modality_gap import Snapshot, load_snapshots, modality_gap, spread
from oner_fast.evaluation.record import part_of
from oner_fast.evaluation.run import embed_composed, has_joint_pass
from oner_fast.evaluation.score_lines import fused_shares, scores_of
from oner_fast.evaluation.table import DIRECTIONS, KS, classifications, percent, rows, split_title, times
from oner_fast.report.attribution import count, credits_of_data
from oner_fast.report.curves import (
    evaluation_charts,
    gap_chart,
    loss_charts,
    series,
    space_gap_chart,
    speed_charts,
)
from oner_fast.report.examples import composed_examples, image_examples, text_examples
from oner_fast.report.gap_map import map_charts, shown_snapshots
from oner_fast.report.heat import heat_rows
from oner_fast.report.image_tiles import tile
from oner_fast.report.origins import described, origins

PACKAGES = ("oner-fast", "torch", "numpy", "tokenizers", "webdataset", "Pillow")
EXAMPLE_PICTURES = 4096  # the examples of a larger split come from this many of its images
BANNER = 40
_DRAWN = ("pictograms", "icons")  # data sets of this library, whose held-out splits share no concept with training


def training_content(run: Path, figures: Path) -> dict[str, Any]:
    """Charts of the training and facts about it."""
    metrics = read_metrics(run)
    snapshots = load_snapshots(run / "snapshots")
    total, parts = loss_charts(metrics, figures)
    _, speed = series(metrics, "samples_per_second")
    last = metrics[-1] if metrics else {}
    return {
        "loss": total,
        "loss_parts": parts,
        "speed": speed_charts(metrics, figures),
        "evaluated": evaluation_charts(metrics, figures),
        "gap": [gap_chart(snapshots, figures), *space_gap_chart(metrics, figures)] if snapshots else [],
        "maps": map_charts(snapshots, figures),
        "map_steps": [snapshot.step for snapshot in shown_snapshots(snapshots)],
        "steps": last.get("step"),
        "minutes": _elapsed(series(metrics, "seconds")[1]),
        "gap_facts": [_gap_facts(snapshots[0]), _gap_facts(snapshots[-1])] if snapshots else [],
        "pairs_a_second": sorted(speed)[len(speed) // 2] if speed else None,
        "skipped_steps": _last_count(metrics, "skipped_steps"),
        "corrupt_samples": _last_count(metrics, "corrupt_samples"),
    }


def _last_count(metrics: Sequence[dict[str, Any]], name: str) -> int | None:
    """Return a count as the last logged step has it."""
    values = series(metrics[-1:], name)[1]
    return int(values[0]) if values else None


def evaluation_content(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Table of figures, and the first split's figures for the summary.

    Raises:
        ValueError: an entry lacks a figure, or one is of another kind than `oner-fast eval` writes.
    """
    try:
        return _figures(evaluation)
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise ValueError(
            f"evaluation.json holds no figures of oner-fast eval ({type(error).__name__}: {error}); remove it and run "
            "`oner-fast eval` again"
        ) from error


def _figures(evaluation: dict[str, Any]) -> dict[str, Any]:
    table: dict[str, list[dict[str, Any]]] = {}
    for split, direction, figures in rows(evaluation):
        table.setdefault(split_title(split), []).append(
            {
                "direction": DIRECTIONS[direction],
                "kind": direction,
                "queries": int(figures["queries"]),
                "cells": [_cell(figures, k) for k in KS],
            }
        )
    classes: dict[str, list[dict[str, Any]]] = {}
    for pictures, how, figures in classifications(evaluation):
        line = {"how": how, "images": int(figures["images"]), "classes": int(figures["classes"])}
        cells = [_cell(figures, k, "top") for k in (1, 5)]
        majority = figures.get("majority")
        line |= {"cells": cells, "majority": None if majority is None else float(majority)}
        classes.setdefault(pictures, []).append(line)
    both_ways = (row for row, direction, _ in rows(evaluation) if direction == "image_to_text")
    main = "val" if "val" in evaluation else next(both_ways, None)
    figures = evaluation.get(main, {}) if main else {}
    sizes: dict[str, Any] = {}
    if any(name in figures for name in DIRECTIONS):  # the summary names both directions
        sizes["pairs"] = int(figures["pairs"])
        for name in ("image_to_text", "text_to_image"):
            sizes[name] = {"gallery": int(figures[name]["gallery"])}
    composed = figures.get("image_text_to_image")
    fused = fused_shares(composed, 10) if composed and "fusions" in composed else []
    return {
        "table": table,
        "classifications": classes,
        "main": sizes,
        "spaces": [
            {
                "name": space,
                "cells": [_cell(found[name], 10) for name in ("image_to_text", "text_to_image")],
                "zero_shot": _cell(found["zero_shot"], 1, "top") if "zero_shot" in found else None,
                "gap": None if "modality_gap" not in found else float(found["modality_gap"]),
            }
            for space, found in figures.get("spaces", {}).items()
        ],
        "figures_held_out": not all(part_of(key).startswith("train") for key, _, _ in rows(evaluation)),
        "main_held_out": main is not None and not part_of(main).startswith("train"),
        "headline": {name: _cell(figures[name], 10) for name in DIRECTIONS if name in figures},
        "composed": composed
        and {
            name: _cell(part, 10)
            for name, part in (
                ("both", composed),
                ("image", composed["image_only"]),
                ("text", composed["text_only"]),
            )
        },
        "fused": [
            {"title": title, "value": percent(share), "best": share == max(each for _, each in fused)}
            for title, share in fused
        ],
        "scores": {
            split_title(key): found
            for key, entry in evaluation.items()
            if isinstance(entry, dict) and "localisation" in entry and (found := list(scores_of(entry)))
        },
        "about": evaluation.get("about", {}),
    }


def example_content(loaded: Encoder, dataset: PairDataset, *, seed: int) -> dict[str, Any]:
    """Retrieval examples, heat maps, and queries of an image with a word, from one split."""
    embedded = embed_split(loaded, dataset, limit=EXAMPLE_PICTURES)
    picture = _pictures(dataset, embedded)

    def open_picture(row: int) -> Image.Image:
        return decode(dataset.picture(embedded.rows[row]), dataset.name(embedded.rows[row]))

    captions = [several[0] for several in embedded.captions]
    queries = composed_queries(captions, seed=seed) if has_joint_pass(loaded) else []
    composed = None
    if queries:
        asked = embed_composed(
            cast(JointEncoder, loaded), dataset, embedded, [(one.image, one.word) for one in queries]
        )
        composed = composed_examples(embedded, queries, asked, picture, seed=seed)
    every = max(1, len(embedded.rows) // BANNER)
    return {
        "to_text": image_examples(embedded, picture, seed=seed),
        "to_image": text_examples(embedded, picture, seed=seed),
        "composed_examples": composed,
        "heat": heat_rows(loaded, embedded, open_picture, seed=seed),
        "banner": [(picture(row), embedded.captions[row][0]) for row in range(0, len(embedded.rows), every)][:BANNER],
    }


def about_content(run: Path, data: str | None, shown_as: str) -> dict[str, Any]:
    """Configuration, commands, versions, machine, and the data's attribution."""
    listed = _described(data) if data else {}
    config, began = read_config(run), [described(one) for one in origins(run)]
    return {
        "config": list(flattened(config)),
        "recipe": recipe_of(config),
        "began_with": began,
        "from_scratch": _trainer(config) != "lit" and not _initialised(config) and not began,
        "data_name": listed.get("name"),
        "concepts_apart": _section(listed, "build").get("source") in _DRAWN,
        "splits": _sizes(listed),
        "attribution": credits_of_data(data) if data else [],
        "commands": _commands(listed, config, shown_as),
        "versions": versions(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
    }


def _described(data: str) -> dict[str, Any]:
    """Read `dataset.json` of the data; of several sources, the first one's."""
    listings = [Path(source) / "dataset.json" for source in sources_of(data)]
    listing = next((one for one in listings if one.is_file()), None)
    return bounded_json.load_object(listing.read_bytes(), str(listing)) if listing else {}


def _sizes(described: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Count the images and captions of each split that a data set lists; 0 where it does not say."""
    splits = described.get("splits")
    listed = splits.items() if isinstance(splits, dict) else ()
    return {
        name: {key: count(split.get(key)) for key in ("samples", "captions")}
        for name, split in listed
        if isinstance(split, dict)
    }


def _section(content: dict[str, Any], name: str) -> dict[str, Any]:
    """Return an object within an object; empty where there is none."""
    return found if isinstance(found := content.get(name), dict) else {}


def _trainer(config: dict[str, Any]) -> str:
    """Name of the trainer after `oner-fast train`, recognised by the sections of the configuration."""
    if "alignment" in config:
        return "uta"
    if "contrast" in config:
        return "lit" if "grid" in _section(config, "model") else "clip"
    return "oner"


def _initialised(config: dict[str, Any]) -> bool:
    """Whether a tower began with the weights of another run."""
    return any(_section(config, "contrast").get(name) for name in ("init_image", "init_text"))


def _commands(described: dict[str, Any], config: dict[str, Any], shown_as: str) -> list[str]:
    source, recipe = _section(described, "build").get("source"), recipe_of(config)
    made = [f"oner-fast data {source}"] if source in _DRAWN else []
    chosen = f" --recipe {recipe}" if recipe else ""
    for flag, usual in (("init_from", ("",)), ("resume", ("latest", "none"))):
        given = _section(config, "run").get(flag)
        if isinstance(given, str) and given not in usual:
            chosen += f" --{flag.replace('_', '-')} {shlex.quote(given)}"
    trained = [f"oner-fast train {_trainer(config)}{chosen} --run.run-dir {shown_as}"] if config else []
    return [*made, *trained, f"oner-fast eval {shown_as}", f"oner-fast report {shown_as}"]


def versions() -> list[tuple[str, str]]:
    """Versions of Python and of the relevant packages that are installed."""
    found = [("Python", platform.python_version())]
    for name in PACKAGES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def flattened(config: dict[str, Any], prefix: str = "") -> Sequence[tuple[str, str]]:
    """Flatten a nested configuration to (dotted name, value) lines."""
    lines: list[tuple[str, str]] = []
    for name, value in config.items():
        if isinstance(value, dict):
            lines += flattened(value, f"{prefix}{name}.")
        else:
            lines.append((prefix + name, value if isinstance(value, str) else json.dumps(value)))
    return lines


def _elapsed(seconds: Sequence[float]) -> float | None:
    """Compute the minutes of the whole training from the log, whose clock restarts when a run is resumed."""
    if not seconds:
        return None
    ends = [now for now, after in zip(seconds, [*seconds[1:], 0.0], strict=True) if after < now]
    return sum(ends) / 60


def _gap_facts(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "step": snapshot.step,
        "gap": modality_gap(snapshot.image, snapshot.text),
        "image": spread(snapshot.image),
        "text": spread(snapshot.text),
    }


def _cell(figures: dict[str, Any], k: int, measure: str = "R@") -> dict[str, Any]:
    share, by_chance = float(figures[f"{measure}{k}"]), float(figures[f"chance@{k}"])
    if not (0 <= share <= 1 and 0 <= by_chance <= 1):
        raise ValueError(f"{measure}{k} is {share} and chance@{k} {by_chance}, and shares are needed")
    return {
        "k": k,
        "share": share,
        "chance_share": by_chance,
        "value": percent(share),
        "chance": percent(by_chance),
        "times": times(share, by_chance),
    }


def _pictures(dataset: PairDataset, embedded: SplitEmbeddings) -> Callable[[int], str]:
    @cache
    def picture(row: int) -> str:
        return tile(dataset.read(embedded.rows[row]).image)

    return picture
