"""Carry exceptions out of worker processes as they are: type, system error, place in the code."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from oner_fast.failures import keep_origin


@dataclass(frozen=True)
class Failure:
    """An exception in place of a batch."""

    error: Exception
    trace: str


def carried(source: Dataset[Any]) -> Dataset[Any]:
    """Wrap a source of batches, so that it returns a `Failure` where it would raise.

    PyTorch makes a new exception of the same class from the text of a traceback, without a system error's number.
    """
    return _Iterated(source) if isinstance(source, IterableDataset) else _Indexed(source)


def opened(batch: Any) -> Any:
    """Return a batch as it is, or raise the exception that it stands for."""
    if isinstance(batch, Failure):
        batch.error.add_note(f"In a data worker:\n{batch.trace}")
        raise batch.error
    return batch


class _Indexed(Dataset[Any]):
    def __init__(self, source: Dataset[Any]) -> None:
        self.source = source

    def __getitem__(self, index: Any) -> Any:
        return _or_failure(lambda: self.source[index])


class _Iterated(IterableDataset[Any]):
    def __init__(self, source: IterableDataset[Any]) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.source)
        while True:
            batch = _or_failure(lambda: next(batches, None))
            if batch is None:
                return
            yield batch
            if isinstance(batch, Failure):
                return


def _or_failure(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception as error:
        trace = traceback.format_exc()
        keep_origin(error)
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an exception of a class that cannot travel
            told = RuntimeError(f"{type(error).__name__}: {error}")
            told.__dict__.update(error.__dict__)
            return Failure(told, trace)
        return Failure(error, trace)
