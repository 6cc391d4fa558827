"""Operations a pair of the rows that the ablation compares, at ViT-B/16 with captions of 13 tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import oner_fast.train.oner.recipes  # noqa: F401
from oner_fast.data.batch import PairBatch, TokenizedText
from oner_fast.train.config.registry import get_recipe
from oner_fast.train.oner.flops import step_flops

TOKENS = 13


def giga(recipe: str, **objectives: Any) -> float:
    config = get_recipe(f"{recipe}_vitb16_cc3m_a100x8")
    config = replace(
        config,
        model=replace(config.model, shared_head=objectives.get("predictor") != "per_head"),
        objectives=replace(config.objectives, **objectives),
    ) if objectives else config  # fmt: skip
    text = TokenizedText(
        torch.zeros(2 * TOKENS, dtype=torch.int64),
        torch.arange(3, dtype=torch.int32) * TOKENS,
        torch.zeros(2 * TOKENS, dtype=torch.int32),
    )
    batch = PairBatch(torch.empty(2, 3, 1, 1), text, torch.arange(2), ["a"] * 2, 0, 0)
    return step_flops(config, batch) / 2 / 1e9


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [("twotowers", 105), ("twoheads", 253), ("oner_itc", 253), ("oner_xmc", 253), ("oner_xmc_cic", 354), ("oner", 253)],
)
def test_the_rows_of_the_ablation(recipe: str, wanted: int) -> None:
    assert giga(recipe) == pytest.approx(wanted, abs=0.5)


def test_the_factors_are_counted() -> None:
    base = giga("oner_itc")
    predictor = 3 * 3 * 2 * 2 * 256 * 4096 / 1e9  # forward and backward, three passes, two products
    assert base - giga("oner_itc", predictor="none") == pytest.approx(predictor, rel=1e-6)
    assert giga("oner_itc", predictor="per_head") == pytest.approx(base, rel=1e-12)
    assert giga("oner_itc", teacher_view="second") == base == giga("oner_itc", temperature_factor=True, init_gap=2.0)
    bare = giga("oner_itc", mlm=0.0, mim=0.0, momentum_teacher=False, symmetric=True, learnable_temperature=True)
    assert bare == pytest.approx(giga("twotowers"), rel=1e-12)  # two passes through one trunk or through two
