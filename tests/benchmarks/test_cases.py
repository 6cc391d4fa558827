from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

from oner_fast.benchmarks import measure as measuring
from oner_fast.benchmarks.cases import OURS, Call, Case, Contender, Target, name_of, step
from oner_fast.benchmarks.counts import counted_flops, graph_breaks
from oner_fast.benchmarks.measure import Settings, check, measure
from oner_fast.benchmarks.ops import OPS, cases
from oner_fast.benchmarks.precision import relative_error
from oner_fast.benchmarks.rows import Row

QUICK = cases(quick=True)
NOTHING = Target()


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def tiny(*contenders: Contender, target: Target = NOTHING) -> Case:
    """Make a case that doubles a thousand numbers under the name of an existing op."""

    def make(seed: int, device: str) -> Call:
        x = torch.randn(1000, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        return Call((x,), (x,), (torch.ones(1000),))

    def exact(call: Call) -> tuple[torch.Tensor, ...]:
        return call.arguments[0].detach().double() * 2, torch.full((1000,), 2.0, dtype=torch.float64)

    return Case("masked_gather", "tiny", torch.float32, make, contenders, exact, 2e3, 8e3, "copy", target)


@pytest.fixture(autouse=True)
def _no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> None:
        raise measuring.peak_memory.Unavailable("not measured in this test")

    monkeypatch.setattr(measuring.peak_memory, "measure", refuse)


def test_a_row_names_the_faster_contender() -> None:
    def slow(x: torch.Tensor) -> torch.Tensor:
        for _ in range(300):
            torch.ones(1000).sum()
        return double(x)

    case = tiny(Contender(OURS, double), Contender("eager slow", slow), target=Target(speedup=2.0, eager=1e6))
    row = measure(case, Settings(seconds=0.2))
    assert row.best == row.eager == "eager slow"
    assert row.speedup and row.speedup.p50 > 2 and row.met == {"speedup": True, "eager": False}
    assert row.share is not None and row.limit == "limit: copy" and row.graph_breaks == 0
    assert set(row.floor) == {"copy"} and set(row.profiles) == {OURS, "eager slow"}
    assert not row.wrong and "memory of oner_fast: not measured in this test" in row.notes


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_a_wrong_result_is_refused_and_has_no_speedup(wrong: float) -> None:
    def cheat(x: torch.Tensor) -> torch.Tensor:
        return 2 * x + torch.tensor([wrong] + [0.0] * 999)

    row = measure(tiny(Contender(OURS, cheat), Contender("eager", double)), Settings(seconds=0.05))
    assert row.wrong and "result 0: relative error" in row.refused[OURS]
    assert OURS not in row.times and "eager" in row.times and row.speedup is None


def test_a_wrong_gradient_is_refused() -> None:
    row = Row("masked_gather", "tiny", "float32")
    case = tiny(Contender(OURS, lambda x: x + x.detach()), Contender("eager", double))
    check(case, {one.name: one.forward for one in case.contenders}, case.make(0, "cpu"), row, lambda text: None)
    assert "result 1" in row.refused[OURS] and "result 0" not in row.refused[OURS]


def test_a_wrong_shape_and_a_failing_baseline_are_reported() -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no kernel here\nand more")

    row = measure(
        tiny(Contender(OURS, double), Contender("eager", double), Contender("eager other", fail)),
        Settings(seconds=0.05),
    )
    assert row.unavailable == {"eager other": "NotImplementedError: no kernel here"} and not row.wrong
    with pytest.raises(ValueError, match=r"shape \(2,\), not \(3,\)"):
        relative_error(torch.ones(2), torch.ones(3))


def test_one_wrong_element_among_many_is_refused() -> None:
    exact = torch.ones(10**6, dtype=torch.float64)
    found = exact.clone()
    found[7] += 1e-3
    assert relative_error(found, exact) == pytest.approx(1e-3)


def test_quick_and_full_have_every_op_with_unique_keys() -> None:
    for quick in (True, False):
        found = cases(quick)
        assert list(dict.fromkeys(case.op for case in found)) == list(OPS)
        assert len({case.key for case in found}) == len(found)
        assert all(case.contenders[0].name == OURS for case in found)
    assert all(one.quick for case in QUICK for one in case.contenders)
    assert all(any(one.compiled for one in case.contenders) for case in QUICK)
    assert [case.op for case in cases(True, ["token_alignment"])] == ["token_alignment"]
    with pytest.raises(ValueError, match="unknown op 'gather'; known: masked_gather"):
        cases(True, ["gather"])


def test_only_the_full_run_has_targets() -> None:
    promised = {(case.op, name_of(case.dtype)): case.target for case in cases(False) if case.timed}
    assert promised["masked_gather", "float32"] == Target(speedup=4.0, share=0.5)
    assert promised["gather_patches", "float32"] == Target(speedup=1.5, eager=10.0)
    assert promised["mixup_info_nce", "float32"] == Target(speedup=1.0, eager=2.5, memory_share=1 / 10)
    assert promised["mixup_info_nce", "bfloat16"] == Target(speedup=1.25, memory_share=1 / 6)
    assert promised["varlen_attention", "float32"] == Target(speedup=1.5)
    assert promised["varlen_attention", "bfloat16"] == Target(speedup=3.0)
    assert promised["token_alignment", "float32"] == Target(speedup=2.0)


# Small cases from the ops' files, with the baselines that a quick run leaves out.
EVERY_BASELINE = [case for op in OPS for case in importlib.import_module(f"oner_fast.benchmarks.ops.{op}").cases(True)]


@pytest.mark.parametrize("case", EVERY_BASELINE, ids=lambda case: case.key)
def test_every_baseline_is_correct(case: Case) -> None:
    """Check the eager baselines and ours; the compiled ones are the same functions."""
    row = Row(case.op, case.shape, name_of(case.dtype))
    able = [one for one in case.contenders if not one.compiled and "cpu" in one.devices]
    eager = replace(case, contenders=able)
    check(eager, {one.name: one.forward for one in eager.contenders}, case.make(1, "cpu"), row, lambda text: None)
    assert not row.refused and not row.unavailable


@pytest.mark.parametrize("case", [one for one in QUICK if one.counted is not None], ids=lambda case: case.key)
def test_flops_equal_pytorchs_count(case: Case) -> None:
    products = ("softmax", "entropies", "log-sigmoid")
    eager = next(one for one in case.contenders if one.eager and any(word in one.name for word in products))
    assert counted_flops(case, eager.name) == case.counted


def test_graph_breaks_are_counted() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return 2 * x

    def broken_at_once(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return 2 * x

    call = Call((torch.ones(3),))
    assert [graph_breaks(one, call) for one in (double, broken, broken_at_once, double)] == [0, 1, 1, 0]


def test_a_call_without_leaves_is_a_forward_alone() -> None:
    results = step(double, Call((torch.ones(3, requires_grad=True),)))
    assert len(results) == 1
