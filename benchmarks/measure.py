"""Measure one case and make its row: correctness first, then time, then memory and counts."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch

from oner_fast.benchmarks import peak_memory
from oner_fast.benchmarks.cases import OURS, Call, Case, Contender, Forward, Layout, Result, name_of, step
from oner_fast.benchmarks.counts import graph_breaks
from oner_fast.benchmarks.limits import limits
from oner_fast.benchmarks.precision import grouped, more_draws, relative_error
from oner_fast.benchmarks.profiles import phases
from oner_fast.benchmarks.rows import Row
from oner_fast.benchmarks.timing import LEAST_ROUNDS, Candidate, Rotation, interleave
from oner_fast.ops.implementations import REFERENCE, choose, implementations

# A result may have this many times the error of plain eager PyTorch in the same dtype, and some units more, since a
# single number such as a loss is sometimes exact by chance.
ALLOWED = 3.0
MORE_UNITS = 4.0
# Eager PyTorch itself must be within this many units, or the case is broken.
ALLOWED_UNITS = 64.0


@dataclass(frozen=True)
class Settings:
    """Settings of a measurement.

    Args:
        seconds: time of interleaved rounds for each case.
        device: "cpu" or "cuda".
        quick: measure the small cases, and the memory of baselines only where a target needs it.
        memory: whether to measure memory, which takes a separate process for each contender.
        profile: whether to profile ours and the fastest baseline.
        least_rounds: at least so many rounds, whatever time they take.
    """

    seconds: float = 12.0
    device: str = "cpu"
    quick: bool = False
    memory: bool = True
    profile: bool = True
    least_rounds: int = LEAST_ROUNDS


def measure(case: Case, settings: Settings, progress: Callable[[str], None] = lambda text: None) -> Row:
    """Measure a case and make its row. An interruption raises KeyboardInterrupt and makes no row."""
    with quiet():
        return _measure(case, settings, progress)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the compiler's messages about graph breaks, which are counted instead, and PyTorch's about prototypes."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _measure(case: Case, settings: Settings, progress: Callable[[str], None]) -> Row:
    torch._dynamo.reset()
    case = replace(case, contenders=[one for one in case.contenders if settings.device in one.devices])
    if settings.device != "cpu" and not case.served:
        case = replace(case, contenders=[*case.contenders, *ours_by_name(case, settings.device)])
    # Targets hold for the CPU.
    promised = asdict(case.target) if settings.device == "cpu" else {}
    target = {name: value for name, value in promised.items() if value is not None}
    row = Row(case.op, case.shape, name_of(case.dtype), target=target, notes=list(case.notes))
    first = case.make(0, settings.device)
    ours = case.contender(OURS)
    row.served = case.served
    if not case.served:
        op, device, facts = case.facts_of(ours.layout(first), settings.device)
        row.served = choose(op, device, **facts).name
    if "precision" in case.measured:
        forwards = {one.name: one.function() for one in case.contenders}
        setup = check(case, forwards, first, row, progress)
        more_draws(case, forwards, row, settings.device, progress)
    if case.timed:
        _time(case, forwards, setup, settings, row, progress)
        if not case.served:
            progress("graph breaks")
            row.graph_breaks = graph_breaks(ours.forward, ours.layout(first))
    if case.measured == ("memory",) and row.served == REFERENCE:
        row.notes.append(f"{row.served!r} would need all that memory: not run")
    elif settings.memory and "memory" in case.measured and not case.served:
        _memory(case, settings, row, progress)
    row.judge([one.name for one in case.contenders if one.compiled])
    return row


def ours_by_name(case: Case, device: str) -> list[Contender]:
    """Make a contender for each of our other implementations that can compute the call."""
    ours, variable = case.contender(OURS), f"ONER_FAST_{case.op.upper()}_IMPLEMENTATION"

    def forced(name: str) -> Forward:
        def run(*arguments: object) -> object:
            before = os.environ.get(variable)
            os.environ[variable] = name
            try:
                return ours.forward(*arguments)
            finally:
                os.environ.pop(variable) if before is None else os.environ.update({variable: before})

        return run

    op, kind, facts = case.facts_of(ours.layout(case.make(0, device)), device)
    known = implementations(op)
    able = [name for name, one in known.items() if not one.reasons_against(kind, asked_for=True, **facts)]
    return [Contender(f"{OURS} {name}", forced(name)) for name in able if name in ("triton", "triton_atomic", "cuda")]


def check(
    case: Case, forwards: dict[str, Forward], call: Call, row: Row, progress: Callable[[str], None]
) -> dict[str, float]:
    """Run every contender once against float64; fills in errors, precision, tolerance, refused and unavailable.

    The error of the first eager baseline, which is the obvious PyTorch code, sets the tolerance of all contenders.
    Returns the seconds of the first runs, compilation included.
    """
    progress("float64")
    exact = case.exact(call)
    errors: dict[str, list[float]] = {}
    setup: dict[str, float] = {}
    for contender in case.contenders:
        progress(f"checking {contender.name}")
        try:
            laid_out = contender.layout(call)
            start = time.perf_counter()
            results = step(forwards[contender.name], laid_out)
            setup[contender.name] = time.perf_counter() - start
            found = contender.restore(results)
            errors[contender.name] = [relative_error(one, true) for one, true in zip(found, exact, strict=True)]
        except Exception as error:  # the row records why a baseline cannot run here
            reason = (str(error).strip().splitlines() or ["no message"])[0]
            row.unavailable[contender.name] = f"{type(error).__name__}: {reason[:200]}"
    plain = next((one.name for one in case.contenders if one.eager and one.name in errors), OURS)
    unit = torch.finfo(case.dtype).eps
    allowed = [
        min(ALLOWED * error, ALLOWED_UNITS * unit) + MORE_UNITS * unit
        for error in errors.get(plain, [0.0] * len(exact))
    ]
    row.tolerance = max(allowed)
    for name, each in errors.items():
        row.errors[name] = max(each)
        row.precision[name] = grouped(each, len(call.leaves))
        wrong = [
            f"result {number}: relative error {error:.2g}, allowed {bound:.2g}"
            for number, (error, bound) in enumerate(zip(each, allowed, strict=True))
            if not error <= bound  # NaN is wrong too
        ]
        if wrong:
            row.refused[name] = "; ".join(wrong)
    return setup


def _time(
    case: Case,
    forwards: dict[str, Forward],
    setup: dict[str, float],
    settings: Settings,
    row: Row,
    progress: Callable[[str], None],
) -> None:
    timed = [one for one in case.contenders if one.name not in row.refused and one.name not in row.unavailable]
    if not timed:
        return
    # The bound comes first; where products bound an op, its bytes are part of the floor too.
    work = {"gemm": case.flops, "copy": case.bytes} if case.limit == "gemm" else {case.limit: case.bytes}
    bounds = [one for kind in work for one in limits(case.limit_dtype or case.dtype, kind, settings.device)]
    size = case.make(0, settings.device).bytes()
    base = Rotation(lambda seed: case.make(seed, settings.device), size, device=settings.device)
    laid_out: dict[Layout, list[Call]] = {}
    candidates = []
    for one in timed:
        calls = laid_out.setdefault(one.layout, [one.layout(call) for call in base.sets])
        candidates.append(Candidate(one.name, runner(forwards[one.name], calls), setup_seconds=setup[one.name]))
    candidates += [bound.candidate for bound in bounds]
    samples = interleave(
        candidates,
        seconds=settings.seconds,
        least_rounds=settings.least_rounds,
        device=settings.device,
        progress=progress,
    )
    eager = [one.name for one in timed if one.eager]
    row.add_times(samples, eager, bounds, work)
    for one in timed:
        if settings.profile and one.name in (OURS, row.best):
            progress(f"profiling {one.name}")
            row.profiles[one.name] = phases(forwards[one.name], laid_out[one.layout], settings.device)


def runner(forward: Forward, calls: list[Call]) -> Callable[[int], Result]:
    """Make the run of a contender: a step on the next of its laid-out calls."""
    return lambda number: step(forward, calls[number % len(calls)])


def _memory(case: Case, settings: Settings, row: Row, progress: Callable[[str], None]) -> None:
    for contender in _weighed(case, settings, row):
        progress(f"memory of {contender.name}")
        try:
            found = peak_memory.measure(case, contender.name, settings.quick, settings.device)
            row.memory[contender.name] = asdict(found)
        except peak_memory.Unavailable as error:
            row.notes.append(f"memory of {contender.name}: {error}")


def _weighed(case: Case, settings: Settings, row: Row) -> list[Contender]:
    """List the contenders whose memory is measured.

    They are ours and, in a full run or where a target needs it, the fastest eager and compiled baselines.
    """
    chosen = [case.contender(OURS)]
    if case.timed and (not settings.quick or case.target.memory_share is not None):
        for compiled in (False, True):
            able = [one for one in case.contenders if one.compiled == compiled and not one.ours]
            if able := [one for one in able if one.name in row.times]:
                chosen.append(min(able, key=lambda one: row.times[one.name].p50))
    return [one for one in chosen if one.name not in row.refused and one.name not in row.unavailable]
