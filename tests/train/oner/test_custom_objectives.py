"""Objectives of one's own: what they add to the step, how they are saved, and what is said where they are wrong."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from oner_fast.train.config.registry import get_recipe
from oner_fast.train.config.serialization import from_dict, load_json, save_json, to_dict
from oner_fast.train.engine import phases
from oner_fast.train.engine.distributed import World, setup, shutdown
from oner_fast.train.oner.custom_objectives import load_objectives
from oner_fast.train.oner.settings import CustomObjective, Objectives, OneRConfiguration

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "my_objective.py"

FILE = """
import torch
import torch.nn.functional as F

def pull(query, key, logit_scale, *, group):
    assert set(key) == {"image", "text"} and not any(each.requires_grad for each in key.values())
    return (1 - F.cosine_similarity(query["image"], key["text"])).mean() * logit_scale

def wide(query, key, logit_scale, *, group):
    return query["image"]

number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path / "mine.py"


def with_custom(config: OneRConfiguration, file: Path, weight: float = 0.5) -> OneRConfiguration:
    custom = (CustomObjective(f"{file}:pull", weight),)
    return replace(config, objectives=replace(config.objectives, custom=custom))


def test_an_objective_adds_its_weighted_loss_and_gradient(small: Any, file: Path) -> None:
    batch, config = small.batch(), small.config()
    gradients, results, outputs = [], [], []
    for each in (config, with_custom(config, file)):
        step, student = small.step(each)
        results.append(step(batch))
        outputs.append((step, student))
        gradients.append({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
    plain, own = results
    assert own.parts.keys() - plain.parts.keys() == {"pull"}
    torch.testing.assert_close(own.loss, plain.loss + 0.5 * own.parts["pull"])
    assert all(torch.equal(own.parts[name], value) for name, value in plain.parts.items())

    # The same by hand, through the student and the teacher of the second step.
    step, student = outputs[1]
    student.zero_grad()
    seen: dict[str, Any] = {}
    step.custom = [replace(step.custom[0], weight=1.0, function=lambda q, k, s, group: seen.update(q=q, k=k) or s * 0)]
    step(batch)
    expected = (1 - F.cosine_similarity(seen["q"]["image"], seen["k"]["text"])).mean() * 5.0  # 1 / temperature 0.2
    torch.testing.assert_close(own.parts["pull"], expected.detach())
    assert any(not torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_micro_batches_change_nothing(small: Any, file: Path) -> None:
    found = []
    for accum_freq in (1, 4):
        step, student = small.step(with_custom(small.config(accum_freq), file))
        result = step(small.batch())
        found.append((result, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}))
    (whole, gradients), (parts, accumulated) = found
    torch.testing.assert_close(whole.loss, parts.loss)
    torch.testing.assert_close(whole.parts, parts.parts)
    torch.testing.assert_close(gradients, accumulated)


def test_two_ranks_train_on_the_mean_of_their_losses(
    small: Any, file: Path, tmp_path: Path, run_two_ranks: Any
) -> None:
    run_two_ranks(__file__, tmp_path, sys.modules[small.__module__].__file__, file)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.testing.assert_close(first, second)
    config, batch = with_custom(small.config(), file), small.batch()
    step, student = small.step(config)
    result = step(batch)  # the mean of a rank's halves is the mean of the whole
    torch.testing.assert_close(first["loss"], result.loss)
    torch.testing.assert_close(first["pull"], result.parts["pull"])
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(first["gradients"][name], parameter.grad)


def test_the_configuration_keeps_objectives_and_resuming_compares_them(file: Path, tmp_path: Path) -> None:
    config = with_custom(OneRConfiguration(), file)
    save_json(config, tmp_path / "config.json")
    assert load_json(OneRConfiguration, tmp_path / "config.json") == config
    saved = from_dict(OneRConfiguration, json.loads(json.dumps(to_dict(config))))
    assert not phases.differences(saved, config)
    for other in (OneRConfiguration(), with_custom(OneRConfiguration(), file, weight=0.25)):
        (change,) = phases.differences(saved, other)
        assert change.startswith("custom ")
    # A configuration from before there were any.
    plain = to_dict(OneRConfiguration())
    del plain["objectives"]["custom"]
    assert from_dict(OneRConfiguration, plain) == OneRConfiguration()


def test_the_example_spreads_images(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLE.parent)
    config = get_recipe("my_objective.py:oner_spread_pictograms_cpu", OneRConfiguration)
    (own,) = load_objectives(config.objectives.custom)
    assert (own.name, own.weight) == ("spread", 0.1)
    one_place = {"image": torch.ones(4, 3)}
    spread = {"image": torch.eye(4)}
    scale = torch.tensor(5.0)
    near, far = (own(query, query, scale, None) for query in (one_place, spread))
    assert near.abs() < 1e-6 and torch.allclose(far, torch.tensor(-4.0))
    step, _ = small.step(
        replace(small.config(), objectives=replace(small.config().objectives, custom=(config.objectives.custom)))
    )
    assert step(small.batch()).parts["spread"] < 0


def test_an_installed_package_can_provide_an_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("margin", "torch.nn.functional:cosine_similarity", "oner_fast.objectives")
    points = importlib.metadata.EntryPoints([point])
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points.select(group=group))
    (loaded,) = load_objectives([CustomObjective("margin", 1.0)])
    assert loaded.function is F.cosine_similarity and loaded.name == "margin"
    with pytest.raises(ValueError, match=r"'margins' is no FILE\.py:FUNCTION and no entry point .* installed: margin"):
        load_objectives([CustomObjective("margins", 1.0)])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pul", r"mine\.py has no function 'pul'"),
        ("number", r"mine\.py has no function 'number'"),
        ("wide", r"must return a 0-d floating-point tensor, got torch.float64 of shape \(8, 5\)"),
    ],
)
def test_a_wrong_function_is_named(name: str, text: str, small: Any, file: Path) -> None:
    custom = (CustomObjective(f"{file}:{name}", 1.0),)
    config = small.config()
    with pytest.raises(ValueError, match=text):
        small.step(replace(config, objectives=replace(config.objectives, custom=custom)))[0](small.batch())


def test_wrong_settings_are_refused() -> None:
    own = CustomObjective("mine.py:pull", 1.0)
    with pytest.raises(ValueError, match="weight of objective 'mine.py:pull' must be above 0"):
        CustomObjective("mine.py:pull", 0.0)
    with pytest.raises(ValueError, match="needs a contrast above 0"):
        Objectives(itc=0, cmc=0, custom=(own,))
    for twice in ((own, own), (CustomObjective("mine.py:itc", 1.0),)):
        with pytest.raises(ValueError, match="need distinct names"):
            Objectives(custom=twice)


def _rank() -> None:
    """One of two processes: argv is rank, size, folder, the makers' file, the objective's file."""
    import importlib.util

    rank, size, folder, makers, objective = int(sys.argv[1]), int(sys.argv[2]), *map(Path, sys.argv[3:])
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    spec = importlib.util.spec_from_file_location("makers", makers)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["makers"] = module
    spec.loader.exec_module(module)
    small = module.Small
    world: World = setup("cpu", init_method=f"file://{folder}/meet")
    config = with_custom(small.config(), objective)
    student = small.student(config)
    result = small.step_of(config, student, world)(small.part(small.batch(), rank, size))
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    torch.save({"loss": result.loss, "pull": result.parts["pull"], "gradients": gradients}, folder / f"{rank}.pt")
    shutdown()


if __name__ == "__main__":
    _rank()
