"""The operations of an image: student and teacher, each as in a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oner_fast.models.clip import build_clip, save_clip
from oner_fast.models.forward_flops import uta_flops
from oner_fast.models.optional_packages import optional_package
from oner_fast.models.teacher import load_teacher
from oner_fast.train.clip.recipes import clip_tiny_icons_cpu
from oner_fast.train.uta.flops import student_flops, teacher_flops
from oner_fast.train.uta.recipes import uta_tiny_icons_cpu


def test_the_teachers_operations_are_those_of_its_sizes(tmp_path: Path) -> None:
    optional_package("open_clip")
    config = clip_tiny_icons_cpu().model
    save_clip(tmp_path, build_clip(config), config)
    width, tokens = config.vision_width, 37
    block = 24 * width**2 * tokens + 4 * width * tokens**2
    wanted = config.vision_layers * block + 2 * 3 * 8**2 * width * 36 + 2 * tokens * width * config.embed_dim
    assert teacher_flops(load_teacher(tmp_path, grid=6), 48) == wanted == 141_437_952


@pytest.mark.parametrize(
    ("changes", "tokens", "patches"),
    [
        ({}, 19, 18),
        ({"mask": "random"}, 19, 18),
        ({"objective": "distillation"}, 37, 36),
        ({"objective": "mask_token"}, 37, 18),
        ({"mask_ratio": 0.75, "drop_path": 0.5}, 10, 9),
    ],
)
def test_the_students_operations_follow_what_enters_it(changes: dict[str, Any], tokens: int, patches: int) -> None:
    base = uta_tiny_icons_cpu()
    config = replace(
        base,
        model=replace(base.model, mask_token=changes.get("objective") == "mask_token"),
        alignment=replace(base.alignment, **changes),
    )
    assert student_flops(config) == 3 * uta_flops(base.model, [tokens], patches)
