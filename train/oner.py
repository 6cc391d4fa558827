"""Train OneR: ``oner-fast train oner``; several processes: ``PYTHONSAFEPATH=1 torchrun -m oner_fast.train.oner``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from oner_fast.train import config as configuration
from oner_fast.train import distributed, recipes
from oner_fast.train.loop import Training
from oner_fast.train.memory import freed_memory_kept
from oner_fast.train.nonfinite import NonFiniteError
from oner_fast.train.settings import OneRTraining
from oner_fast.train.signals import stop_on_signals

_EXIT = {"SIGINT": 130, "SIGTERM": 143}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 130 and 143 stopped by a signal and saved, 1 a clear
    error."""
    arguments = sys.argv[1:] if argv is None else argv
    config: OneRTraining = configuration.parse(arguments, recipes.DEFAULT, "oner-fast train oner")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        return train(config)
    except (ValueError, FileNotFoundError, NonFiniteError) as error:
        print(f"oner-fast train oner: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("oner-fast train oner: stopped without saving; the last checkpoint stands", file=sys.stderr)
        return _EXIT["SIGINT"]


def train(config: OneRTraining) -> int:
    """Carry out ``config``; the exit status as of :func:`main`."""
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    torch.use_deterministic_algorithms(config.run.deterministic)
    # Filling every fresh tensor with NaN costs time, and no op of a step reads memory that it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    world = distributed.setup(config.run.device)
    try:
        with freed_memory_kept() if world.device.type == "cpu" else nullcontext(), stop_on_signals() as stop:
            signal = Training(config, world).run(stop)
    finally:
        distributed.shutdown()
    return 0 if signal is None else _EXIT[signal]


if __name__ == "__main__":
    raise SystemExit(main())
