import math

import pytest
import torch

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
