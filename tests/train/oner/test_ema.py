from __future__ import annotations

from typing import Any

import pytest
import torch

from oner_fast.train.oner.ema import build_teacher, update_teacher


def test_the_teacher_begins_as_a_copy_without_gradient(small: Any) -> None:
    tower = small.student(small.config(), torch.float32).tower
    teacher = build_teacher(tower)
    for one, other in zip(tower.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(one, other) and one.data_ptr() != other.data_ptr()
        assert one.requires_grad and not other.requires_grad


@pytest.mark.parametrize("model", [{}, {"shared_trunk": False, "shared_head": False}])
@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.996, 1.0])
def test_every_parameter_moves_by_the_formula(small: Any, model: dict[str, Any], momentum: float) -> None:
    config = small.config(model=model, cmc=0)
    student, other = small.student(config), small.student(config)
    small.shake(other, 5)
    teacher = build_teacher(other.tower)
    before = [parameter.clone() for parameter in teacher.parameters()]
    student_before = [parameter.clone() for parameter in student.tower.parameters()]
    update_teacher(teacher, student.tower, momentum)
    update_teacher(teacher, student.tower, momentum)
    for start, mine, found in zip(before, student.tower.parameters(), teacher.parameters(), strict=True):
        expected = momentum * (momentum * start + (1 - momentum) * mine) + (1 - momentum) * mine
        torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-13)
    for start, mine in zip(student_before, student.tower.parameters(), strict=True):
        assert torch.equal(start, mine)
