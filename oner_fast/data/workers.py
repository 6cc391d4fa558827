"""Batches made ahead in worker processes, which leave signals to the training process and end when it does."""

import logging
import multiprocessing
import os
import signal
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch.utils.data import DataLoader, Dataset

from oner_fast.data.batch import PairBatch

logger = logging.getLogger("oner_fast.data")

_WATCH_SECONDS = 1.0


class Batches(Iterator[PairBatch]):
    """Endless batches with a place: `step` comes next. Counts and names the corrupt samples met in them.

    `corrupt`: how many reads failed so far; `corrupt_names`: the sentences logged, each once. `ahead`: where set before
    the first batch, it is called with each batch one step before that batch is given out.
    """

    ahead: Callable[[PairBatch], object] | None = None

    def __init__(
        self, *, batch_size: int, seed: int, rank: int, world_size: int, start_step: int, workers: int
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size = {world_size}), not {rank}")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size must be a positive multiple of world_size = {world_size}, not {batch_size}")
        if workers < 0:
            raise ValueError(f"workers must be 0 or more, not {workers}")
        if start_step < 0:
            raise ValueError(f"start_step must be 0 or more, not {start_step}")
        self.batch_size = batch_size
        self.seed = seed
        self.step = start_step
        self.corrupt = 0
        self.corrupt_names: set[str] = set()
        self._batches: Iterator[PairBatch] | None = None

    @abstractmethod
    def _start(self) -> Iterator[PairBatch]:
        """Batches from `step` on."""

    @abstractmethod
    def state_dict(self) -> dict[str, int]:
        """The place, for a checkpoint."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a place. Raises ValueError where it is not one of these data."""

    def __next__(self) -> PairBatch:
        """The batch of the next step."""
        if self._batches is None:
            self._batches = self._start() if self.ahead is None else _one_ahead(self._start(), self.ahead)
        try:
            batch = next(self._batches)
        except BaseException:
            self._batches = None  # an interrupted iterator may have moved on: begin again at this step
            raise
        self.step += 1
        self.corrupt += batch.corrupt
        for sentence in batch.corrupt_names:
            if sentence not in self.corrupt_names:
                self.corrupt_names.add(sentence)
                logger.warning("corrupt sample, another takes its slot: %s", sentence)
        return batch

    def close(self) -> None:
        """Ends the workers; the next batch starts them again."""
        self._batches = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _one_ahead(batches: Iterator[PairBatch], begin: Callable[[PairBatch], object]) -> Iterator[PairBatch]:
    current = next(batches)
    begin(current)
    for following in batches:
        begin(following)
        yield current
        current = following


@contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Start processes inside whose every thread, PyTorch's own from before `_begin_worker` too, blocks SIGTERM."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@_sigterm_blocked()
def in_workers(
    source: Dataset[PairBatch], sampler: Iterable[int] | None, workers: int, prefetch: int, pin_memory: bool
) -> Iterator[PairBatch]:
    """Iterates a source of whole batches in worker processes, `prefetch` batches ahead in each."""
    return iter(
        DataLoader(
            source,
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_begin_worker,
            prefetch_factor=prefetch,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # its own, so that starting it draws nothing from the training's
        )
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _begin_worker(_: int) -> None:
    """Leaves the signals of a stopping run to the training process, and ends with it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a forked process must not wait for threads it does not have
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    trainer = multiprocessing.parent_process()
    threading.Thread(target=_watch, args=(os.getppid(), trainer and trainer.pid), daemon=True).start()


def _watch(parent: int, trainer: int | None) -> None:
    """Ends this process when its parent is gone, or on the trainer's own SIGTERM; a SIGTERM to all is passed over.

    A worker that waits for room in its result pipe would never see that nobody reads it, so a thread looks.
    """
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, _WATCH_SECONDS)
        if received is not None and received.si_pid in (parent, trainer):
            break
    os._exit(0)  # PyTorch takes any other status for a crash
