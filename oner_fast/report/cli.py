"""`oner-fast report RUN`: write a self-contained page, RUN/report.html, and its charts as PNG files in RUN/figures."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

import oner_fast
from oner_fast.evaluation.folder import check_run, find_data


@dataclass(frozen=True)
class Options:
    """Write the report of a trained run: RUN/report.html, which needs no other file, and PNG files in RUN/figures."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    data: tuple[str, ...] = ()
    """Data that the examples come from, as `--train-data` takes them; the run's own validation data by default."""
    split: str = ""
    """Split that the examples come from; `val`, or else the first that is held out, by default."""
    device: str = "cpu"
    """Device of the model: cpu, cuda, cuda:1, ..."""
    seed: int = 0
    """Seed that chooses the examples."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    options = tyro.cli(Options, args=list(argv), prog="oner-fast report")
    try:
        path = report(options)
    except KeyboardInterrupt:
        print("oner-fast report: interrupted; the page was not written", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f"oner-fast report: {error}", file=sys.stderr)
        return 2
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB) and {len(list(figures_folder(path.parent)))} figures")
    return 0


def report(options: Options, loaded: Any = None) -> Path:
    """Write the report and return its path. `loaded` avoids loading the model again."""
    check_run(options.run)
    data = find_data(options.run, options.data)

    from oner_fast.evaluation.records import read_evaluation
    from oner_fast.evaluation.run import has_joint_pass
    from oner_fast.report import content, gallery
    from oner_fast.report.page import render

    held_out = data.held_out([options.split] if options.split else ())
    split = "val" if "val" in held_out else held_out[0]
    dataset = data.open(split)
    figures = options.run / "figures"
    figures.mkdir(exist_ok=True)
    loaded = loaded or oner_fast.load(options.run, options.device)
    name = options.run.resolve().name
    shown_as = str(options.run) if not options.run.is_absolute() else name
    about = content.about_content(options.run, data.folder, shown_as)
    examples = content.example_content(loaded, dataset, seed=options.seed)
    page = render(
        {
            "name": name,
            "split": split,
            "seed": options.seed,
            **content.training_content(options.run, figures),
            **content.evaluation_content(read_evaluation(options.run)),
            **examples,
            "made": about,
            "parameters": _parameters(loaded),
            "one_tower": has_joint_pass(loaded),
        }
    )
    gallery.write(examples, figures)
    path = options.run / "report.html"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


def figures_folder(run: Path) -> list[Path]:
    """List the PNG files of a report."""
    return sorted((run / "figures").glob("*.png"))


def _parameters(loaded: Any) -> int | None:
    model = getattr(loaded, "model", None)
    return sum(weights.numel() for weights in model.parameters()) if isinstance(model, torch.nn.Module) else None
