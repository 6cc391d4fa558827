"""Train OneR: ``oner-fast train oner``; several processes: ``PYTHONSAFEPATH=1 torchrun -m oner_fast.train.oner``."""

from __future__ import annotations

from collections.abc import Sequence

from oner_fast.train import recipes
from oner_fast.train.launch import launch
from oner_fast.train.oner_training import TowerTraining
from oner_fast.train.settings import OneRTraining


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 130 and 143 stopped by a signal and saved, 1 a clear
    error."""
    return launch(argv, "oner-fast train oner", OneRTraining, recipes.DEFAULT, TowerTraining)


if __name__ == "__main__":
    raise SystemExit(main())
