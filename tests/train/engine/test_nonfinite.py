from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from oner_fast.ops import mixup_info_nce, token_alignment
from oner_fast.ops.implementations import implementations
from oner_fast.train.engine.late_numbers import LateNumbers
from oner_fast.train.engine.nonfinite import NonFiniteError, NonFiniteGuard
from oner_fast.train.engine.optimizer import build_adamw, step_unless
from oner_fast.train.oner.ema import lerp_unless, update_teacher

GOOD, NAN, INF = torch.tensor(1.0), torch.tensor(math.nan), torch.tensor(-math.inf)


def skips(guard: NonFiniteGuard, loss: torch.Tensor, norm: torch.Tensor) -> bool:
    """Take a step's decision as the loop does, with the host's reading behind it."""
    vote = guard.vote(loss, norm)
    assert vote.shape == () and vote.dtype == torch.float32 and vote.item() in (0.0, 1.0)
    guard.settle()
    return bool(vote)


@pytest.mark.parametrize(("loss", "norm"), [(NAN, GOOD), (INF, GOOD), (GOOD, NAN), (GOOD, INF), (NAN, INF)])
def test_each_kind_of_nonfinite_step_is_skipped_and_counted(loss, norm):
    guard = NonFiniteGuard()
    assert not skips(guard, GOOD, GOOD)
    assert skips(guard, loss, norm)
    assert (guard.skipped, guard.consecutive) == (1, 1)
    assert not skips(guard, GOOD, GOOD)
    assert (guard.skipped, guard.consecutive) == (1, 0)


def test_a_norm_of_another_dtype_is_taken():
    assert skips(NonFiniteGuard(), GOOD, torch.tensor(math.nan, dtype=torch.float64))
    assert not skips(NonFiniteGuard(), GOOD.bfloat16(), torch.tensor(1e300, dtype=torch.float64))


def test_twenty_in_a_row_end_the_training():
    guard = NonFiniteGuard()
    for _ in range(19):
        assert skips(guard, NAN, GOOD)
    assert not skips(guard, GOOD, GOOD)
    for _ in range(19):
        assert skips(guard, GOOD, INF)
    words = (
        r"20 steps in a row .*loss 1\.0, gradient norm -inf on this rank; loss bad on 0 ranks, gradient on 1\).*learn"
    )
    with pytest.raises(NonFiniteError, match=words):
        skips(guard, GOOD, INF)
    assert guard.skipped == 39


class OnTheirWay:
    """Numbers that arrive when the host waits for them, as those of a GPU."""

    def __init__(self) -> None:
        self.waited = 0

    def __call__(self, numbers):
        def synchronize() -> None:
            self.waited += 1

        return numbers, SimpleNamespace(synchronize=synchronize)


def test_on_a_gpu_the_counts_are_those_of_the_step_before():
    way = OnTheirWay()
    guard = NonFiniteGuard(limit=3, late=LateNumbers(way))
    assert skips(guard, NAN, GOOD)
    assert (guard.skipped, way.waited) == (0, 0)  # the device has skipped the step, and the host does not know
    assert skips(guard, NAN, GOOD)
    assert (guard.skipped, way.waited) == (1, 1)
    guard.settle(everything=True)
    assert (guard.skipped, way.waited) == (2, 2)
    guard.settle(everything=True)
    assert way.waited == 2


def test_on_a_gpu_the_training_ends_a_step_later_with_the_numbers_of_the_last_bad_step():
    guard = NonFiniteGuard(limit=2, late=LateNumbers(OnTheirWay()))
    for loss in (NAN, INF):
        skips(guard, loss, GOOD)
    with pytest.raises(NonFiniteError, match=r"2 steps in a row .*loss -inf, gradient norm 1\.0 on this rank"):
        skips(guard, GOOD, GOOD)


def test_counts_travel_in_a_checkpoint():
    guard, other = NonFiniteGuard(limit=3), NonFiniteGuard(limit=3)
    skips(guard, NAN, GOOD)
    skips(guard, NAN, GOOD)
    other.load_state_dict(guard.state_dict())
    with pytest.raises(NonFiniteError):
        skips(other, NAN, GOOD)


def test_a_limit_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        NonFiniteGuard(limit=0)


def test_a_skipped_step_leaves_parameters_moments_and_counts_of_steps():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    other = copy.deepcopy(layer)
    one, two = build_adamw(layer, 0.1), build_adamw(other, 0.1)
    gradients = [torch.randn(2, 3), torch.full((2, 3), math.nan), torch.randn(2, 3)]
    for gradient in gradients:
        skip = torch.tensor(float(not gradient.isfinite().all()))
        layer.weight.grad, layer.bias.grad = gradient, gradient[:, 0].clone()
        step_unless(skip, one)
        if not skip:
            other.weight.grad, other.bias.grad = gradient, gradient[:, 0].clone()
            two.step()
    for mine, wanted in zip(layer.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, wanted)
        for name, value in one.state[mine].items():
            assert torch.equal(value, two.state[wanted][name]), name
        assert one.state[mine]["step"] == 2


def test_a_skipped_step_leaves_the_average():
    teacher, tower = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    before = [parameter.clone() for parameter in teacher.parameters()]
    update_teacher(teacher, tower, 0.9, torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), before, strict=True))
    update_teacher(teacher, tower, 0.9, torch.tensor(0.0))
    plain = [torch.lerp(a, b, 1 - 0.9) for a, b in zip(before, tower.parameters(), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), plain, strict=True))


def test_the_average_moves_alike_where_the_device_decides():
    averages, towers = ([torch.randn(5, 3), torch.randn(4)] for _ in range(2))
    before = [each.clone() for each in averages]
    lerp_unless(torch.tensor(1.0), averages, towers, 0.25)
    assert all(torch.equal(a, b) for a, b in zip(averages, before, strict=True))
    lerp_unless(torch.tensor(0.0), averages, towers, 0.25)
    for found, old, new in zip(averages, before, towers, strict=True):
        torch.testing.assert_close(found, torch.lerp(old, new, 0.25), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("op", [mixup_info_nce, token_alignment])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_with_a_diverged_row_is_skipped(op, dtype):
    """Weights of 1e19 make rows whose squares overflow: their direction is lost, and the loss must not hide that."""
    able = [name for name, one in implementations(op.__name__).items() if not one.reasons_against("cpu")]
    for implementation in able:
        layer, guard = torch.nn.Linear(4, 8).to(dtype), NonFiniteGuard()
        x, target = torch.randn(3, 4, dtype=dtype), torch.randn(3, 8, dtype=dtype)
        for size, wanted in ((1.0, False), (1e20, True)):
            with torch.no_grad():
                layer.weight.copy_(torch.full_like(layer.weight, 0.5) * size)
            rows = layer(x)
            given = (rows, target, 5.0) if op is mixup_info_nce else (rows.unsqueeze(0), target.unsqueeze(0))
            loss = op(*given, implementation=implementation)
            gradients = torch.autograd.grad(loss, list(layer.parameters()))
            assert skips(guard, loss, torch.nn.utils.get_total_norm(gradients)) is wanted, (implementation, size)
        assert guard.skipped == 1
