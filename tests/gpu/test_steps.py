"""Whole training steps on a GPU: PyTorch raises where the host would wait for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from oner_fast.data.batch import PairBatch
from oner_fast.train.engine.distributed import World
from oner_fast.train.engine.nonfinite import NonFiniteGuard
from oner_fast.train.engine.optimizer import build_adamw, clip_grad_norm, step_unless
from oner_fast.train.oner.ema import build_teacher, update_teacher
from oner_fast.train.oner.step import TrainingStep
from oner_fast.train.oner.student import Student
from tests.train.conftest import Small


def test_a_step_of_oner_waits_for_nothing() -> None:
    """Three steps; the first compiles kernels, and is free to wait."""
    device = torch.device("cuda", 0)
    config = Small.config(xmc=1.0, cic=0.5, learnable_temperature=True)
    student = Student(config.model, config.objectives).to(device)
    teacher = build_teacher(student.tower)
    optimizer, guard = build_adamw(student, 1e-3), NonFiniteGuard()
    step = TrainingStep(config, student, teacher, Small.vocabulary, World(0, 1, 0, device), torch.bfloat16)

    def take(batch: PairBatch) -> Any:
        result = step(batch)
        norm = clip_grad_norm(student.parameters(), 1.0)
        skip = guard.vote(result.loss, norm)
        step_unless(skip, optimizer)
        update_teacher(teacher, student.tower, 0.99, skip)
        optimizer.zero_grad(set_to_none=True)
        guard.settle()
        return result.loss

    for number in range(3):
        batch = Small.batch(step=number)
        batch = replace(batch, inputs=step.prepare(batch)).pin_memory()
        # The guard waits for an event of the step before, which this mode lets pass, as it lets no other wait.
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        loss = take(batch)
        torch.cuda.set_sync_debug_mode("default")
        assert torch.isfinite(loss)
    guard.settle(everything=True)
    assert guard.skipped == 0


def test_a_step_that_is_not_finite_is_skipped_on_the_gpu() -> None:
    device = torch.device("cuda", 0)
    layer, tower = (torch.nn.Linear(8, 4, device=device) for _ in range(2))
    optimizer, guard = build_adamw(layer, 0.1), NonFiniteGuard(limit=2)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    for _ in range(2):
        skip = guard.vote(torch.ones((), device=device), clip_grad_norm(layer.parameters(), 1.0))
        step_unless(skip, optimizer)
        update_teacher(tower, layer, 0.5, skip)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), before, strict=True))
    assert all(torch.isfinite(parameter).all() for parameter in tower.parameters())
    with pytest.raises(RuntimeError, match="2 steps in a row"):
        guard.settle(everything=True)
