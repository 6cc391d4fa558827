"""Run a training from its command line to its exit status."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from oner_fast.boundary import guarded
from oner_fast.train.config.command_line import DRY_RUN, parse
from oner_fast.train.engine import distributed
from oner_fast.train.engine.allocator import freed_memory_kept
from oner_fast.train.engine.dry_run import dry_run
from oner_fast.train.engine.loop import C, Training
from oner_fast.train.engine.lost_ranks import lost_ranks_named
from oner_fast.train.engine.run_lock import single_writer
from oner_fast.train.engine.signals import exit_status, stop_on_signals
from oner_fast.train.engine.starting import nothing_left_by_a_failed_start


def launch(
    argv: Sequence[str] | None,
    prog: str,
    kind: type[C],
    default_recipe: str,
    build: type[Training[C]],
) -> int:
    """Parse the command line and train.

    Args:
        argv: the arguments without the program's name; None takes those of `sys.argv`.
        prog: the program's name in messages.
        kind: the dataclass of the configuration; recipes of other kinds are refused.
        default_recipe: the recipe used without `--recipe`.
        build: the class of the training.

    Returns:
        0 done; 128 plus its number (143 for SIGTERM) where a signal ended it and it saved; 1 failed with a sentence.
    """
    return guarded(
        prog,
        lambda: _launch(argv, prog, kind, default_recipe, build),
        extra="train",
        interrupted="stopped without saving; the last checkpoint is unchanged",
    )


def _launch(argv: Sequence[str] | None, prog: str, kind: type[C], default_recipe: str, build: type[Training[C]]) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    dry = DRY_RUN in words
    config: C = parse([word for word in words if word != DRY_RUN], default_recipe, prog, kind)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    return train(config, build, dry)


def train(config: C, build: type[Training[C]], dry: bool = False) -> int:
    """Train from the last checkpoint to the end in this process, as `launch` does after parsing.

    Args:
        config: the configuration.
        build: the class of the training.
        dry: take a few steps and report memory, pace and hours instead.

    Returns:
        0 done; 128 plus its number where a signal ended it and it saved.
    """
    torch.use_deterministic_algorithms(config.run.deterministic)
    # Filling every fresh tensor with NaN costs time, and no op of a step reads memory that it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # A long product in several slices, as a weight's gradient is, adds the slices in float32.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cudnn.allow_tf32 = False  # as PyTorch's matrix products have it
    world = distributed.setup(config.run.device, timeout_seconds=config.run.collective_timeout)
    try:
        with (
            freed_memory_kept() if world.device.type == "cpu" else nullcontext(),
            lost_ranks_named(world, config.run.collective_timeout),
        ):
            if dry:
                found = dry_run(config, build, world)
                if world.is_main:
                    print(found.report(config.optim.steps, world.device))
                return 0
            folder = Path(config.run.run_dir)
            with (
                stop_on_signals() as stop,
                single_writer(folder, world),
                nothing_left_by_a_failed_start(folder, world.is_main),
            ):
                signal = build(config, world).run(stop)
    finally:
        distributed.shutdown()
    return 0 if signal is None else exit_status(signal)
