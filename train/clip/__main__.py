"""Train a CLIP, or UTA's second stage: `oner-fast train clip`.

Several processes: `PYTHONSAFEPATH=1 torchrun -m oner_fast.train.clip`.
"""

from __future__ import annotations

from collections.abc import Sequence

from oner_fast.boundary import guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    Returns:
        0 done; 128 plus its number (143 for SIGTERM) where a signal ended it and it saved; 1 failed with a sentence.
    """
    return guarded("oner-fast train clip", lambda: _main(argv), extra="train")


def _main(argv: Sequence[str] | None) -> int:
    # Imported here, so that a missing package ends in a sentence too.
    from oner_fast.train.clip.recipes import DEFAULT
    from oner_fast.train.clip.settings import CLIPConfiguration
    from oner_fast.train.clip.training import CLIPTraining
    from oner_fast.train.engine.launch import launch

    return launch(argv, "oner-fast train clip", CLIPConfiguration, DEFAULT, CLIPTraining)


if __name__ == "__main__":
    raise SystemExit(main())
