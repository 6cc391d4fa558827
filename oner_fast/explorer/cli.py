"""`oner-fast explore RUN`: write one page, RUN/explorer.html, in which the model searches the run's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from oner_fast.atomic import write_atomic
from oner_fast.boundary import guarded
from oner_fast.data.dataset import sources_of
from oner_fast.data.splits import open_split, splits_of
from oner_fast.evaluation.folder import check_run, find_data, unnamed_split
from oner_fast.evaluation.record import read_figures
from oner_fast.evaluation.table import DIRECTIONS, percent, rows, split_title
from oner_fast.export.cli import load_oner
from oner_fast.export.convert import plain_config, plain_state
from oner_fast.report.attribution import credits_of_data

MOST_BYTES = 40_000_000
"""Greatest size of a page."""


@dataclass(frozen=True)
class Options:
    """Write a page that searches pictures by text and runs the model itself; it needs no server and no network."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder of OneR's tower."""
    data: str | None = None
    """Data whose pictures are searched, in any form that --train-data takes; the run's own by default."""
    split: str | None = None
    """Split whose pictures are searched; by default the first that was not trained on."""
    limit: int = 3000
    """Greatest number of pictures; of a larger split, as many are taken evenly spaced."""
    precision: Literal["float24", "float16", "int8"] | None = None
    """Form in which the page stores the weights; the most exact that keeps it under 40 MB by default."""
    out: Path | None = None
    """The page to write; RUN/explorer.html by default."""
    runtime: Path | None = None
    """Tarball of onnxruntime-web, where npm cannot fetch it; it is fetched once and kept by default."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status, as `oner_fast.boundary` lists them."""
    return guarded(
        "oner-fast explore", lambda: _run(argv), extra="export", interrupted="interrupted; the page was not written"
    )


def _run(argv: Sequence[str]) -> int:
    path, errors = explore(tyro.cli(Options, args=list(argv), prog="oner-fast explore"))
    for name, error in errors.items():
        print(f"{name}: differs from float32 by {error:.1e} at most")
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB); open it in a browser")
    return 0


def explore(options: Options) -> tuple[Path, dict[str, float]]:
    """Write the page.

    Returns:
        Its path, and the greatest difference of each graph's embeddings from float32 PyTorch's.

    Raises:
        FileNotFoundError: the run, its data or the tarball is missing.
        ValueError: the run holds another model than OneR's tower, the data lack the split, onnxruntime-web cannot be
            had, or the page would be too large.
        OSError: the page cannot be written.
    """
    check_run(options.run)
    data = find_data(options.run, options.data)
    unnamed = unnamed_split(options.run, data)
    known = splits_of(data, unnamed)
    split = options.split or next((name for name in known if name != "train"), known[0])
    if split not in known:
        raise ValueError(f"{data} has no split {split!r}; it has {', '.join(known)}: give --split or --data")
    loaded = load_oner(options.run)

    from oner_fast.explorer.library import build_library
    from oner_fast.explorer.model_weights import PRECISIONS, stored
    from oner_fast.explorer.page import render
    from oner_fast.explorer.runtime import find_runtime
    from oner_fast.export.onnx_errors import errors, samples

    runtime = find_runtime(options.runtime)
    config, state = plain_config(loaded.config), plain_state(loaded.model)
    library = build_library(loaded, open_split(data, split, unnamed), options.limit)
    parameters = sum(tensor.numel() for tensor in state.values())
    about = {
        "name": options.run.resolve().name,
        "data": f"{' and '.join(dict.fromkeys(Path(source).name for source in sources_of(data)))}, {split}",
        "millions": f"{parameters / 1e6:.1f}",
        "figures": _figures(read_figures(options.run)),
        "credits": credits_of_data(data),
    }
    for precision in [options.precision] if options.precision else PRECISIONS:
        graphs, weights = stored(config, state, precision)
        wanted = {name: graph.SerializeToString() for name, graph in graphs.items()}
        page = render(library, runtime, wanted, weights, config, loaded.tokenizer.to_json(), about).encode(
            "utf-8", "replace"
        )
        if len(page) <= MOST_BYTES:
            break
    else:
        smaller = "" if precision == "int8" else ", or --precision int8"
        raise ValueError(
            f"the page would have {len(page) / 1e6:.0f} MB with weights in {precision}, and {MOST_BYTES / 1e6:.0f} MB "
            f"are the most; the pictures take {sum(len(one['source']) for one in library.pictures) / 1e6:.0f} MB: give "
            f"a smaller --limit{smaller}"
        )
    path = options.out or options.run / "explorer.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: file.write(page))
    return path, errors(loaded, graphs, weights.content, *samples(loaded, options.run))


def _figures(record: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "split": split_title(split),
            "direction": DIRECTIONS[direction],
            "first": percent(figures["R@1"]),
            "tenth": percent(figures["R@10"]),
            "chance": percent(figures["chance@10"]),
        }
        for split, direction, figures in rows(record)
        if {"R@1", "R@10", "chance@10"} <= figures.keys()
    ]
