"""The plan of a study: which configurations it trains, at equal steps and at equal operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from oner_fast.ablation.rows import REFERENCE, AnyRow, Row, all_rows
from oner_fast.data.batch import PairBatch, TokenizedText
from oner_fast.data.dataset import PairDataset
from oner_fast.evaluation.embed import spaced
from oner_fast.models.clip import CLIPConfig, clip_tokenizer
from oner_fast.models.clip_packed import pack_tokens
from oner_fast.models.oner import OneRConfig
from oner_fast.train.clip import flops as clip_flops
from oner_fast.train.clip.settings import CLIPConfiguration, Contrast
from oner_fast.train.config.registry import find_recipe
from oner_fast.train.engine.batches import build_tokenizer
from oner_fast.train.lit.settings import LiTConfiguration
from oner_fast.train.oner import flops as oner_flops
from oner_fast.train.oner import recipes
from oner_fast.train.oner.settings import OneRConfiguration
from oner_fast.train.uta.settings import UTAConfiguration

Equal = Literal["steps", "flops", "time"]
SAMPLED = 512
"""Training captions, evenly spaced, whose lengths decide the operations of a pair."""
_MULTIPLIED = ("depth", "batch_size")

C = TypeVar("C")
Configuration = OneRConfiguration | CLIPConfiguration
Trained = Configuration | UTAConfiguration | LiTConfiguration


@dataclass(frozen=True)
class StudySettings:
    """The settings that all runs of a study share.

    Attributes:
        recipe: the recipe that every row changes.
        data: the data; the recipe's own where empty.
        val_data: the data to evaluate on; `data` where empty.
        steps: the steps of a run at equal steps; the recipe's own where None.
        quick: whether the models and the runs are tiny, to try the command out.
    """

    recipe: str
    data: str = ""
    val_data: str = ""
    steps: int | None = None
    quick: bool = False

    def _base(self, kind: type[C], shrunk: Callable[[C], C]) -> C:
        config: Any = find_recipe(self.recipe, kind)()
        train_data, val_data = self.data or config.data.train_data, self.val_data or config.data.val_data
        config = replace(config, data=replace(config.data, train_data=train_data, val_data=val_data))
        if self.quick:
            config = shrunk(config)
        made: C = config if self.steps is None else with_steps(config, self.steps)
        return made


@dataclass(frozen=True)
class Settings(StudySettings):
    """The settings of the study of OneR."""

    recipe: str = recipes.DEFAULT

    def base(self) -> OneRConfiguration:
        """Build the configuration that every row changes.

        Raises:
            ValueError: there is no such recipe of OneR, or the steps do not fit it.
        """
        return self._base(OneRConfiguration, _quick)


@dataclass(frozen=True)
class PlannedRun:
    """One run of the study.

    Attributes:
        row: its row.
        equal: what it has in common with the other rows of its table.
        seed: its seed.
        config: its whole configuration; `run.run_dir` is its folder.
        pair_flops: operations of a pair, forward and backward.
    """

    row: AnyRow
    equal: Equal
    seed: int
    config: Trained
    pair_flops: float

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.run.run_dir)

    @property
    def described(self) -> str:
        """The run in words: its row, seed and steps."""
        return f"{self.row.title}, seed {self.seed}, {self.config.optim.steps:,} steps"

    @property
    def flops(self) -> float:
        """Operations of the whole run."""
        return self.pair_flops * self.config.optim.batch_size * self.config.optim.steps


def with_steps(config: Any, steps: int) -> Any:
    """Give a configuration other steps; warm-up, checkpoints and snapshots keep their place in the run."""
    optim, run = config.optim, config.run

    def scaled(every: int) -> int:
        return every and max(1, round(every * steps / optim.steps))

    warmup = min(round(optim.warmup * steps / optim.steps), steps - 1)
    return replace(
        config,
        optim=replace(optim, steps=steps, warmup=warmup),
        run=replace(run, save_every=scaled(run.save_every), snapshot_every=scaled(run.snapshot_every)),
    )


def plan(
    settings: Settings, rows: Sequence[Row], equals: Sequence[Equal], seeds: Sequence[int], out: Path
) -> list[PlannedRun]:
    """Plan the runs, in an order in which every table fills up soon: equal steps first, and seed after seed.

    Rows of the factors are compared at equal steps only: each changes little else than what it is named for.

    Args:
        settings: what the runs share.
        rows: the rows.
        equals: the comparisons.
        seeds: the seeds of each row.
        out: the study's folder; the runs are in its `runs`.
    """
    base = settings.base()
    lengths = _lengths(base)
    reference = configured(base, all_rows()[REFERENCE])
    target = _pair_flops(reference, lengths) * reference.optim.batch_size * reference.optim.steps
    planned = []
    for group in ("main", "factors", "scale"):
        for equal in equals if group == "main" else [each for each in equals if each == "steps"]:
            for seed in seeds:
                for row in rows:
                    if row.group == group:
                        config = configured(base, row)
                        cost = _pair_flops(config, lengths)
                        if equal == "flops":
                            config = with_steps(config, _equal_steps(target / (cost * config.optim.batch_size), config))
                        # Equal steps and equal operations of the same row may be the same run, in the same folder.
                        name = f"{row.name}-{config.optim.steps}-seed{seed}"
                        run = replace(config.run, seed=seed, run_dir=str(out / "runs" / name))
                        planned.append(PlannedRun(row, equal, seed, replace(config, run=run), cost))
    return planned


def _equal_steps(exact: float, config: Configuration) -> int:
    """Round a number of steps; one within half a per cent of the steps at equal steps is that number, and one run."""
    steps = config.optim.steps
    return steps if abs(exact / steps - 1) < 0.005 else max(1, round(exact))


def configured(base: OneRConfiguration, row: Row) -> Configuration:
    """Make the configuration of a row from the recipe's, or that of a CLIP of its size."""

    def changed(part: Any, values: Any) -> Any:
        """Set the values; the numbers of a few fields multiply those of the recipe."""
        given = {
            name: max(1, round(getattr(part, name) * value)) if name in _MULTIPLIED else value
            for name, value in values.items()
        }
        return replace(part, **given)

    if row.clip:
        return _as_clip(base)
    # In one step, since a model of two trunks refuses the recipe's own objectives.
    return replace(
        base,
        model=changed(base.model, row.model),
        objectives=changed(base.objectives, row.objectives),
        data=changed(base.data, row.data),
        optim=changed(base.optim, row.optim),
    )


