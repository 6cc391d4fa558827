"""`oner-fast budget RECIPE --step`: an ESTIMATE of one training step on GPUs, part by part, +-30 %.

FLOPs, bytes, hops and waits are counted from the recipe and the code. Rates and efficiencies are assumptions, which the
output names. Three states are compared: before the techniques that it lists, now (what the code has), and after all.
No GPU is needed, and nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from oner_fast.atomic import write_atomic
from oner_fast.budget import sizes
from oner_fast.budget.machine import MACHINES
from oner_fast.budget.parts import Estimate, Setting, estimate
from oner_fast.budget.report import Report, replaced
from oner_fast.budget.techniques import State
from oner_fast.budget.workload import expected
from oner_fast.train.config.registry import UnknownRecipe, get_recipe
from oner_fast.train.oner.settings import OneRConfiguration

COMMAND = "oner-fast budget"
STATES: tuple[State, ...] = get_args(State)


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command."""
    made = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("recipe", help="a recipe of OneR, such as oner_vitb16_4m_a100x32, or FILE.py:NAME")
    made.add_argument("--step", action="store_true", required=True, help="estimate a step, part by part")
    made.add_argument("--gpu", choices=list(MACHINES), default="A100", help="the GPU (A100)")
    made.add_argument("--ranks", type=int, help="number of GPUs (by default that at the end of the recipe's name)")
    made.add_argument("--caption-tokens", type=int, default=16, help="mean tokens of a caption (16)")
    made.add_argument("--as-of", choices=STATES, help="one state alone, with the count of each part")
    made.add_argument("--json", type=Path, help="write the figures to this file too")
    made.add_argument("--page", type=Path, help="replace the estimate in this Markdown page by this one")
    return made


def main(argv: Sequence[str]) -> int:
    """Print the estimate; returns 2 for bad input."""
    options = parser().parse_args(argv)
    try:
        page = "" if options.page is None else options.page.read_text(encoding="utf-8")
        setting = setting_of(options.recipe, options.gpu, options.ranks, options.caption_tokens)
        report = Report(options.recipe, setting, {state: estimate(setting, state) for state in STATES})
        page = page and replaced(page, report)
    except (UnknownRecipe, ValueError, OSError) as error:
        print(f"{COMMAND}: {error}", file=sys.stderr)
        return 2
    print(report.detailed(options.as_of) if options.as_of else report.compared())
    if options.json is not None:
        write_atomic(options.json, lambda file: file.write(as_json(report).encode()))
    if options.page is not None:
        write_atomic(options.page, lambda file: file.write(page.encode()))
    return 0


def setting_of(recipe: str, gpu: str, ranks: int | None, caption_tokens: int) -> Setting:
    """Count a recipe's step.

    Raises:
        UnknownRecipe: there is no such recipe of OneR.
        ValueError: the batch cannot be divided among the ranks, or captions are too long.
    """
    config: OneRConfiguration = get_recipe(recipe, OneRConfiguration)
    if ranks is None:
        named = re.search(r"x(\d+)$", recipe)
        ranks = int(named[1]) if named else 1
    if ranks < 1:
        raise ValueError(f"--ranks must be at least 1, got {ranks}")
    work = expected(config, ranks, caption_tokens)
    return Setting(work, MACHINES[gpu], ranks, *sizes.parameters(config), sizes.operations(config))


def as_json(report: Report) -> str:
    """Return the figures as JSON, with every assumption."""

    def plain(one: Estimate) -> dict[str, object]:
        return {**asdict(one), "seconds": one.seconds, "mfu": one.mfu}

    data = {
        "estimate": True,
        "error": "+-30 %",
        "recipe": report.recipe,
        "ranks": report.setting.ranks,
        "machine": asdict(report.setting.machine),
        "assumptions": asdict(report.setting.assumed),
        "states": {state: plain(one) for state, one in report.found.items()},
    }
    return json.dumps(data, indent=1) + "\n"
