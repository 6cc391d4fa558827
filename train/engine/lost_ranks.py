"""Name the ranks that a collective waited for in vain."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from oner_fast.train.engine.distributed import World

_KEY = "oner_fast/failed/{}"
_WAIT = 10.0
"""Seconds in which the other ranks that are alive must notice the failure too."""
_WORDS = ("gloo", "nccl", "connection closed by peer", "connection reset", "process group")


class LostRank(RuntimeError):
    """A collective failed because a rank ended, hangs or is stopped."""


@contextmanager
def lost_ranks_named(world: World, timeout_seconds: float) -> Iterator[None]:
    """Turn the failure of a collective inside into a `LostRank` whose message names the ranks that did not take part.

    Each rank whose collective fails says so in the store of the process group and leaves the group, which makes the
    collectives of the others fail too. The ranks that have not said so within seconds are the lost ones.
    """
    try:
        yield
    except RuntimeError as error:
        if world.size == 1 or not dist.is_initialized() or not is_collective(error):
            raise
        store = _store()
        dist.destroy_process_group()
        lost = _silent(store, world, min(_WAIT, timeout_seconds))
        raise LostRank(_sentence(str(error), world, lost, timeout_seconds)) from error


def is_collective(error: RuntimeError) -> bool:
    """Tell whether a collective of the process group raised `error`."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in _WORDS)


def _sentence(cause: str, world: World, lost: list[int], timeout_seconds: float) -> str:
    many = len(lost) > 1
    who = f"rank{'s' if many else ''} {', '.join(map(str, lost))}" if lost else "another rank"
    if "timed out" in cause.lower() or "timeout" in cause.lower():
        return (
            f"rank {world.rank} waited {timeout_seconds:g} s (--collective-timeout) and {who} did not take part: "
            f"{'they hang, are' if many else 'it hangs, is'} stopped or ended. See the output of {who}"
        )
    return f"rank {world.rank} lost the connection to {who}, which ended first. See the output of {who} for the cause"


def _store() -> Any:
    try:
        return dist.distributed_c10d._get_default_store()
    except Exception:  # a private name, and only the names of ranks depend on it
        return None


def _silent(store: Any, world: World, seconds: float) -> list[int]:
    """Announce this rank's failure; return the other ranks that do not announce theirs within some seconds."""
    others = {rank for rank in range(world.size) if rank != world.rank}
    if store is None:
        return sorted(others) if len(others) == 1 else []
    silent = set(others)
    reached = threading.Event()

    def ask() -> None:
        end = time.monotonic() + seconds
        try:
            store.set_timeout(timedelta(seconds=seconds))
            store.set(_KEY.format(world.rank), "1")
            while silent and time.monotonic() < end:
                silent.difference_update([rank for rank in silent if store.check([_KEY.format(rank)])])
                reached.set()
                if len(silent) == 1:
                    end = min(end, time.monotonic() + 1.0)
                time.sleep(0.1)
        except RuntimeError:
            pass  # rank 0 keeps the store, and has ended

    # The store answers never where the process that keeps it is stopped, and prints a trace where that has ended.
    thread = threading.Thread(target=ask, daemon=True)
    with _without_stderr():
        thread.start()
        thread.join(seconds + 1.0)
    kept_by_rank_0 = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not reached.is_set() and kept_by_rank_0 and not world.is_main:
        return [0]
    return sorted(silent)


@contextmanager
def _without_stderr() -> Iterator[None]:
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