def _as_clip(base: OneRConfiguration) -> CLIPConfiguration:
    """Build open_clip's architecture of the recipe's size.

    ViT-B/16 gives open_clip's ViT-B-16, but for the joint space's width and the longest text, which are OneR's.
    """
    m: OneRConfig = base.model
    # open_clip's text tower has two thirds of the image tower's width, in heads of 64, where that is a whole number.
    width = 2 * m.width // 3 if (2 * m.width) % (3 * 64) == 0 else m.width
    model = CLIPConfig(
        image_size=m.image_size,
        patch_size=m.patch_size,
        vision_width=m.width,
        vision_layers=m.depth,
        vision_heads=m.heads,
        text_width=width,
        text_layers=m.depth,
        text_heads=max(1, width // 64) if width != m.width else m.heads,
        context_length=m.max_text_tokens + 2,
        embed_dim=m.embed_dim,
    )
    return CLIPConfiguration(model=model, contrast=Contrast(), data=base.data, optim=base.optim, run=base.run)


def _quick(config: OneRConfiguration) -> OneRConfiguration:
    """Shrink a configuration so that a run takes seconds."""
    return replace(
        config,
        model=replace(config.model, width=64, depth=2, heads=2, embed_dim=32, projector_hidden=64),
        objectives=replace(config.objectives, predictor_hidden=64),
        optim=replace(config.optim, steps=24, batch_size=32, warmup=4),
        run=replace(config.run, save_every=12, snapshot_every=8, snapshot_pairs=64, log_every_n_steps=8),
    )


@cache
def _lengths(base: OneRConfiguration) -> _Lengths:
    """Read the sample once for all plans of a study."""
    return _Lengths(base)


class _Lengths:
    """Tokens of a sample of the training captions, by OneR's tokenizer and by CLIP's."""

    def __init__(self, base: OneRConfiguration) -> None:
        self.base = base
        dataset = PairDataset(base.data.train_data, base.data.train_split)
        self.captions = [dataset.caption(row) for row in spaced(len(dataset), SAMPLED)]

    @cached_property
    def oner(self) -> TokenizedText:
        """The sample, packed by the tokenizer that the runs will learn."""
        return build_tokenizer(self.base.data)(self.captions, self.base.model.max_text_tokens)

    @cached_property
    def clip(self) -> list[int]:
        """The tokens of each caption of the sample, with its start and end."""
        tokens = clip_tokenizer(_as_clip(self.base).model)(self.captions)
        lengths: list[int] = pack_tokens(tokens).lengths.tolist()
        return lengths


def _pair_flops(config: Configuration, lengths: _Lengths) -> float:
    """Count the operations of a pair, the mean over a sample of the captions."""
    count = len(lengths.captions)
    if isinstance(config, CLIPConfiguration):
        return clip_flops.step_flops(config.model, lengths.clip, config.optim.batch_size) / count
    batch = PairBatch(torch.empty(count, 3, 1, 1), lengths.oner, torch.arange(count), lengths.captions, 0, 0)
    return oner_flops.step_flops(config, batch) / count
