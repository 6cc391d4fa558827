"""The recipes of UTA and of CLIPs: what the paper and the specification fix, and what the comparison rows promise."""

from __future__ import annotations

import pytest

from oner_fast.train.clip import recipes as clip_recipes
from oner_fast.train.clip.settings import CLIPConfiguration
from oner_fast.train.config.registry import get_recipe, recipes
from oner_fast.train.uta import recipes as uta_recipes
from oner_fast.train.uta.settings import UTAConfiguration


def tokens(config: UTAConfiguration) -> int:
    """Tokens that enter the student over a run."""
    alignment, cells = config.alignment, config.model.cells
    seen = cells - (alignment.hidden(cells) if alignment.objective == "uta" else 0)
    return config.optim.steps * config.optim.batch_size * (1 + seen)


@pytest.mark.parametrize("name", ["distillation_tiny_icons_cpu", "masktoken_tiny_icons_cpu"])
def test_comparison_recipes_train_on_equally_many_tokens(name: str) -> None:
    ours, theirs = get_recipe(uta_recipes.DEFAULT, UTAConfiguration), get_recipe(name, UTAConfiguration)
    assert tokens(theirs) == pytest.approx(tokens(ours), rel=0.005)
    assert theirs.data == ours.data and theirs.alignment.teacher == ours.alignment.teacher


def test_the_long_comparison_recipe_takes_equally_many_steps_at_twice_the_tokens() -> None:
    ours, theirs = (get_recipe(name) for name in (uta_recipes.DEFAULT, "distillation_long_tiny_icons_cpu"))
    assert theirs.optim == ours.optim and tokens(theirs) == pytest.approx(2 * tokens(ours), rel=0.05)


@pytest.mark.parametrize(
    ("name", "grid", "kept"), [("uta_b16_in21k_a100x8", 14, 98), ("uta_l14_in21k_a100x32", 24, 288)]
)
def test_the_papers_settings(name: str, grid: int, kept: int) -> None:
    c = get_recipe(name, UTAConfiguration)
    assert c.model.grid == grid and c.model.cells - c.alignment.hidden(c.model.cells) == kept
    assert c.model.embed_dim == 1024 and c.alignment.mask == "reversed_block" and c.alignment.objective == "uta"
    o = c.optim
    assert (o.beta1, o.beta2, o.eps, o.wd, o.lr, o.min_lr, o.batch_size, o.grad_clip_norm) == (
        0.9, 0.98, 1e-6, 0.05, 1.5e-3, 1e-5, 2048, 3.0,
    )  # fmt: skip
    epoch = o.steps / 150
    assert epoch * o.batch_size == pytest.approx(14.2e6, rel=0.01) and o.warmup == pytest.approx(epoch, rel=0.01)


def test_the_teacher_fits_the_tiny_student() -> None:
    teacher = get_recipe(clip_recipes.DEFAULT, CLIPConfiguration)
    student = get_recipe(uta_recipes.DEFAULT, UTAConfiguration)
    stage2 = get_recipe("uta_stage2_tiny_icons_cpu", CLIPConfiguration)
    assert (teacher.model.grid, teacher.model.embed_dim) == (student.model.grid, student.model.embed_dim)
    assert student.alignment.teacher == teacher.run.run_dir == stage2.contrast.init_text
    assert stage2.contrast.init_image == student.run.run_dir and stage2.contrast.lock_text
    assert stage2.model.image_size == student.model.image_size


def test_recipes_are_listed_by_their_system_only() -> None:
    assert uta_recipes.DEFAULT in recipes(UTAConfiguration) and uta_recipes.DEFAULT not in recipes(CLIPConfiguration)
    assert all(config().run.recipe == name for name, config in recipes(UTAConfiguration).items())
