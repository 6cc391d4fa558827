"""The steps of UTA and CLIP for the record: their baselines compute the same, and a wrong one is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from oner_fast.benchmarks.rows import GRADIENTS, OUTPUTS, Row
from oner_fast.benchmarks.step.agreement import Disagreement, check, errors
from oner_fast.benchmarks.step.clip import OpenCLIPStep, OurCLIPStep, tiny_clip
from oner_fast.benchmarks.step.contest import contest
from oner_fast.benchmarks.step.plain_uta import turned_halves, turned_pairs
from oner_fast.benchmarks.step.steps import Step
from oner_fast.benchmarks.step.systems import SYSTEMS, counts_of, memory_of
from oner_fast.benchmarks.step.uta import OurUTAStep, PlainUTAStep, tiny_uta

Make = Callable[..., tuple[Step, Step]]


def uta(dtype: torch.dtype | None = None, **options: bool) -> tuple[Step, Step]:
    base = tiny_uta(3)
    model = replace(base.model, width=32, depth=2, heads=2, mlp_hidden=40, embed_dim=24)
    ours = OurUTAStep(replace(base, model=model), dtype)
    return ours, PlainUTAStep(ours, dtype, **options)


def clip(dtype: torch.dtype | None = None, **options: bool) -> tuple[Step, Step]:
    base = tiny_clip(3)
    model = replace(base.model, vision_width=32, vision_layers=2, vision_heads=2, text_width=16, text_layers=2,
                    text_heads=2, embed_dim=24)  # fmt: skip
    ours = OurCLIPStep(replace(base, model=model), dtype)
    return ours, OpenCLIPStep(ours, dtype, **options)


both = pytest.mark.parametrize("make", [uta, clip])


@both
def test_the_baseline_is_the_same_step(make: Make) -> None:
    ours, plain = make()
    check(ours, plain, 1e-5, 1e-3)
    before = ours.gradient()["loss"]
    ours.optimizer.zero_grad()
    for step in (ours, plain):
        for _ in range(3):
            step()
    assert abs(ours.gradient()["loss"] - before) > 1e-4 * abs(before)
    ours.optimizer.zero_grad()
    check(ours, plain, 1e-4, 1e-2)


@both
def test_autocast_agrees_too(make: Make) -> None:
    check(*make(torch.bfloat16), 2e-2, 0.3)


@both
def test_a_wrong_baseline_is_refused_and_has_no_time(make: Make) -> None:
    ours, plain = make()
    with torch.no_grad():
        next(iter(plain.modules()[0].parameters())).mul_(1.5)
    with pytest.raises(Disagreement, match="is not the same step"):
        check(ours, plain, 1e-5, 1e-3)
    row = Row("a step", "", "float32")
    found = contest(row, ours, [plain], tolerances=(1e-5, 1e-3), flops=1.0, rounds=1)
    assert set(row.refused) == {plain.name} and set(found) == {"oner_fast"} and plain.name not in row.seconds


@both
def test_errors_against_float64_are_those_of_float32(make: Make) -> None:
    ours, plain = make()
    exact = type(plain)(ours, None, exact=True)  # type: ignore[call-arg]
    found = errors(exact, {"ours": ours, "plain": plain, "exact": exact})
    assert found["exact"] == {OUTPUTS: 0.0, GRADIENTS: 0.0}
    for name in ("ours", "plain"):
        assert 0 < found[name][GRADIENTS] < 1e-5 and found[name][OUTPUTS] < 1e-5
    assert not ours.gradients() and not exact.gradients()


@both
def test_ours_keeps_less_for_backward_than_the_baseline(make: Make) -> None:
    ours, plain = make()
    found = counts_of(ours)
    assert found == counts_of(ours) and found["flops"] > 0
    assert 0 < found["saved_bytes"] < counts_of(plain)["saved_bytes"]
    measured = memory_of(ours)
    assert measured.saved_beyond_inputs == found["saved_bytes"] < measured.saved


def test_both_ways_to_turn_pairs_agree() -> None:
    x, angles = torch.randn(2, 3, 5, 8), torch.rand(2, 1, 5, 4)
    by_halves = torch.stack([angles.repeat_interleave(2, -1).cos(), angles.repeat_interleave(2, -1).sin()])
    by_pairs = torch.polar(torch.ones_like(angles), angles)
    assert torch.allclose(turned_halves(x, by_halves), turned_pairs(x, by_pairs), atol=1e-6)


def test_every_system_states_its_size() -> None:
    assert {name: system.shape() for name, system in SYSTEMS.items()} == {
        "oner": "width 256, 4 layers, 48 px, 16 pairs",
        "uta": "width 192, 6 layers, 48 px, 16 images",
        "clip": "widths 192 and 128, 4 and 3 layers, 48 px, 16 pairs",
    }
