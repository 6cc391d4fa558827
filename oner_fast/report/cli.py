"""`oner-fast report RUN`: write a self-contained page, RUN/report.html, and its charts as PNG files in RUN/figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

import oner_fast
from oner_fast.atomic import remove_leftovers, write_atomic
from oner_fast.boundary import guarded
from oner_fast.data.dataset import PairDataset
from oner_fast.data.splits import open_split, splits_of
from oner_fast.evaluation.folder import check_run, find_data, refuse_training_pairs, unnamed_split
from oner_fast.evaluation.record import read_figures


@dataclass(frozen=True)
class Options:
    """Write the report of a trained run: RUN/report.html, which needs no other file, and PNG files in RUN/figures."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    data: str | None = None
    """Data that the examples come from, in any form that --train-data takes; the run's own by default."""
    split: str | None = None
    """Split that the examples come from; by default `val`, or else the training pairs, which the page then says."""
    device: str = "cpu"
    """Device of the model: cpu, cuda, cuda:1, ..."""
    seed: int = 0
    """Seed that chooses the examples."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status, as `oner_fast.boundary` lists them."""
    return guarded(
        "oner-fast report", lambda: _run(argv), extra="demo", interrupted="interrupted; the page was not written"
    )


def _run(argv: Sequence[str]) -> int:
    path = report(tyro.cli(Options, args=list(argv), prog="oner-fast report"))
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB) and {len(list(figures_folder(path.parent)))} figures")
    return 0


def report(options: Options, loaded: Any = None) -> Path:
    """Write the report and return its path. `loaded` avoids loading the model again."""
    check_run(options.run)
    data, split, dataset = _examples(options)

    from oner_fast.evaluation.run import has_joint_pass
    from oner_fast.report import content, gallery
    from oner_fast.report.page import render

    figures = options.run / "figures"
    figures.mkdir(exist_ok=True)
    for folder in (options.run, figures):
        remove_leftovers(folder)
    loaded = loaded or oner_fast.load(options.run, options.device)
    name = options.run.resolve().name
    shown_as = str(options.run) if not options.run.is_absolute() else name
    about = content.about_content(options.run, data, shown_as)
    examples = content.example_content(loaded, dataset, seed=options.seed)
    page = render(
        {
            "name": name,
            "split": split,
            "examples_held_out": split != "train",
            "seed": options.seed,
            **content.training_content(options.run, figures),
            **content.evaluation_content(read_figures(options.run)),
            **examples,
            "made": about,
            "parameters": _parameters(loaded),
            "one_tower": has_joint_pass(loaded),
        }
    )
    gallery.write(examples, figures)
    path = options.run / "report.html"
    write_atomic(path, lambda file: file.write(page.encode("utf-8", "replace")))
    return path


def _examples(options: Options) -> tuple[str, str, PairDataset]:
    """Find the data and the split that the examples come from, and open them.

    Raises ValueError where the data lack the split, or another split than `train` holds pairs of the training.
    """
    data = find_data(options.run, options.data)
    unnamed = unnamed_split(options.run, data)
    known = splits_of(data, unnamed)
    split = options.split or ("train" if known == ["train"] else "val")
    if split not in known:
        raise ValueError(f"{data} has no split {split!r}; it has {', '.join(known)}: give --split or --data")
    dataset = open_split(data, split, unnamed)
    if split != "train":
        refuse_training_pairs(options.run, dataset)
    return data, split, dataset


def figures_folder(run: Path) -> list[Path]:
    """List the PNG files of a report."""
    return sorted((run / "figures").glob("*.png"))


def _parameters(loaded: Any) -> int | None:
    model = getattr(loaded, "model", None)
    return sum(weights.numel() for weights in model.parameters()) if isinstance(model, torch.nn.Module) else None
