"""Train OneR: `oner-fast train oner`; several processes: `PYTHONSAFEPATH=1 torchrun -m oner_fast.train.oner`."""

from __future__ import annotations

from collections.abc import Sequence

from oner_fast.boundary import guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    Returns:
        0 done; 128 plus its number (143 for SIGTERM) where a signal ended it and it saved; 1 failed with a sentence.
    """
    return guarded("oner-fast train oner", lambda: _main(argv), extra="train")


def _main(argv: Sequence[str] | None) -> int:
    # Imported here, so that a missing package ends in a sentence too.
    from oner_fast.train.engine.launch import launch
    from oner_fast.train.oner.recipes import DEFAULT
    from oner_fast.train.oner.settings import OneRConfiguration
    from oner_fast.train.oner.training import OneRTraining

    return launch(argv, "oner-fast train oner", OneRConfiguration, DEFAULT, OneRTraining)


if __name__ == "__main__":
    raise SystemExit(main())
