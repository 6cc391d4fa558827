"""`oner-fast bench step`: compare one OneR step with the same step in plain PyTorch, eager and compiled."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from oner_fast.benchmarks import machine
from oner_fast.benchmarks.measure import Settings
from oner_fast.benchmarks.rows import Row
from oner_fast.benchmarks.step.baseline import PlainStep
from oner_fast.benchmarks.step.contest import Tell, contest
from oner_fast.benchmarks.step.ours import OurStep
from oner_fast.benchmarks.step.setting import synthetic_batch, vitb16
from oner_fast.benchmarks.step.shares import Share
from oner_fast.train.engine.allocator import freed_memory_kept
from oner_fast.train.oner.flops import step_flops
from oner_fast.train.oner.settings import OneRConfiguration

DTYPES = {"fp32": None, "bf16": torch.bfloat16}
# Relative tolerances of the losses and of each gradient's L2 distance. bfloat16 rounds to 2^-9 in each layer.
TOLERANCES = {"fp32": (1e-4, 1e-3), "bf16": (1e-2, 0.2)}
TARGET = 1.3


@freed_memory_kept()
def measure(
    dtype: str,
    config: OneRConfiguration | None = None,
    *,
    rounds: int = 5,
    compiled: bool = True,
    tell: Tell = lambda text: None,
) -> tuple[Row, dict[str, list[Share]]]:
    """Check that all candidates compute the same step, then time them in turn; return the row and each one's shares.

    All candidates, the plain ones too, run with the trainer's memory settings (`freed_memory_kept`).

    Args:
        dtype: "fp32", or "bf16" for autocast of every candidate.
        config: the configuration; ViT-B/16 at 224 px with 8 pairs by default.
        rounds: samples of each candidate.
        compiled: measure the compiled baseline too.
        tell: called with the current work.
    """
    config = vitb16() if config is None else config
    batch = synthetic_batch(config)
    model, lengths = config.model, batch.text.lengths
    shape = (
        f"width {model.width}, {model.depth} layers, {len(batch)} pairs, {model.image_size} px, "
        f"{int(lengths.min())} to {int(lengths.max())} tokens"
    )
    row = Row("step", shape, dtype, served="oner_fast.train", target={"speedup": TARGET})
    ours = OurStep(config, batch, DTYPES[dtype])
    plain = [PlainStep(ours, DTYPES[dtype])]
    if compiled:
        plain.append(PlainStep(ours, DTYPES[dtype], compiled=True))
    found = contest(
        row, ours, plain, tolerances=TOLERANCES[dtype], flops=step_flops(config, batch), dtype=DTYPES[dtype],
        rounds=rounds, tell=lambda text: tell(f"{dtype}: {text}"),
    )  # fmt: skip
    return row, found


def markdown(row: Row, found: Mapping[str, Sequence[Share]]) -> str:
    """Format the row as tables: seconds and ratios, then the shares."""
    lines = [f"### {row.op}, {row.shape}, {row.dtype}", "", "| step | p20 s | p50 s | p80 s |", "|---|---|---|---|"]
    lines += [f"| {name} | {one.p20:.3f} | {one.p50:.3f} | {one.p80:.3f} |" for name, one in row.times.items()]
    if row.speedup and row.speedup_eager:
        best, eager = row.speedup, row.speedup_eager
        lines += [
            "",
            f"Ours is {best.p50:.2f}x the fastest plain one ({row.best}; p20 {best.p20:.2f}, p80 {best.p80:.2f}) and "
            f"{eager.p50:.2f}x the eager one. It does {row.rate / 1e9:.0f} GFLOP/s; the machine's best product "
            f"{row.limit_rate / 1e9:.0f}.",
        ]
    lines += ["", f"| kind | {' | '.join(f'{name}: ms | %' for name in found)} |", "|---|" + "---|---|" * len(found)]
    by_kind = [{share.kind: share for share in parts} for parts in found.values()]
    for kind in dict.fromkeys(share.kind for parts in found.values() for share in parts):
        cells = []
        for each in by_kind:
            one = each.get(kind)
            cells += ["", ""] if one is None else [f"{1000 * one.seconds:.0f}", f"{100 * one.share:.1f}"]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join([*lines, *(f"refused: {why}" for why in row.refused.values())]) + "\n"


def rows(settings: Settings, tell: Tell) -> Iterator[Row]:
    """Yield the step's rows for the report of `oner-fast bench ops`; none on a GPU, which has no baseline here."""
    if settings.device == "cpu":
        for dtype in DTYPES:
            yield measure(dtype, tell=tell)[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="oner-fast bench step", description=__doc__)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=5, help="samples of each candidate")
    parser.add_argument("--depth", type=int, default=None, help="layers; 12 by default")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled baseline")
    parser.add_argument("--json", type=Path, default=None, help="JSON file for the figures")
    arguments = parser.parse_args(argv)
    config = vitb16()
    if arguments.depth is not None:
        config = replace(config, model=replace(config.model, depth=arguments.depth))
    here = machine.describe()
    print(here.line(), flush=True)
    measured: list[Row] = []
    for dtype in arguments.dtypes:
        tell = partial(print, flush=True)
        row, found = measure(dtype, config, rounds=arguments.rounds, compiled=not arguments.no_compile, tell=tell)
        measured.append(row)
        print(markdown(row, found), flush=True)
    if arguments.json is not None:
        text = json.dumps({"machine": here.as_dict(), "rows": [row.as_dict() for row in measured]}, indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    return 1 if any(row.wrong for row in measured) else 0
