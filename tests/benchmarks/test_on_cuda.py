"""`oner-fast bench ops --device cuda`, as far as tests without a GPU can cover it."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from oner_fast.benchmarks import machine, measure, timing
from oner_fast.benchmarks.cases import OURS, Call, Case, Contender, Target
from oner_fast.benchmarks.measure import Settings
from oner_fast.benchmarks.ops import OPS, cases
from oner_fast.benchmarks.rows import Row
from oner_fast.ops import implementations, library
from oner_fast.ops.implementations import Facts, choose, register


@pytest.fixture
def a100(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = SimpleNamespace(L2_cache_size=40 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    machine.cache_bytes.cache_clear()


def test_the_machine_line_names_the_gpu_and_its_cache(a100: None) -> None:
    line = machine.describe("cuda").line()
    assert "NVIDIA A100 (CUDA " in line and "40 MiB of cache" in line


def test_rotated_inputs_exceed_the_gpus_cache(a100: None) -> None:
    assert len(timing.Rotation(lambda number: number, 10 * 2**20, device="cuda").sets) == 8


def test_a_sample_is_a_batch_of_calls_by_the_gpus_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Event:
        """A clock that reports 1 ms between any two of its events."""

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            said.append("recorded")

        def synchronize(self) -> None:
            said.append("waited")

        def elapsed_time(self, end: Event) -> float:
            return 1.0

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("idle"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    one = timing.Candidate("one", lambda call: said.append(f"ran {call}"))
    samples = timing.interleave([one], rounds=2, device="cuda")["one"]
    batch = round(timing.BATCH_SECONDS / 1e-3)
    assert samples.seconds == [pytest.approx(1e-3 / batch)] * 2
    single = [["idle", "recorded", f"ran {call}", "recorded", "waited"] for call in range(timing.WARM_UPS)]
    calls = [f"ran {call}" for call in range(timing.WARM_UPS, timing.WARM_UPS + 2 * batch)]
    whole = [["idle", "recorded", *calls[i * batch : (i + 1) * batch], "recorded", "waited"] for i in range(2)]
    assert said == [word for part in (*single, *whole) for word in part]


def test_our_named_implementations_take_part_without_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Case] = []

    def check(case: Case, *rest: object) -> dict[str, float]:
        seen.append(case)
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "check", check)
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: name)  # Triton is installed, say
    served: list[str | None] = []
    call = Call((torch.ones(2),))
    ours = Contender(OURS, lambda x: served.append(os.environ.get("ONER_FAST_MASKED_GATHER_IMPLEMENTATION")))
    case = Case("masked_gather", "2", torch.float32, lambda seed, device: call, [ours], lambda call: (), 1, 1, "copy")
    with pytest.raises(KeyboardInterrupt):
        measure.measure(replace(case, target=Target(speedup=2.0)), Settings(device="cuda"))
    (found,) = seen
    by_name = found.contender(f"{OURS} triton")
    assert by_name.ours and not by_name.eager
    by_name.forward(torch.ones(2))
    ours.forward(torch.ones(2))
    assert served == ["triton", None]


def test_a_row_names_the_implementation_chosen_for_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """An implementation that takes only narrow heads must not be named for wide ones."""
    ran: list[str] = []

    def narrow(device: str, head_dim: int = 0, **facts: object) -> list[str]:
        return [f"takes heads up to 4, not {head_dim}"] if head_dim > 4 else []

    def facts(x: torch.Tensor) -> Facts:
        return "toy", "cuda", {"dtype": x.dtype, "head_dim": x.shape[-1]}

    def op(x: torch.Tensor) -> torch.Tensor:
        name, device, known = facts(x)
        return choose(name, device, **known).function(x)

    def check(case: Case, forwards: object, call: Call, row: Row, progress: object) -> dict[str, float]:
        rows.append((row.served, [one.name for one in case.contenders]))
        raise KeyboardInterrupt

    rows: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(measure, "check", check)
    monkeypatch.setattr(implementations, "_registry", dict(implementations._registry))
    monkeypatch.delenv("ONER_FAST_IMPLEMENTATION", raising=False)
    for name, preference, reasons in (("triton", 2, narrow), ("cuda", 1, lambda device, **facts: [])):
        register("toy", name, lambda x: ran.append("ran"), preference=preference, reasons=reasons)
    for width in (4, 8):
        call = Call((torch.ones(2, width),))
        case = Case(
            "toy", "2", torch.float32, lambda seed, device, call=call: call, [Contender(OURS, op)], lambda call: (), 1,
            1, "copy", facts=facts,
        )  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            measure.measure(case, Settings(device="cuda"))
    assert rows == [
        ("triton", [OURS, f"{OURS} triton", f"{OURS} cuda"]),
        ("cuda", [OURS, f"{OURS} cuda"]),
    ]
    assert not ran, "asking which implementation is chosen must not compute anything"


def test_baselines_take_part_only_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.nn.attention.varlen has no CPU kernel, so a row on the CPU does not name it."""
    only = [one for case in cases(True, OPS) for one in case.contenders if one.devices == ("cuda",)]
    assert [one.name for one in only] == ["eager torch.nn.attention.varlen"]
    seen: list[str] = []

    def check(case: Case, *rest: object) -> dict[str, float]:
        seen.extend(one.name for one in case.contenders)
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "check", check)
    call = Call((torch.ones(2),))
    contenders = [Contender(OURS, torch.neg), Contender("eager other", torch.neg, devices=("cuda",))]
    case = Case(
        "masked_gather", "2", torch.float32, lambda seed, device: call, contenders, lambda call: (), 1, 1, "copy"
    )
    with pytest.raises(KeyboardInterrupt):
        measure.measure(case, Settings(device="cpu"))
    assert seen == [OURS]
