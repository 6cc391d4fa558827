"""Train the heads of a LiT-like teacher: `oner-fast train lit`.

Several processes: `PYTHONSAFEPATH=1 torchrun -m oner_fast.train.lit`.
"""

from __future__ import annotations

from collections.abc import Sequence

from oner_fast.boundary import guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    Returns:
        0 done; 128 plus its number (143 for SIGTERM) where a signal ended it and it saved; 1 failed with a sentence.
    """
    return guarded("oner-fast train lit", lambda: _main(argv), extra="train")


def _main(argv: Sequence[str] | None) -> int:
    # Imported here, so that a missing package ends in a sentence too.
    from oner_fast.train.engine.launch import launch
    from oner_fast.train.lit.recipes import DEFAULT
    from oner_fast.train.lit.settings import LiTConfiguration
    from oner_fast.train.lit.training import LiTTraining

    return launch(argv, "oner-fast train lit", LiTConfiguration, DEFAULT, LiTTraining)


if __name__ == "__main__":
    raise SystemExit(main())
