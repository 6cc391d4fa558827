"""Notice that a training has become far slower than it began."""

from __future__ import annotations

from collections.abc import Callable

_FAR = 3.0
"""A pace this many times below the first is far below."""
_IN_A_ROW = 3


class PaceWatch:
    """Compares each reading of the pace with the first, and speaks once.

    Args:
        threads: the number of threads that compute, named in the remedy; None on a GPU.
        load: describes how busy the machine is.
    """

    def __init__(self, threads: int | None, load: Callable[[], str]) -> None:
        self._threads, self._load = threads, load
        self._first: float | None = None
        self._slow = 0
        self._said = False

    def read(self, samples_per_second: float, data_wait: float) -> str | None:
        """Take a reading; return a sentence where it is the third in a row far below the first, else None.

        Args:
            samples_per_second: the pace since the last reading.
            data_wait: the share of that time spent waiting for data, 0 to 1.
        """
        if self._first is None:
            self._first = samples_per_second
            return None
        self._slow = self._slow + 1 if samples_per_second * _FAR < self._first else 0
        if self._said or self._slow < _IN_A_ROW:
            return None
        self._said = True
        fell = f"the pace fell from {self._first:.1f} to {samples_per_second:.1f} samples/s"
        if data_wait > 0.5:
            return f"{fell}, and {data_wait:.0%} of the time is spent waiting for data: give more --workers"
        remedy = ""
        if self._threads is not None and self._threads > 1:
            remedy = ", or stop this run and continue it with --threads 1"
        return f"{fell}: another process may keep the processor busy ({self._load()}); stop it{remedy}"
