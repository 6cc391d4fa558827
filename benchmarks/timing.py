"""Measure seconds: interleaved calls, rotated inputs, quantiles, and ratios within a round.

Candidates are called in turn, A B C A B C ..., each call on the next set of inputs of a rotation that is larger than
the caches. A ratio is the median over rounds of the ratio within the round: a disturbance slows neighbouring calls
alike, so it cancels.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from oner_fast.benchmarks.machine import cache_bytes

WARM_UPS = 2
LEAST_ROUNDS = 5
MOST_ROUNDS = 200
# A candidate whose single call takes more than a tenth of the time, and more than twice as long as the fastest
# candidate's, takes part in the first three rounds alone.
SLOW_SHARE, SLOWER, SLOW_ROUNDS = 0.1, 2.0, 3
# On a GPU: how long one sample keeps it busy, and the most calls of a sample.
BATCH_SECONDS = 5e-3
MOST_IN_A_BATCH = 64
T = TypeVar("T")


@dataclass
class Candidate:
    """One way to do the work.

    Args:
        name: unique among the candidates that are measured together.
        run: does the work once. Its argument counts the calls of all candidates together and picks the inputs
            (`Rotation`), so that no two calls in a row have the same ones. Its result is dropped before the clock
            stops, as freeing is part of the work.
        prepare: called once before the first run, for example to compile. Its time and that of the first run are added
            to `setup_seconds` and are in no sample.
        most_rounds: takes part in so many rounds at most, the first ones.
    """

    name: str
    run: Callable[[int], object]
    prepare: Callable[[], object] | None = None
    setup_seconds: float = 0.0
    most_rounds: int = MOST_ROUNDS


@dataclass
class Samples:
    """Seconds of one candidate, one for each round from the first on; a slow candidate stops earlier."""

    name: str
    seconds: list[float] = field(default_factory=list)
    setup_seconds: float = 0.0

    @property
    def p20(self) -> float:
        """A fifth of the calls were at least this fast, in seconds."""
        return quantile(self.seconds, 0.2)

    @property
    def p50(self) -> float:
        """The median, in seconds."""
        return quantile(self.seconds, 0.5)

    @property
    def p80(self) -> float:
        """Four fifths of the calls were at least this fast, in seconds."""
        return quantile(self.seconds, 0.8)


@dataclass(frozen=True)
class Ratio:
    """Ratio of the times of two candidates: quantiles of the ratios within a round."""

    p20: float
    p50: float
    p80: float


class Rotation(Generic[T]):
    """Sets of inputs, together at least twice as large as the caches, handed out in turn.

    Args:
        make: makes the set with a number, counted from 0.
        set_bytes: the bytes that one call reads and writes of a set.
        most: the most sets, however small they are.
        device: the device whose caches matter.
    """

    def __init__(self, make: Callable[[int], T], set_bytes: int, most: int = 16, device: str = "cpu") -> None:
        count = math.ceil(2 * cache_bytes(device) / max(set_bytes, 1))
        self.sets = [make(index) for index in range(max(2, min(most, count)))]

    def __getitem__(self, call: int) -> T:
        return self.sets[call % len(self.sets)]


def quantile(values: Sequence[float], share: float) -> float:
    """Value below which `share` of the values lie, linear between neighbours. Raises ValueError without any."""
    if not values:
        raise ValueError("a quantile needs at least one sample, got none")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def ratio(slower: Samples, faster: Samples) -> Ratio:
    """Speed-up of `faster`: quantiles of slower / faster within each round that both finished."""
    rounds = [a / b for a, b in zip(slower.seconds, faster.seconds, strict=False)]
    return Ratio(quantile(rounds, 0.2), quantile(rounds, 0.5), quantile(rounds, 0.8))


def interleave(
    candidates: Sequence[Candidate],
    *,
    seconds: float | None = None,
    rounds: int | None = None,
    least_rounds: int = LEAST_ROUNDS,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Samples]:
    """Prepare and warm up every candidate, then measure them in turn; samples by name.

    Args:
        candidates: at least one, with distinct names.
        seconds: how long to measure. Rounds that have begun are finished; there are at least `least_rounds` and at most
            `MOST_ROUNDS`. A candidate that takes more than `SLOW_SHARE` of the time in one call, and more than `SLOWER`
            times as long as the fastest, has `SLOW_ROUNDS`.
        rounds: number of rounds, instead of `seconds`.
        least_rounds: see `seconds`.
        device: on "cuda" a sample is the mean over consecutive calls that keep the GPU busy for `BATCH_SECONDS`, by the
            GPU's own clock. A single short call would only measure its launch.
        progress: called with the current work.

    Raises:
        ValueError: there are no candidates, a name is given twice, or not exactly one of `seconds` and `rounds` is
            given.
    """
    names = [candidate.name for candidate in candidates]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"candidates need distinct names, got {names}")
    if (seconds is None) == (rounds is None):
        raise ValueError(f"give seconds or rounds, one of them; got seconds={seconds}, rounds={rounds}")
    call = 0
    for candidate in candidates:
        progress(f"preparing {candidate.name}")
        start = time.perf_counter()
        if candidate.prepare is not None:
            candidate.prepare()
        _time(candidate, call, device)
        candidate.setup_seconds += time.perf_counter() - start
        call += 1
    samples = {
        candidate.name: Samples(candidate.name, setup_seconds=candidate.setup_seconds) for candidate in candidates
    }
    warm: dict[str, float] = {}
    batches = dict.fromkeys(names, 1)
    with _without_collector():
        for _ in range(WARM_UPS - 1):
            for candidate in candidates:
                took = _time(candidate, call, device)
                call += 1
                warm[candidate.name] = took
                if device != "cpu":
                    batches[candidate.name] = max(1, min(MOST_IN_A_BATCH, math.ceil(BATCH_SECONDS / took)))
        least_slow = max(SLOW_SHARE * seconds, SLOWER * min(warm.values())) if seconds is not None else math.inf
        slow = {name for name, took in warm.items() if took > least_slow}
        for number in _rounds(seconds, rounds, least_rounds):
            progress(f"round {number + 1}")
            for candidate in candidates:
                most = min(SLOW_ROUNDS, candidate.most_rounds) if candidate.name in slow else candidate.most_rounds
                if number < most:
                    batch = batches[candidate.name]
                    samples[candidate.name].seconds.append(_time(candidate, call, device, batch))
                    call += batch
    return samples


def best(samples: Mapping[str, Samples]) -> Samples:
    """Samples with the lowest median."""
    return min(samples.values(), key=lambda one: one.p50)


def _rounds(seconds: float | None, rounds: int | None, least_rounds: int) -> Iterator[int]:
    if rounds is not None:
        yield from range(rounds)
        return
    end = time.perf_counter() + (seconds or 0.0)
    for number in range(MOST_ROUNDS):
        if number >= least_rounds and time.perf_counter() >= end:
            return
        yield number


def _time(candidate: Candidate, call: int, device: str, batch: int = 1) -> float:
    """Mean seconds of `batch` calls."""
    if device != "cpu":
        return _time_on_gpu(candidate, call, batch)
    start = time.perf_counter()
    result = candidate.run(call)
    del result
    return time.perf_counter() - start


def _time_on_gpu(candidate: Candidate, call: int, batch: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for number in range(call, call + batch):
        result = candidate.run(number)
        del result
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / batch


@contextmanager
def _without_collector() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
