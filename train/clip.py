"""Train a CLIP, or UTA's second stage: ``oner-fast train clip``; several processes: ``PYTHONSAFEPATH=1 torchrun -m
oner_fast.train.clip``."""

from __future__ import annotations

from collections.abc import Sequence

from oner_fast.train import clip_recipes
from oner_fast.train.clip_settings import CLIPTraining
from oner_fast.train.clip_training import ContrastTraining
from oner_fast.train.launch import launch


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 130 and 143 stopped by a signal and saved, 1 a clear
    error."""
    return launch(argv, "oner-fast train clip", CLIPTraining, clip_recipes.DEFAULT, ContrastTraining)


if __name__ == "__main__":
    raise SystemExit(main())
