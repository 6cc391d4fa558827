"""The plan of the study of UTA: its teachers, and its runs at equal steps, equal operations and equal time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from oner_fast.ablation.plan import Equal, PlannedRun, StudySettings, with_steps
from oner_fast.ablation.uta_rows import REFERENCE, TEACHER, UTARow
from oner_fast.models import pretrained_encoders
from oner_fast.models.clip import build_clip
from oner_fast.models.lit import ImageTower, LiTTower, build_heads
from oner_fast.models.teacher import Teacher, load_teacher
from oner_fast.models.teacher_image_towers import TeacherImageTower, image_tower_of
from oner_fast.train.clip import flops as clip_flops
from oner_fast.train.clip import recipes as clip_recipes
from oner_fast.train.clip.settings import CLIPConfiguration
from oner_fast.train.lit import recipes as lit_recipes
from oner_fast.train.lit.settings import LiTConfiguration
from oner_fast.train.uta import recipes
from oner_fast.train.uta.flops import student_flops, teacher_flops
from oner_fast.train.uta.settings import UTAConfiguration

TRAINED = {
    "clip": "a small CLIP from scratch, by clip_tiny_icons_cpu",
    "lit": "heads on two packaged encoders, by lit_tiny_icons_cpu",
}
"""Teachers that the study trains itself."""
_CAPTION = 8
"""Tokens of a caption, about; only the time left to a CLIP's training is estimated from it."""


@dataclass(frozen=True)
class Settings(StudySettings):
    """The settings of the study of UTA."""

    recipe: str = recipes.DEFAULT

    def base(self) -> UTAConfiguration:
        """Build the configuration that every row changes.

        Raises:
            ValueError: there is no such recipe of UTA, or the steps do not fit it.
        """
        return self._base(UTAConfiguration, _quick)


def _quick(config: UTAConfiguration) -> UTAConfiguration:
    """Shrink a configuration so that a run takes seconds."""
    return replace(
        config,
        model=replace(config.model, width=48, depth=2, heads=2, mlp_hidden=64, embed_dim=32),
        optim=replace(config.optim, steps=24, batch_size=32, warmup=4),
        run=replace(config.run, save_every=12, log_every_n_steps=8),
    )


@dataclass(frozen=True)
class TeacherSource:
    """A teacher of the study.

    Attributes:
        name: its name in folders and tables.
        source: its folder or its name, as `--teacher` of `oner-fast train uta` takes it.
        config: the training that makes it; None of one that exists.
        flops: its operations for an image.
    """

    name: str
    source: str
    config: CLIPConfiguration | LiTConfiguration | None
    flops: float


def teacher_source(word: str, settings: Settings, out: Path) -> TeacherSource:
    """Plan a teacher.

    Args:
        word: `clip` or `lit`, which the study trains, or what `--teacher` of `oner-fast train uta` takes.
        settings: what the runs share.
        out: the study's folder.

    Raises:
        FileNotFoundError, ValueError: there is no such teacher, or the settings do not fit.
        ModuleNotFoundError: a package of it is missing.
    """
    base = settings.base()
    model = base.model
    if word not in TRAINED:
        teacher = load_teacher(word, grid=model.grid)
        name = re.sub(r"[^a-z0-9]+", "_", Path(word).name.lower()).strip("_")
        return TeacherSource(name or "teacher", word, None, teacher_flops(teacher, model.image_size))
    config = _clip(settings, base) if word == "clip" else _lit(settings, base)
    folder = out / "runs" / f"{word}.teacher"
    config = replace(config, data=base.data, run=replace(config.run, run_dir=str(folder)))
    teacher = Teacher(_untrained(config), name=word, grid=model.grid)
    return TeacherSource(word, str(folder), config, teacher_flops(teacher, model.image_size))


def _clip(settings: Settings, base: UTAConfiguration) -> CLIPConfiguration:
    config = clip_recipes.clip_tiny_icons_cpu()
    m = base.model
    model = replace(config.model, image_size=m.image_size, patch_size=m.patch_size, embed_dim=m.embed_dim)
    if settings.quick:
        model = replace(model, vision_width=48, vision_layers=1, text_width=32, text_layers=1)
        config = replace(config, optim=replace(config.optim, steps=8, batch_size=32, warmup=2))
    return replace(config, model=model)


