"""Make batches ahead in worker processes, which ignore signals and end with the training process."""

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
from oner_fast.data.carried import carried, opened

logger = logging.getLogger("oner_fast.data")

_WATCH_SECONDS = 1.0
_STOPPING = {signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}
"""The signals that stop a training; SIGINT is ignored instead of blocked."""


class Batches(Iterator[PairBatch]):
    """Endless batches with a position: `step` comes next.

    Attributes:
        corrupt: number of reads that failed so far.
        corrupt_names: the messages logged about these reads, each once.
        ahead: if set before the first batch, it is called with each batch one step before that batch is returned.
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
        """Yield batches from `step` on."""

    @abstractmethod
    def state_dict(self) -> dict[str, int]:
        """Position for a checkpoint."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position. Raises ValueError where it belongs to other data."""

    def __next__(self) -> PairBatch:
        """Make the batch of the next step."""
        if self._batches is None:
            self._batches = self._start() if self.ahead is None else _one_ahead(self._start(), self.ahead)
        try:
            batch = next(self._batches)
        except BaseException:
            self._batches = None  # an interrupted iterator may have advanced, so a new one begins at this step
            raise
        self.step += 1
        self.corrupt += batch.corrupt
        for sentence in batch.corrupt_names:
            if sentence not in self.corrupt_names:
                self.corrupt_names.add(sentence)
                logger.warning("corrupt sample, replaced by another: %s", sentence)
        return batch

    def close(self) -> None:
        """End the workers; the next batch starts them again."""
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
def signals_blocked() -> Iterator[None]:
    """Block the signals that stop a training in all threads of the processes started within the block.

    That includes threads that PyTorch starts before `_begin_worker` runs.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@signals_blocked()
def in_workers(
    source: Dataset[PairBatch], sampler: Iterable[int] | None, workers: int, prefetch: int, pin_memory: bool
) -> Iterator[PairBatch]:
    """Iterate over a source of whole batches in worker processes, `prefetch` batches ahead in each."""
    return map(
        opened,
        DataLoader(
            carried(source),
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_begin_worker,
            prefetch_factor=prefetch,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # a generator of its own, so that it draws nothing from the training's
        ),
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _begin_worker(_: int) -> None:
    """Ignore the signals that stop a run, as the training process handles them, and end when that process ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a forked process must not wait for threads that it lacks
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    trainer = multiprocessing.parent_process()
    threading.Thread(target=_watch, args=(os.getppid(), trainer and trainer.pid), daemon=True).start()


def _watch(parent: int, trainer: int | None) -> None:
    """End this process when its parent has ended, or on the trainer's own SIGTERM; ignore signals sent to all.

    A worker that waits for space in its result pipe cannot notice that nobody reads from it, so a thread checks.
    """
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, _WATCH_SECONDS)
        if received is not None and received.si_pid in (parent, trainer):
            break
    os._exit(0)  # PyTorch treats any other status as a crash
