"""Every recipe builds, is named and documented, survives JSON, and the ablation's rows are all there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from oner_fast.models.oner import OneR
from oner_fast.train.config.command_line import parse
from oner_fast.train.config.registry import get_recipe, recipes
from oner_fast.train.config.serialization import from_dict, load_json, save_json, to_dict
from oner_fast.train.oner.recipes import DEFAULT
from oner_fast.train.oner.settings import OneRConfiguration
from oner_fast.train.oner.student import Student

NAMES = [name for name, build in recipes().items() if build.__module__ == "oner_fast.train.oner.recipes"]


def contrasts(config: OneRConfiguration) -> tuple[bool, ...]:
    weights = config.objectives
    return tuple(bool(weight) for weight in (weights.itc, weights.xmc, weights.cic, weights.cmc))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_a_whole_configuration(name: str) -> None:
    config, build = get_recipe(name), recipes()[name]
    assert isinstance(config, OneRConfiguration) and config == build()
    assert build.__name__ == name and len(name.split("_")) >= 4
    assert name.split("_")[0] in ("oner", "twotowers", "twoheads")
    first = (build.__doc__ or "").strip().splitlines()[0]
    assert 20 < len(first) <= 120 and first[0].isupper()
    o, run = config.optim, config.run
    assert 0 <= o.warmup < o.steps and 0 < o.min_lr < o.lr
    assert o.batch_size % o.accum_freq == 0 and 0 < run.save_every <= o.steps
    assert run.run_dir.startswith("runs/") and run.deterministic
    assert config.objectives.temperature > 0


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_through_json(name: str, tmp_path: Path) -> None:
    config = get_recipe(name)
    assert from_dict(OneRConfiguration, json.loads(json.dumps(to_dict(config)))) == config
    save_json(config, tmp_path / "config.json")
    assert load_json(OneRConfiguration, tmp_path / "config.json") == config


@pytest.mark.parametrize("name", NAMES)
def test_the_student_of_a_recipe_can_be_built(name: str) -> None:
    config = get_recipe(name)
    with torch.device("meta"):
        student = Student(config.model, config.objectives)
    assert isinstance(student.tower, OneR)
    assert (student.predictor is not None) == config.objectives.momentum_teacher
    assert (student.word_head is not None) == bool(config.objectives.mlm)
    assert (student.patch_head is not None) == bool(config.objectives.mim)
    assert (student.tower.text_trunk is None) == config.model.shared_trunk


def test_no_two_recipes_share_a_run_folder() -> None:
    folders = [get_recipe(name).run.run_dir for name in NAMES]
    assert len(set(folders)) == len(folders)


def test_the_default_is_the_demo_with_the_whole_of_oner() -> None:
    assert DEFAULT == "oner_tiny_pictograms_cpu" in NAMES
    weights = get_recipe(DEFAULT).objectives
    assert min(weights.itc, weights.cmc, weights.mlm, weights.mim) > 0 and weights.momentum_teacher
    assert weights.xmc == weights.cic == 0


# The table of the paper's ablation: ITC, XMC, CIC, CMC, and the towers.
ROWS: dict[str, tuple[tuple[bool, ...], dict[str, Any]]] = {
    "CLIP, two towers": ((True, False, False, False), {"shared_trunk": False, "shared_head": False}),
    "one trunk, two heads, ITC": ((True, False, False, False), {"shared_trunk": True, "shared_head": False}),
    "one tower, ITC": ((True, False, False, False), {"shared_trunk": True, "shared_head": True}),
    "+ XMC": ((True, True, False, False), {"shared_trunk": True, "shared_head": True}),
    "+ XMC + CIC": ((True, True, True, False), {"shared_trunk": True, "shared_head": True}),
    "OneR (CMC)": ((True, False, False, True), {"shared_trunk": True, "shared_head": True}),
}


@pytest.mark.parametrize("ending", ["tiny_pictograms_cpu", "vitb16_cc3m_a100x8"])
@pytest.mark.parametrize("row", list(ROWS))
def test_every_row_of_the_ablation_is_a_recipe(row: str, ending: str) -> None:
    wanted, towers = ROWS[row]
    found = []
    for name in NAMES:
        config = get_recipe(name)
        model = {key: getattr(config.model, key) for key in towers}
        if name.endswith(ending) and contrasts(config) == wanted and model == towers:
            found.append(name)
    assert len(found) == 1, found


@pytest.mark.parametrize("ending", ["tiny_pictograms_cpu", "vitb16_cc3m_a100x8"])
def test_ablation_recipes_differ_only_in_the_compared_settings(ending: str) -> None:
    """Same data, optimiser and sizes in each row; CLIP has its own frame, without masks and teacher."""
    rows = {name: get_recipe(name) for name in NAMES if name.endswith(ending)}
    base = rows[f"oner_{ending}"]
    for name, config in rows.items():
        assert config.data == base.data and config.optim == base.optim, name
        same = dataclasses.replace(config.model, shared_trunk=True, shared_head=True)
        assert same == base.model, name
        mine = dataclasses.replace(config.run, run_dir=base.run.run_dir, recipe=base.run.recipe)
        assert mine == base.run, name
        weights = dataclasses.replace(config.objectives, itc=1.0, xmc=0.0, cic=0.0, cmc=1.0)
        if name.startswith("twotowers_"):
            assert not config.objectives.momentum_teacher and config.objectives.symmetric
            assert config.objectives.learnable_temperature and not config.objectives.mlm and not config.objectives.mim
        else:
            assert weights == base.objectives, name


@pytest.mark.parametrize(
    ("flags", "steps", "warmup"),
    [
        (["--steps", "50"], 50, 4),
        (["--steps=6"], 6, 0),
        (["--optim.steps", "48"], 48, 4),
        (["--steps", "51"], 51, 50),
        (["--steps", "9", "--steps", "100"], 100, 50),
        (["--steps", "20", "--warmup", "19"], 20, 19),
    ],
)
def test_fewer_steps_than_the_warm_up_shorten_it_in_proportion(flags: list[str], steps: int, warmup: int) -> None:
    config = parse(flags, "oner_tiny_pictograms_cpu", "prog", OneRConfiguration)
    assert (config.optim.steps, config.optim.warmup) == (steps, warmup)


@pytest.mark.parametrize("steps", ["0", "-3", "x", "1e3", "²"])
def test_steps_that_are_no_number_are_refused_as_before(steps: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--steps", steps], "oner_tiny_pictograms_cpu", "prog", OneRConfiguration)
    assert "becomes" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", "  "])
def test_a_run_needs_a_folder(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--run-dir", name], "oner_tiny_pictograms_cpu", "prog", OneRConfiguration)
    assert "run_dir must name the folder of the run" in capsys.readouterr().err