def _lit(settings: Settings, base: UTAConfiguration) -> LiTConfiguration:
    config = lit_recipes.lit_tiny_icons_cpu()
    m = base.model
    if settings.quick:
        config = replace(config, optim=replace(config.optim, steps=4, batch_size=16, warmup=1))
    return replace(config, model=replace(config.model, image_size=m.image_size, grid=m.grid, embed_dim=m.embed_dim))


def _untrained(config: CLIPConfiguration | LiTConfiguration) -> TeacherImageTower:
    """Build the image tower with random weights, whose operations are those of the trained one."""
    if isinstance(config, CLIPConfiguration):
        return image_tower_of(build_clip(config.model), "clip")
    encoders = pretrained_encoders.packaged_encoders()
    heads = build_heads(config.model, encoders)
    return LiTTower(ImageTower(encoders.image, heads.image), encoders, config.model.grid)


def teacher_runs(teachers: Sequence[TeacherSource]) -> list[PlannedRun]:
    """Plan the training of each teacher that the study trains: one seed, for all rows and seeds of the students."""
    planned = []
    for each in teachers:
        if each.config is not None:
            if isinstance(each.config, CLIPConfiguration):
                cost = clip_flops.step_flops(each.config.model, [_CAPTION], each.config.optim.batch_size)
            else:
                cost = each.flops
            planned.append(PlannedRun(TEACHER.towards(each.name), "steps", each.config.run.seed, each.config, cost))
    return planned


def configured(base: UTAConfiguration, row: UTARow, teacher: TeacherSource) -> UTAConfiguration:
    """Make the configuration of a row from the recipe's."""
    alignment = replace(base.alignment, teacher=teacher.source, **row.alignment)
    return replace(base, model=replace(base.model, mask_token=alignment.objective == "mask_token"), alignment=alignment)


def plan(
    settings: Settings,
    rows: Sequence[UTARow],
    equals: Sequence[Equal],
    seeds: Sequence[int],
    teachers: Sequence[TeacherSource],
    out: Path,
    pace: Mapping[str, float],
) -> list[PlannedRun]:
    """Plan the students' runs: seed after seed, and teacher after teacher, so that its tokens can be cached.

    Operations and time are those of student and teacher together, as in a run without a cache.

    Args:
        settings: what the runs share.
        rows: the rows, the reference among them.
        equals: the comparisons; the rows of the factors are compared at equal steps only.
        seeds: the seeds of each row.
        teachers: the teachers.
        out: the study's folder; the runs are in its `runs`.
        pace: seconds a step, by `TEACHER.ROW`. Rows at equal time are left out where it lacks some.
    """
    base = settings.base()
    planned = []
    for seed in seeds:
        for teacher in teachers:
            for equal in equals:
                for row in rows:
                    if equal != "steps" and row.group != "main":
                        continue
                    config = configured(base, row, teacher)
                    cost = student_flops(config) + teacher.flops
                    steps = _steps(base, row, teacher, equal, pace)
                    if steps is None:
                        continue
                    named = row.towards(teacher.name)
                    config = config if steps == base.optim.steps else with_steps(config, steps)
                    run = replace(config.run, seed=seed, run_dir=str(out / "runs" / f"{named.name}-{steps}-seed{seed}"))
                    planned.append(PlannedRun(named, equal, seed, replace(config, run=run), cost))
    return planned


def _steps(
    base: UTAConfiguration, row: UTARow, teacher: TeacherSource, equal: Equal, pace: Mapping[str, float]
) -> int | None:
    """Compute the steps of a row; None where its pace is not known."""
    steps = base.optim.steps
    ours, theirs = (student_flops(configured(base, each, teacher)) + teacher.flops for each in (row, REFERENCE))
    # The same operations take the same time, whatever a clock says.
    if equal == "steps" or abs(ours / theirs - 1) < 0.005:
        return steps
    if equal == "flops":
        return max(1, round(steps * theirs / ours))
    seconds = [pace.get(each.towards(teacher.name).name) for each in (row, REFERENCE)]
    if seconds[0] is None or seconds[1] is None:
        return None
    return max(1, round(steps * seconds[1] / seconds[0]))
