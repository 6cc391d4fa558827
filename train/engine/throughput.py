"""The machine's rate of multiplication, the pace of a training, and their ratio (MFU)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

FORWARD_AND_BACKWARD = 3
"""A step's operations divided by its forward's: a backward takes twice as many as its forward."""

_SECONDS = 0.3
_LARGEST = 8192
_RATES: dict[tuple[torch.device, torch.dtype, int], float] = {}


def gemm_rate(
    device: torch.device | str, dtype: torch.dtype, threads: int | None = None, *, again: bool = False
) -> float:
    """Measure the FLOP/s of a large square matrix product: the rate that MFU is a share of.

    Measured once a process for each argument triple, in about 0.3 s; the best of the repetitions counts. No
    global random state is touched.

    Args:
        device: CPU or CUDA.
        dtype: float32, float16, bfloat16 or float64.
        threads: CPU threads, the current number by default. The current number is restored afterwards.
        again: measure once more, and keep the better of both: the machine may have been busy the first time.

    Raises:
        ValueError: the dtype is not a floating-point one, or threads < 1.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point one, got {dtype}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    key = (device, dtype, torch.get_num_threads() if threads is None else threads)
    if again or key not in _RATES:
        _RATES[key] = max(_RATES.get(key, 0.0), _gemm_rate(*key))
    return _RATES[key]


def _gemm_rate(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            return _measure(device, dtype)
    finally:
        torch.set_num_threads(before)


def _measure(device: torch.device, dtype: torch.dtype) -> float:
    generator = torch.Generator(device=device).manual_seed(0)
    size = 128
    while True:
        size *= 2
        left = torch.randn(size, size, generator=generator, device=device, dtype=dtype)
        right = torch.randn(size, size, generator=generator, device=device, dtype=dtype)
        _time(left, right)  # the first call loads the library and starts the threads
        seconds = _time(left, right)
        # Large enough that the start of a product costs nothing by comparison.
        if seconds > 0.005 or size >= _LARGEST:
            break
    spent, best = 0.0, seconds
    while spent < _SECONDS:
        seconds = _time(left, right)
        spent += seconds
        best = min(best, seconds)
    return 2.0 * size**3 / best


def _time(left: torch.Tensor, right: torch.Tensor) -> float:
    _wait(left.device)
    start = time.perf_counter()
    torch.mm(left, right)
    _wait(left.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mfu(model_flops: float, seconds: float, rate: float) -> float:
    """Return the model FLOP utilisation: the share of the measured rate that the model's own operations used.

    Args:
        model_flops: operations that the model needs on one rank, without recomputation and padding.
        seconds: wall-clock time they took.
        rate: FLOP/s, from `gemm_rate`.

    Raises:
        ValueError: time or rate is not positive.
    """
    if seconds <= 0 or rate <= 0:
        raise ValueError(f"seconds and rate must be positive, got {seconds=}, {rate=}")
    return model_flops / (seconds * rate)


@dataclass(frozen=True)
class Throughput:
    """The pace of some steps.

    Attributes:
        steps: number of steps.
        samples: number of samples in them.
        seconds: their wall-clock time.
        waited: the part of that time spent waiting for data.
    """

    steps: int
    samples: int
    seconds: float
    waited: float

    @property
    def samples_per_second(self) -> float:
        """Samples a second."""
        return self.samples / self.seconds

    @property
    def data_wait(self) -> float:
        """Share of the time spent waiting for data, 0 to 1."""
        return self.waited / self.seconds

    @property
    def seconds_per_step(self) -> float:
        """Seconds a step."""
        return self.seconds / self.steps


class ThroughputMeter:
    """Time the steps of a loop.

        with meter.waiting():
            batch = next(batches)
        ...
        meter.step(len(batch))

    Args:
        warmup: the first steps, which are not counted: they start workers and choose kernels.
        clock: seconds, monotonic.
    """

    def __init__(self, warmup: int = 2, clock: Callable[[], float] = time.perf_counter) -> None:
        if warmup < 0:
            raise ValueError(f"warmup must not be negative, got {warmup}")
        self._clock = clock
        self._warmup = warmup
        self._last = clock()
        self._wait = self._outside = 0.0
        self._window = self._whole = Throughput(0, 0, 0.0, 0.0)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = self._clock()
        try:
            yield
        finally:
            self._wait += self._clock() - start

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Leave out the time inside, such as that of a checkpoint or an evaluation."""
        start = self._clock()
        try:
            yield
        finally:
            self._outside += self._clock() - start

    def step(self, samples: int) -> None:
        """Note the end of a step over `samples` samples."""
        now = self._clock()
        seconds, waited = now - self._last - self._outside, self._wait
        self._last, self._wait, self._outside = now, 0.0, 0.0
        if self._warmup > 0:
            self._warmup -= 1
            return
        self._window = _add(self._window, samples, seconds, waited)
        self._whole = _add(self._whole, samples, seconds, waited)

    def read(self) -> Throughput | None:
        """Return the pace since the last `read`; None where no step counted since."""
        window, self._window = self._window, Throughput(0, 0, 0.0, 0.0)
        return window if window.steps else None

    def total(self) -> Throughput | None:
        """Return the pace of all steps after the warm-up; None where there is none yet."""
        return self._whole if self._whole.steps else None


def _add(before: Throughput, samples: int, seconds: float, waited: float) -> Throughput:
    return Throughput(before.steps + 1, before.samples + samples, before.seconds + seconds, before.waited + waited)
