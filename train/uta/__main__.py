"""Train UTA: `oner-fast train uta`; several processes: `PYTHONSAFEPATH=1 torchrun -m oner_fast.train.uta`."""

from __future__ import annotations

from collections.abc import Sequence

from oner_fast.boundary import guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    Returns:
        0 done; 128 plus its number (143 for SIGTERM) where a signal ended it and it saved; 1 failed with a sentence.
    """
    return guarded("oner-fast train uta", lambda: _main(argv), extra="train")


def _main(argv: Sequence[str] | None) -> int:
    # Imported here, so that a missing package ends in a sentence too.
    from oner_fast.train.engine.launch import launch
    from oner_fast.train.uta.recipes import DEFAULT
    from oner_fast.train.uta.settings import UTAConfiguration
    from oner_fast.train.uta.training import UTATraining

    return launch(argv, "oner-fast train uta", UTAConfiguration, DEFAULT, UTATraining)


if __name__ == "__main__":
    raise SystemExit(main())
