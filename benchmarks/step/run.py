"""``oner-fast bench step``: one OneR step against the same step in plain PyTorch, eager and compiled."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from oner_fast.benchmarks import machine
from oner_fast.benchmarks.step.agreement import check
from oner_fast.benchmarks.step.baseline import PlainStep
from oner_fast.benchmarks.step.ours import OurStep
from oner_fast.benchmarks.step.setting import synthetic_batch, vitb16
from oner_fast.benchmarks.step.shares import Share, shares
from oner_fast.benchmarks.timing import Candidate, Ratio, Samples, best, interleave, ratio
from oner_fast.train.memory import keep_freed_memory
from oner_fast.train.settings import OneRTraining

DTYPES = {"fp32": None, "bf16": torch.bfloat16}
# Relative: the losses, and the L2 distance of each gradient. bfloat16 rounds to 2^-9 in every layer.
TOLERANCES = {"fp32": (1e-4, 1e-3), "bf16": (1e-2, 0.2)}
EAGER = "plain, eager"
Tell = Callable[[str], None]


@dataclass(frozen=True)
class StepRow:
    """One measured step.

    Attributes:
        name: the model and the batch.
        dtype: "fp32" or "bf16" (autocast).
        samples: seconds by candidate: "ours", "plain, eager", "plain, compiled".
        best_baseline: the faster of the plain ones.
        speedup: of ours over that one.
        speedup_eager: of ours over the eager one.
        shares: of each profiled candidate's step, by kind of operation.
    """

    name: str
    dtype: str
    samples: dict[str, Samples]
    best_baseline: str
    speedup: Ratio
    speedup_eager: Ratio
    shares: dict[str, list[Share]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure(
    dtype: str,
    config: OneRTraining | None = None,
    *,
    rounds: int = 5,
    compiled: bool = True,
    tell: Tell = lambda text: None,
) -> StepRow:
    """Check that all candidates compute the same step, then measure them in turn.

    Args:
        dtype: "fp32", or "bf16": autocast of every candidate.
        config: what is trained; ViT-B/16 at 224 px with 8 pairs by default.
        rounds: samples of each candidate.
        compiled: measure the compiled baseline too (it compiles for about a minute).
        tell: told what is done now.

    Raises:
        Disagreement: a candidate computes something else; nothing is measured then.
    """
    config = vitb16() if config is None else config
    batch = synthetic_batch(config)
    keep_freed_memory()
    ours = OurStep(config, batch, DTYPES[dtype])
    plain = [PlainStep(ours, DTYPES[dtype])]
    if compiled:
        plain.append(PlainStep(ours, DTYPES[dtype], compiled=True))
    for each in plain:
        tell(f"{dtype}: checking {each.name} against ours")
        check(ours, each, *TOLERANCES[dtype])
    steps: list[OurStep | PlainStep] = [ours, *plain]
    samples = interleave([Candidate(each.name, each) for each in steps], rounds=rounds, progress=tell)
    best_plain = best({name: one for name, one in samples.items() if name != ours.name})
    tell(f"{dtype}: profiling")
    model, lengths = config.model, batch.text.lengths
    return StepRow(
        name=(
            f"OneR step, width {model.width}, {model.depth} layers, {len(batch)} pairs of {model.image_size} px and "
            f"{int(lengths.min())} to {int(lengths.max())} tokens"
        ),
        dtype=dtype,
        samples=samples,
        best_baseline=best_plain.name,
        speedup=ratio(best_plain, samples[ours.name]),
        speedup_eager=ratio(samples[EAGER], samples[ours.name]),
        shares={each.name: shares(each) for each in steps},
    )


def markdown(row: StepRow) -> str:
    """The row as tables: seconds and ratios, then the shares."""
    lines = [f"### {row.name}, {row.dtype}", "", "| step | p20 s | p50 s | p80 s |", "|---|---|---|---|"]
    lines += [f"| {one.name} | {one.p20:.3f} | {one.p50:.3f} | {one.p80:.3f} |" for one in row.samples.values()]
    lines += [
        "",
        f"Ours is {row.speedup.p50:.2f}x the best baseline ({row.best_baseline}; p20 {row.speedup.p20:.2f}, "
        f"p80 {row.speedup.p80:.2f}) and {row.speedup_eager.p50:.2f}x the eager one.",
        "",
        f"| kind | {' | '.join(f'{name}: ms | %' for name in row.shares)} |",
        "|---|" + "---|---|" * len(row.shares),
    ]
    by_kind = {name: {share.kind: share for share in found} for name, found in row.shares.items()}
    for kind in dict.fromkeys(share.kind for found in row.shares.values() for share in found):
        cells = []
        for found in by_kind.values():
            share = found.get(kind)
            cells += ["", ""] if share is None else [f"{1000 * share.seconds:.0f}", f"{100 * share.share:.1f}"]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="oner-fast bench step", description=__doc__)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=5, help="samples of each candidate")
    parser.add_argument("--depth", type=int, default=None, help="layers; 12 by default")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled baseline")
    parser.add_argument("--json", type=Path, default=None, help="write the figures there")
    arguments = parser.parse_args(argv)
    config = vitb16()
    if arguments.depth is not None:
        config = replace(config, model=replace(config.model, depth=arguments.depth))
    here = machine.describe()
    print(here.line(), flush=True)
    rows = []
    for dtype in arguments.dtypes:
        tell = partial(print, flush=True)
        rows.append(measure(dtype, config, rounds=arguments.rounds, compiled=not arguments.no_compile, tell=tell))
        print(markdown(rows[-1]), flush=True)
    if arguments.json is not None:
        text = json.dumps({"machine": here.as_dict(), "rows": [row.as_dict() for row in rows]}, indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    return 0
