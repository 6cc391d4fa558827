"""The study of UTA's masks: its rows, and what equal steps, operations and time make of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from oner_fast.ablation import uta_pace
from oner_fast.ablation.uta_plan import Settings, TeacherSource, configured, plan
from oner_fast.ablation.uta_rows import REFERENCE, ROWS, chosen_rows
from oner_fast.train.config.registry import get_recipe
from oner_fast.train.uta.recipes import DEFAULT
from oner_fast.train.uta.settings import UTAConfiguration

CLIP = TeacherSource("clip", "teachers/clip", None, 141_437_952)
FREE = TeacherSource("free", "teachers/free", None, 0.0)


def test_the_rows_are_the_recipes_of_their_names() -> None:
    base = Settings().base()
    names = {
        "uta": DEFAULT,
        "block": "uta_block_tiny_icons_cpu",
        "random": "uta_random_tiny_icons_cpu",
        "full": "distillation_long_tiny_icons_cpu",
        "mask_token": "masktoken_tiny_icons_cpu",
    }
    for row in ROWS:
        config = configured(base, row, CLIP)
        assert config.alignment.teacher == CLIP.source and config.optim == base.optim
        if row.name in names:
            known = get_recipe(names[row.name], UTAConfiguration)
            assert config.model == known.model
            assert replace(config.alignment, teacher=known.alignment.teacher) == known.alignment
    assert len({repr(configured(base, row, CLIP)) for row in ROWS}) == len(ROWS)


def test_rows_of_equal_cost_are_one_run_and_the_others_get_their_share(tmp_path: Path) -> None:
    rows, pace = chosen_rows(["main", "factors"]), {"clip.uta": 1.0, "clip.full": 1.6, "clip.block": 1.3}
    planned = plan(Settings(), rows, ("steps", "flops", "time"), range(2), [CLIP], tmp_path, pace)
    steps = {(each.row.name, each.equal): each.config.optim.steps for each in planned}
    assert steps["clip.full", "steps"] == steps["clip.uta", "flops"] == 600
    assert steps["clip.full", "flops"] == get_recipe("distillation_tiny_icons_cpu").optim.steps == 358
    assert steps["clip.full", "time"] == 375
    # Another mask is as much work, whatever was measured.
    assert {steps[f"clip.{name}", equal] for name in ("block", "random") for equal in ("flops", "time")} == {600}
    folders = {each.folder for each in planned if each.seed == 0}
    assert len(folders) == len(ROWS) + 2
    assert {each.equal for each in planned if each.row.group == "factors"} == {"steps"}
    whole = {each.row.name: each.flops for each in planned if each.equal == "flops"}
    assert whole["clip.full"] == pytest.approx(whole["clip.uta"], rel=2e-3)
    assert all(each.row.teacher == "clip" for each in planned if hasattr(each.row, "teacher"))
    # Without the teacher, distillation would get fewer steps: its own part weighs more.
    alone = plan(Settings(), chosen_rows(["main"]), ("flops",), [0], [FREE], tmp_path, {})
    assert next(each.config.optim.steps for each in alone if each.row.name == "free.full") == 303


def test_rows_at_equal_time_wait_for_the_pace(tmp_path: Path) -> None:
    planned = plan(Settings(), chosen_rows(["main"]), ("time",), [0], [CLIP], tmp_path, {})
    assert [each.row.name for each in planned] == ["clip.uta", "clip.block", "clip.random"]


def test_names_and_groups_choose_rows_and_the_reference_stays() -> None:
    assert [row.name for row in chosen_rows(["block"])] == ["uta", "block"]
    assert {row.group for row in chosen_rows(["factors"])} == {"main", "factors"}
    with pytest.raises(ValueError, match="--rows masks: no such row or group; groups: main, factors; rows: uta, block"):
        chosen_rows(["masks"])
    names = {row.name for row in ROWS}
    assert all(set(row.against) <= names for row in ROWS) and REFERENCE.name == "uta"
    towards = REFERENCE.towards("lit")
    assert (towards.name, towards.against) == ("lit.uta", ("lit.block", "lit.random", "lit.full"))


def test_a_damaged_pace_is_named(tmp_path: Path) -> None:
    assert uta_pace.read(tmp_path) == {}
    for text in ('{"seconds_a_step": {"clip.uta": -1}}', '{"seconds_a_step": []}', "{}"):
        (tmp_path / uta_pace.FILE).write_text(text)
        with pytest.raises(ValueError, match=r"pace.json must hold positive numbers .* remove it to measure again"):
            uta_pace.read(tmp_path)
