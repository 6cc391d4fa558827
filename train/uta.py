"""Train UTA: ``oner-fast train uta``; several processes: ``PYTHONSAFEPATH=1 torchrun -m oner_fast.train.uta``."""

from __future__ import annotations

from collections.abc import Sequence

from oner_fast.train import uta_recipes
from oner_fast.train.launch import launch
from oner_fast.train.uta_settings import UTATraining
from oner_fast.train.uta_training import StudentTraining


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 130 and 143 stopped by a signal and saved, 1 a clear
    error."""
    return launch(argv, "oner-fast train uta", UTATraining, uta_recipes.DEFAULT, StudentTraining)


if __name__ == "__main__":
    raise SystemExit(main())
