"""The ranks of a training (`oner_fast.process_group`), and the facts that they must share."""

from __future__ import annotations

from typing import Any

import torch

from oner_fast.process_group import World, barrier, is_main, on_main, setup, shutdown, sum_over_ranks

__all__ = ["World", "barrier", "is_main", "on_main", "require_same", "setup", "shutdown", "sum_over_ranks"]


def require_same(world: World, facts: dict[str, Any]) -> None:
    """Compare the facts that every rank must share; every rank calls this, and every rank raises where one differs.

    Args:
        world: this process's place.
        facts: values by name, which can be pickled and compared.

    Raises:
        ValueError: a rank has other facts than rank 0; that rank's message names them, and the others' name the rank.
    """
    if world.size == 1:
        return
    main = on_main(world, lambda: facts)
    names = sorted(name for name in main.keys() | facts.keys() if main.get(name) != facts.get(name))
    votes = torch.zeros(world.size, dtype=torch.int32)
    votes[world.rank] = bool(names)
    differing = sum_over_ranks(votes).nonzero().flatten().tolist()
    if names:
        shown = ", ".join(f"{name} {main.get(name)} -> {facts.get(name)}" for name in names)
        raise ValueError(f"rank {world.rank} has other settings or data than rank 0 ({shown}); start every rank alike")
    if differing:
        raise ValueError(
            f"rank {', '.join(map(str, differing))} has other settings or data than rank 0; its own output names them"
        )
