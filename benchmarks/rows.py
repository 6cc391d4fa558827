"""One row of the report: the figures of one case, and whether it met its target.

A row is plain data and converts to and from JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from oner_fast.benchmarks.cases import OURS
from oner_fast.benchmarks.limits import Limit
from oner_fast.benchmarks.timing import Samples, ratio
from oner_fast.benchmarks.typed import made

NOTHING: Mapping[str, float] = {}
OUTPUTS, GRADIENTS = "loss or output", "gradients"


@dataclass
class Times:
    """Seconds of one candidate: quantiles over the rounds, their number, and the time of its preparation."""

    p20: float
    p50: float
    p80: float
    rounds: int
    setup: float


@dataclass
class Quantiles:
    """Quantiles of ratios within a round."""

    p20: float
    p50: float
    p80: float


@dataclass
class Row:
    """Figures of one op (or step) at one shape and dtype.

    Args:
        op, shape, dtype: the case; a training step is the op "step".
        served: the implementation chosen for "oner_fast".
        times: times by candidate; empty where only memory was measured.
        seconds: the seconds of each candidate, round by round; the same place is the same round.
        best, eager: the fastest baseline, and the fastest without torch.compile; `speedup` and `speedup_eager` compare
            ours with them.
        limit: the candidate that reached the machine's limit; `limit_rate` is its FLOPs or bytes a second, `rate` ours.
        share: ours as a share of the limit.
        floor: seconds that the machine itself needs for the row's products ("gemm") and its bytes ("copy"), at the
            rates of the same run.
        profiles: for ours and the fastest baseline: {"forward": {operation: seconds}, "backward": ...}.
        memory: {candidate: {"peak", "saved", "saved_beyond_inputs"}} in bytes.
        errors: the largest relative error of each candidate against float64; `tolerance` is the largest allowed.
        precision: the largest such error of several draws of the inputs, apart for the outputs and for the gradients,
            under `OUTPUTS` and `GRADIENTS`.
        refused: candidates with wrong results, and what was wrong; they have no times.
        unavailable: candidates that cannot run here, with the reason.
        target: the promises by criterion; `met`: whether each was kept.
        parts: for a step: each op's share of ours.
        breakdown: for a step: seconds of each kind of operation by candidate. They are the shares of one profiled step
            of the median, so that they add up to it.
    """

    op: str
    shape: str
    dtype: str
    served: str = ""
    times: dict[str, Times] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    best: str = ""
    speedup: Quantiles | None = None
    eager: str = ""
    speedup_eager: Quantiles | None = None
    limit: str = ""
    limit_rate: float = 0.0
    limit_unit: str = ""
    rate: float = 0.0
    share: float | None = None
    floor: dict[str, float] = field(default_factory=dict)
    profiles: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    graph_breaks: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    precision: dict[str, dict[str, float]] = field(default_factory=dict)
    tolerance: float | None = None
    refused: dict[str, str] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    target: dict[str, float] = field(default_factory=dict)
    met: dict[str, bool] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    breakdown: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        """Whether a result was refused, or ours cannot run."""
        return bool(self.refused) or OURS in self.unavailable

    def as_dict(self) -> dict[str, Any]:
        """The row as a dict for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """Make a row from the dict of `as_dict`. Raises ValueError where a field is not of its type."""
        return made(cls, data, "the row")

    def add_times(
        self,
        samples: Mapping[str, Samples],
        eager: Sequence[str],
        limits: Sequence[Limit] = (),
        work: Mapping[str, float] = NOTHING,
    ) -> None:
        """Fill in times, ratios and, with limits, the floor and the share of the best limit.

        Args:
            samples: "oner_fast", the baselines and the limits, measured together.
            eager: names of the baselines without torch.compile.
            limits: the limits.
            work: FLOPs or bytes of ours by the kind of limit; the first kind is the bound.
        """
        hidden = {limit.candidate.name for limit in limits}
        for name, one in samples.items():
            self.times[name] = Times(one.p20, one.p50, one.p80, len(one.seconds), one.setup_seconds)
            self.seconds[name] = list(one.seconds)
        if OURS not in samples:
            return
        ours = samples[OURS]
        baselines = [one for name, one in samples.items() if name.split()[0] != OURS and name not in hidden]
        if baselines:
            fastest = min(baselines, key=lambda one: one.p50)
            self.best, self.speedup = fastest.name, _quantiles(fastest, ours)
        if plain := [one for one in baselines if one.name in eager]:
            fastest = min(plain, key=lambda one: one.p50)
            self.eager, self.speedup_eager = fastest.name, _quantiles(fastest, ours)
        for kind, needed in work.items():
            measured = [limit for limit in limits if limit.kind == kind and limit.candidate.name in samples]
            if not measured:
                continue
            limit = max(measured, key=lambda one: one.work / samples[one.candidate.name].p50)
            name = limit.candidate.name
            rate = limit.work / samples[name].p50
            self.floor[kind] = needed / rate
            if not self.limit:
                self.limit, self.limit_rate, self.rate = name, rate, needed / ours.p50
                self.limit_unit = "GFLOP/s" if kind == "gemm" else "GB/s"
                self.share = ratio(samples[name], ours).p50 * needed / limit.work

    def judge(self, compiled: Sequence[str]) -> None:
        """Fill in `met` for each criterion of `target` that was measured; `compiled` names the compiled baselines."""
        ours = self.memory.get(OURS)
        theirs = [self.memory[name] for name in compiled if name in self.memory]
        for name, promised in self.target.items():
            if name == "speedup" and self.speedup:
                self.met[name] = self.speedup.p50 >= promised
            elif name == "eager" and self.speedup_eager:
                self.met[name] = self.speedup_eager.p50 >= promised
            elif name == "share" and self.share is not None:
                self.met[name] = self.share >= promised
            elif name == "memory_bytes" and ours:
                self.met[name] = ours["peak"] <= promised
            elif name == "memory_share" and ours and theirs:
                self.met[name] = ours["peak"] <= promised * min(one["peak"] for one in theirs)


def _quantiles(slower: Samples, faster: Samples) -> Quantiles:
    found = ratio(slower, faster)
    return Quantiles(found.p20, found.p50, found.p80)
