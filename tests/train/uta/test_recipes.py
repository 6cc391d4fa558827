"""The recipes of UTA and of CLIPs: what the sources state, our choices, and what the comparison rows promise."""

from __future__ import annotations

from dataclasses import replace

import pytest

from oner_fast.models.uta import UTA_SIZES
from oner_fast.train.clip import recipes as clip_recipes
from oner_fast.train.clip.settings import CLIPConfiguration
from oner_fast.train.config.registry import get_recipe, recipes
from oner_fast.train.uta import recipes as uta_recipes
from oner_fast.train.uta.flops import student_flops
from oner_fast.train.uta.settings import UTAConfiguration

EPOCHS, IMAGES = 150, 14.2e6
TEACHER = 141_437_952  # operations of the CLIP of clip_tiny_icons_cpu for one image; see test_flops.py


def flops(config: UTAConfiguration) -> float:
    """Operations of a whole run, with the teacher's."""
    return config.optim.steps * config.optim.batch_size * (student_flops(config) + TEACHER)


@pytest.mark.parametrize("name", ["distillation_tiny_icons_cpu", "masktoken_tiny_icons_cpu"])
def test_comparison_recipes_need_equally_many_operations(name: str) -> None:
    ours, theirs = get_recipe(uta_recipes.DEFAULT, UTAConfiguration), get_recipe(name, UTAConfiguration)
    assert flops(theirs) == pytest.approx(flops(ours), rel=2e-3)
    assert theirs.data == ours.data and theirs.alignment.teacher == ours.alignment.teacher


def test_the_long_comparison_recipe_takes_equally_many_steps_with_more_operations() -> None:
    ours, theirs = (get_recipe(name) for name in (uta_recipes.DEFAULT, "distillation_long_tiny_icons_cpu"))
    assert theirs.optim == ours.optim and flops(theirs) == pytest.approx(1.7 * flops(ours), rel=0.02)


IN21K = [
    ("uta_b14_in21k_a100x8", "b", 69, 1.3e21),
    ("uta_l14_in21k_a100x32", "l", 240, 1.7e21),
    ("uta_g14_in21k_a100x64", "g", 794, 2.8e21),
]


@pytest.mark.parametrize(("name", "size", "gflops", "whole"), IN21K)
def test_what_the_sources_state(name: str, size: str, gflops: float, whole: float) -> None:
    c, final = get_recipe(name, UTAConfiguration), UTA_SIZES[size]
    assert replace(c.model, image_size=final.image_size, patch_size=final.patch_size) == final
    assert c.alignment.mask == "reversed_block" and c.alignment.objective == "uta"
    assert c.alignment.teacher.startswith("EVA01-g-14-plus:") and c.model.embed_dim == 1024
    # The numbers of its docstring.
    assert student_flops(c) == pytest.approx(gflops * 1e9, rel=0.01)
    assert EPOCHS * IMAGES * (student_flops(c) + 535e9) == pytest.approx(whole, rel=0.04)


@pytest.mark.parametrize("name", [row[0] for row in IN21K])
def test_our_choices_for_pre_training(name: str) -> None:
    c = get_recipe(name, UTAConfiguration)
    assert (c.model.image_size, c.model.patch_size, c.model.grid) == (224, 14, 16)  # the teacher's own grid
    assert c.alignment.hidden(c.model.cells) == 128 and c.alignment.head_init == "normal"
    o = c.optim
    assert (o.beta1, o.beta2, o.eps, o.wd, o.lr, o.min_lr, o.batch_size, o.grad_clip_norm) == (
        0.9, 0.98, 1e-6, 0.05, 1.5e-3, 1e-5, 2048, 3.0,
    )  # fmt: skip
    epoch = o.steps / EPOCHS
    assert epoch * o.batch_size == pytest.approx(IMAGES, rel=0.01) and o.warmup == pytest.approx(epoch, rel=0.01)


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
