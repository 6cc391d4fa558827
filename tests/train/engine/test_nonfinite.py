import math

import pytest
import torch

from oner_fast.ops import mixup_info_nce, token_alignment
from oner_fast.ops.implementations import implementations
from oner_fast.train.engine.nonfinite import NonFiniteError, NonFiniteGuard

GOOD, NAN, INF = torch.tensor(1.0), torch.tensor(math.nan), torch.tensor(-math.inf)


@pytest.mark.parametrize(("loss", "norm"), [(NAN, GOOD), (INF, GOOD), (GOOD, NAN), (GOOD, INF), (NAN, INF)])
def test_each_kind_of_nonfinite_step_is_skipped_and_counted(loss, norm):
    guard = NonFiniteGuard()
    assert guard.check(GOOD, GOOD)
    assert not guard.check(loss, norm)
    assert (guard.skipped, guard.consecutive) == (1, 1)
    assert guard.check(GOOD, GOOD)
    assert (guard.skipped, guard.consecutive) == (1, 0)


def test_twenty_in_a_row_end_the_training():
    guard = NonFiniteGuard()
    for _ in range(19):
        assert not guard.check(NAN, GOOD)
    assert guard.check(GOOD, GOOD)
    for _ in range(19):
        assert not guard.check(GOOD, INF)
    with pytest.raises(NonFiniteError, match=r"20 steps in a row .*loss 1\.0, gradient norm -inf.*learning rate"):
        guard.check(GOOD, INF)
    assert guard.skipped == 39


def test_counts_travel_in_a_checkpoint():
    guard, other = NonFiniteGuard(limit=3), NonFiniteGuard(limit=3)
    guard.check(NAN, GOOD)
    guard.check(NAN, GOOD)
    other.load_state_dict(guard.state_dict())
    with pytest.raises(NonFiniteError):
        other.check(NAN, GOOD)


def test_a_limit_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        NonFiniteGuard(limit=0)


@pytest.mark.parametrize("op", [mixup_info_nce, token_alignment])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_with_a_diverged_row_is_skipped(op, dtype):
    """Weights of 1e19 make rows whose squares overflow: their direction is lost, and the loss must not hide that."""
    able = [name for name, one in implementations(op.__name__).items() if not one.reasons_against("cpu")]
    for implementation in able:
        layer, guard = torch.nn.Linear(4, 8).to(dtype), NonFiniteGuard()
        x, target = torch.randn(3, 4, dtype=dtype), torch.randn(3, 8, dtype=dtype)
        for size, wanted in ((1.0, True), (1e20, False)):
            with torch.no_grad():
                layer.weight.copy_(torch.full_like(layer.weight, 0.5) * size)
            rows = layer(x)
            given = (rows, target, 5.0) if op is mixup_info_nce else (rows.unsqueeze(0), target.unsqueeze(0))
            loss = op(*given, implementation=implementation)
            gradients = torch.autograd.grad(loss, list(layer.parameters()))
            assert guard.check(loss, torch.nn.utils.get_total_norm(gradients)) is wanted, (implementation, size)
        assert guard.skipped == 1
