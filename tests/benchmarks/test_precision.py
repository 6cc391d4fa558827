"""Errors against float64: groups of results, several draws, and what open_clip's training computes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from oner_fast.benchmarks.cases import OURS, Call, Case, Contender, step
from oner_fast.benchmarks.ops import mixup_info_nce as contrast
from oner_fast.benchmarks.precision import DRAWS, grouped, more_draws, relative_error
from oner_fast.benchmarks.rows import GRADIENTS, OUTPUTS, Row
from oner_fast.models.optional_packages import optional_package


def test_errors_are_grouped_by_outputs_and_gradients() -> None:
    assert grouped([1.0, 3.0, 2.0], 2) == {OUTPUTS: 1.0, GRADIENTS: 3.0}
    assert grouped([1.0, 3.0], 0) == {OUTPUTS: 3.0}


def test_the_largest_error_of_all_draws_counts() -> None:
    seeds = []

    def make(seed: int, device: str) -> Call:
        seeds.append(seed)
        x = torch.full((4,), float(seed)).requires_grad_()
        return Call((x,), (x,), (torch.ones(4),))

    def off_at_one(x: torch.Tensor) -> torch.Tensor:
        return 2 * x * (1.25 if x[0] == 1 else 1.0)

    def exact(call: Call) -> tuple[torch.Tensor, ...]:
        return call.arguments[0].detach().double() * 2, torch.full((4,), 2.0, dtype=torch.float64)

    wrong = Contender("eager wrong", off_at_one)
    case = Case("op", "tiny", torch.float32, make, [Contender(OURS, off_at_one), wrong], exact, 1.0, 1.0, "copy")
    row = Row("op", "tiny", "float32", refused={"eager wrong": "why"})
    row.precision = {name: {OUTPUTS: 0.0, GRADIENTS: 0.5} for name in (OURS, "eager wrong")}
    more_draws(case, {one.name: one.forward for one in case.contenders}, row, "cpu", lambda text: None)
    assert seeds == list(range(1, DRAWS))
    assert row.precision[OURS] == {OUTPUTS: pytest.approx(0.25), GRADIENTS: 0.5}
    assert row.precision["eager wrong"] == {OUTPUTS: 0.0, GRADIENTS: 0.5}  # a refused one is not run again


def test_a_case_of_precision_alone_has_open_clip_beside_ours() -> None:
    (case,) = [case for case in contrast.cases(False) if case.measured == ("precision",)]
    assert not case.timed and case.dtype == torch.bfloat16 and "logit scale 100" in case.shape
    assert float(case.make(0, "cpu").arguments[2].detach()) == 100.0


def test_open_clips_loss_runs_as_its_training_runs_it() -> None:
    try:
        optional_package("open_clip")
    except ModuleNotFoundError:
        pytest.skip("open_clip is not installed")
    case = contrast.case(96, 32, torch.bfloat16)
    named = {one.name: one for one in case.contenders if "ClipLoss" in one.name}
    assert [one.quick for one in named.values()] == [False, True]
    call = case.make(0, "cpu")
    query, key, scale = (one.detach() for one in call.arguments)
    # By hand: both features normalised in float32, and logits that are rounded to bfloat16.
    a, b = (F.normalize(one.float(), dim=-1) for one in (query, key))
    logits = [((scale * x).bfloat16() @ y.bfloat16().T).float() for x, y in ((a, b), (b, a))]
    by_hand = sum(F.cross_entropy(one, torch.arange(96)) for one in logits) / 2
    loss, *gradients = step(named["eager open_clip ClipLoss, amp_bf16, float32 norms"].forward, call)
    assert loss.dtype == torch.float32 and gradients[0].dtype == torch.bfloat16
    assert float(loss.detach()) == pytest.approx(float(by_hand), rel=1e-6)
    exact = case.exact(call)
    ours = step(case.contender(OURS).forward, call)
    theirs = step(named["eager open_clip ClipLoss, amp_bf16"].forward, call)
    for mine, other, true in zip(ours[:2], theirs[:2], exact[:2], strict=True):
        assert relative_error(mine, true) < relative_error(other, true)
