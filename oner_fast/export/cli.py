"""`oner-fast export RUN --to onnx|transformers|plain`: write the model for others, in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

import oner_fast
from oner_fast.boundary import guarded
from oner_fast.evaluation.folder import check_run
from oner_fast.export.folders import Source, check_folder, write_onnx, write_plain, write_transformers
from oner_fast.loading import Loaded


@dataclass(frozen=True)
class Options:
    """Export OneR's tower of a trained run as a folder that needs no oner_fast."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    to: Literal["plain", "transformers", "onnx"]
    """plain: ten lines of PyTorch load it; transformers: AutoModel with trust_remote_code; onnx: four graphs."""
    out: Path | None = None
    """The folder to write; RUN/export/FORM by default. Files of an earlier export there are replaced, others never."""
    precision: Literal["float32", "float16", "int8"] | None = None
    """Form in which ONNX stores the weights; float16 by default. plain and transformers are float32."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status, as `oner_fast.boundary` lists them."""
    return guarded("oner-fast export", lambda: _run(argv), extra="export", interrupted="interrupted; run it again")


def _run(argv: Sequence[str]) -> int:
    options = tyro.cli(Options, args=list(argv), prog="oner-fast export")
    out, errors = export(options)
    for name, error in errors.items():
        print(f"{name}: differs from float32 by {error:.1e} at most")
    size = sum(path.stat().st_size for path in out.iterdir() if path.is_file())
    print(f"wrote {out} ({size / 1e6:.1f} MB); README.md says how to load it")
    return 0


def export(options: Options) -> tuple[Path, dict[str, float]]:
    """Export as the options say.

    Returns:
        The folder, and for ONNX the greatest difference of each graph's embeddings from float32 PyTorch's.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: the run holds another model than OneR's tower, a precision was given for another form than ONNX, or
            the folder holds files that no export wrote.
        OSError: the folder cannot be written.
    """
    check_run(options.run)
    if options.to != "onnx" and options.precision not in (None, "float32"):
        raise ValueError(
            f"--to {options.to} writes float32, got --precision {options.precision}; give --to onnx for it"
        )
    source = Source(options.run, load_oner(options.run))
    out = options.out or options.run / "export" / options.to
    check_folder(
        out, ("config.json", "README.md", "tokenizer.json", "model.safetensors")
    )  # before anything is computed
    if options.to == "plain":
        write_plain(source, out)
        return out, {}
    if options.to == "transformers":
        write_transformers(source, out)
        return out, {}

    from oner_fast.export.onnx_errors import errors, samples
    from oner_fast.export.onnx_graph import WEIGHTS
    from oner_fast.export.onnx_towers import towers

    precision = options.precision or "float16"
    graphs, weights = towers(source.config, source.state, precision)
    found = errors(source.loaded, graphs, weights, *samples(source.loaded, options.run))
    files = {f"{name}.onnx": graph.SerializeToString() for name, graph in graphs.items()}
    write_onnx(source, out, precision, found, {**files, WEIGHTS: weights})
    return out, found


def load_oner(run: Path) -> Loaded:
    """Load a run's tower. Raises ValueError where the run holds another kind of model."""
    loaded = oner_fast.load(run)
    if not isinstance(loaded, Loaded):
        raise ValueError(
            f"{run} holds no tower of OneR; a CLIP of `oner-fast train clip` is in open_clip's form already, and UTA's "
            "student has no text tower of its own to export"
        )
    return loaded
