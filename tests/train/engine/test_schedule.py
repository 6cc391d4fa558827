import math

import pytest

from oner_fast.train.engine.schedule import cosine_lr, teacher_momentum


def test_learning_rate_at_the_start_the_peak_and_the_end():
    lr = [cosine_lr(s, peak=1.0, total_steps=110, warmup_steps=10, floor=0.1) for s in range(120)]
    assert lr[0] == 0.1 and lr[4] == 0.5 and lr[9] == 1.0 and lr[10] == 1.0
    assert lr[60] == pytest.approx(0.55, abs=1e-15)
    assert lr[109] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 0.99)) / 2, abs=1e-15) and lr[109] > 0.1
    assert lr[110:] == [0.1] * 10
    assert lr[10:111] == sorted(lr[10:111], reverse=True) and lr[:10] == sorted(lr[:10])


def test_learning_rate_without_warm_up():
    assert cosine_lr(0, peak=3e-4, total_steps=1) == 3e-4
    assert cosine_lr(1, peak=3e-4, total_steps=1) == 0.0


def test_momentum_at_the_first_and_last_step():
    momentum = [teacher_momentum(s, total_steps=100) for s in range(103)]
    assert momentum[0] == 0.996
    assert momentum[50] == pytest.approx(0.998, abs=1e-15)
    assert momentum[100:] == [1.0] * 3
    assert momentum == sorted(momentum) and momentum[99] < 1.0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"step": -1}, "step must not be negative"),
        ({"warmup_steps": 10}, "warmup_steps < total_steps"),
        ({"total_steps": 0}, "warmup_steps < total_steps"),
        ({"floor": 2.0}, "floor <= peak"),
    ],
)
def test_bad_learning_rates(change, text):
    arguments = {"step": 0, "peak": 1.0, "total_steps": 10} | change
    with pytest.raises(ValueError, match=text):
        cosine_lr(arguments.pop("step"), **arguments)


@pytest.mark.parametrize("change", [{"step": -1}, {"total_steps": 0}, {"start": 1.1}, {"start": 0.9, "end": 0.8}])
def test_bad_momenta(change):
    arguments = {"step": 0, "total_steps": 10} | change
    with pytest.raises(ValueError, match="needs"):
        teacher_momentum(arguments.pop("step"), **arguments)
