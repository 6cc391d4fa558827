"""The parts of the first run, in order, and the process that runs one of them."""

from __future__ import annotations

import argparse
import importlib
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from oner_fast.benchmarks.first_gpu.record import Record

SELF = "oner_fast.benchmarks.first_gpu.parts"


@dataclass(frozen=True)
class Part:
    """One part of the run.

    Args:
        name: its name on the command line and of its files.
        title: what it does, for the summary.
        module: module of this package whose `run(record, setting)` does it.
        seconds: its time limit; what earlier parts left of theirs is added.
        interpreted: whether a rehearsal runs it with Triton's interpreter.
    """

    name: str
    title: str
    module: str
    seconds: float
    interpreted: bool = False


PARTS = (
    Part("doctor", "import, versions, and what serves each op", "doctoring", 30),
    Part("ops", "each op against float64", "exactness", 110, interpreted=True),
    Part("step", "one OneR step: MFU and trace", "training_step", 80),
    Part("speed", "ops against SDPA, torch varlen and torch.compile", "speed", 130),
    Part("counters", "ncu's counters beside the emulator's", "counters", 70),
    Part("tests", "the tests that need a GPU", "testing", 100),
)
TOTAL = sum(part.seconds for part in PARTS)
"""Seconds of all parts together, which nine minutes hold."""
REHEARSAL = 300.0
"""The time limit of a part in a rehearsal, which takes seconds on an idle machine."""


@dataclass(frozen=True)
class Setting:
    """Setting of a part: the folder of its files, the device, and whether this is a rehearsal without a GPU."""

    out: Path
    device: str
    rehearse: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run one part in this process; returns 1 where it found something wrong."""
    parser = argparse.ArgumentParser(prog=SELF)
    parser.add_argument("part", choices=[part.name for part in PARTS])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(argv)
    part = next(each for each in PARTS if each.name == options.part)
    record = Record(options.out / f"{part.name}.json", part.name, options.seconds)
    setting = Setting(options.out, "cpu" if options.rehearse else "cuda", options.rehearse)
    try:
        importlib.import_module(f"oner_fast.benchmarks.first_gpu.{part.module}").run(record, setting)
    except Exception as error:
        traceback.print_exc()
        record.fail(f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:300]}")
    record.finish()
    return int(bool(record.found.failures))


if __name__ == "__main__":
    raise SystemExit(main())
