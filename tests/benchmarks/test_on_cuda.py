"""`oner-fast bench ops --device cuda`, as far as it can be tested without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from oner_fast.benchmarks import machine, measure, timing
from oner_fast.benchmarks.cases import OURS, Call, Case, Contender
from oner_fast.benchmarks.measure import Settings
from oner_fast.benchmarks.ops import OPS, cases


@pytest.fixture
def a100(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = SimpleNamespace(L2_cache_size=40 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    machine.cache_bytes.cache_clear()


def test_the_machine_line_names_the_gpu_and_its_cache(a100: None) -> None:
    line = machine.describe("cuda").line()
    assert "NVIDIA A100 (CUDA " in line and "40 MiB of cache" in line


def test_inputs_are_rotated_through_the_gpus_cache(a100: None) -> None:
    assert len(timing.Rotation(lambda number: number, 10 * 2**20, device="cuda").sets) == 8


def test_every_call_is_synchronised(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("synchronised"))
    timing.interleave([timing.Candidate("one", lambda call: said.append("ran"))], rounds=2, device="cuda")
    assert said == ["synchronised", "ran", "synchronised"] * 4


def test_baselines_take_part_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.nn.attention.varlen has no CPU kernel: a row on the CPU does not even name it."""
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
