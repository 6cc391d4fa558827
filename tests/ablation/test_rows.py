"""The table of rows, the plan that follows from it, and the intervals of its differences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from oner_fast.ablation.confidence import paired, spread, t_quantile
from oner_fast.ablation.plan import Settings, configured, plan, with_steps
from oner_fast.ablation.rows import DECISIVE, MAIN, REFERENCE, all_rows, chosen_rows
from oner_fast.models.clip import CLIPConfig
from oner_fast.train.clip.settings import CLIPConfiguration
from oner_fast.train.config.registry import get_recipe
from oner_fast.train.oner.settings import OneRConfiguration


def test_every_row_is_a_configuration_of_its_own(pairs: Path, tmp_path: Path) -> None:
    planned = plan(Settings(data=str(pairs)), list(all_rows().values()), ("steps",), [0], tmp_path)
    assert len({each.folder for each in planned}) == len(planned) == len(all_rows())
    settings = [replace(each.config, run=planned[0].config.run) for each in planned]
    assert all(settings.count(each) == 1 for each in settings)
    by_name = {each.row.name: each.config for each in planned}
    clip = by_name.pop("clip")
    assert isinstance(clip, CLIPConfiguration)
    assert (clip.model.vision_width, clip.model.vision_layers, clip.model.text_width) == (256, 4, 256)
    base = get_recipe("oner_tiny_pictograms_cpu")
    last = by_name[REFERENCE]
    assert isinstance(last, OneRConfiguration)
    assert (last.model, last.objectives, last.optim) == (base.model, base.objectives, base.optim)
    for name in ("itc", "xmc", "xmc_cic", "two_heads", "two_towers"):  # the rows are the recipes of their names
        recipe = {"two_heads": "twoheads", "two_towers": "twotowers"}.get(name, f"oner_{name}")
        known = get_recipe(f"{recipe}_tiny_pictograms_cpu")
        config = by_name[name]
        assert isinstance(config, OneRConfiguration)
        assert (config.model, config.objectives) == (known.model, known.objectives), name
    deep, small = by_name["itc.deep"], by_name["itc.small_batch"]
    assert isinstance(deep, OneRConfiguration) and deep.model.depth == 8 and small.optim.batch_size == 32


def test_equal_operations_give_steps_in_proportion(pairs: Path, tmp_path: Path) -> None:
    rows = chosen_rows(["main", "itc.unmasked"])
    planned = plan(Settings(data=str(pairs)), rows, ("steps", "flops"), range(2), tmp_path)
    assert [(each.equal, each.seed) for each in planned[:9]] == [("steps", 0)] * 7 + [("steps", 1)] * 2
    assert {each.equal for each in planned if each.row.group != "main"} == {"steps"}
    reference = next(each for each in planned if each.row.name == REFERENCE)
    for each in planned:
        if each.equal == "flops":
            assert each.flops == pytest.approx(reference.flops, rel=5e-3)
            warmup, steps = each.config.optim.warmup, each.config.optim.steps
            assert warmup == pytest.approx(steps * 50 / 600, abs=1)
            assert steps / each.config.run.snapshot_every == pytest.approx(10, rel=0.02)
    same = [each.folder for each in planned if each.row.name == REFERENCE and each.seed == 0]
    assert len(same) == 2 and len(set(same)) == 1


def test_the_size_of_clip_follows_the_recipe() -> None:
    base = Settings(recipe="oner_vitb16_cc3m_a100x8").base()
    model = configured(base, MAIN[0]).model
    assert isinstance(model, CLIPConfig)
    assert (model.vision_width, model.text_width, model.text_heads, model.text_layers) == (768, 512, 8, 12)


def test_names_and_groups_choose_rows() -> None:
    assert [row.name for row in chosen_rows(["decisive"])] == list(DECISIVE)
    assert [row.name for row in chosen_rows(["itc.plain", "clip"])] == ["clip", "itc.plain"]
    assert {row.group for row in chosen_rows(["factors"])} == {"factors"}
    with pytest.raises(ValueError, match="--rows itx: no such row or group; groups: main, factors"):
        chosen_rows(["itx"])
    rows = all_rows()
    assert all(name in rows for row in rows.values() for name in row.against)


def test_fewer_steps_keep_the_proportions() -> None:
    config = with_steps(get_recipe("oner_tiny_pictograms_cpu"), 60)
    assert (config.optim.warmup, config.run.save_every, config.run.snapshot_every) == (5, 15, 6)
    assert with_steps(config, 1).optim.warmup == 0


@pytest.mark.parametrize(
    ("freedom", "wanted"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (9, 2.2622), (10, 2.2281), (30, 2.0423)],
)
def test_students_quantiles_are_those_of_the_tables(freedom: int, wanted: float) -> None:
    assert t_quantile(freedom) == pytest.approx(wanted, abs=5e-5)


def test_differences_are_paired_by_seed() -> None:
    found = paired({0: 0.30, 1: 0.50, 2: 0.71, 7: 9.0}, {0: 0.20, 1: 0.39, 2: 0.60})
    assert found is not None and found.count == 3
    # Differences 0.10, 0.11, 0.11: far narrower than the rows themselves are wide.
    assert found.mean == pytest.approx(0.32 / 3) and found.decided
    assert found.half == pytest.approx(4.302653 * 0.0057735 / 3**0.5, rel=1e-4)
    alone = paired({0: 0.5}, {0: 0.25})
    assert alone is not None and alone.mean == 0.25 and alone.half is None and not alone.decided
    assert paired({0: 0.5}, {1: 0.25}) is None and spread([]) is None
    one = spread([0.5])
    assert one is not None and one.deviation is None
    wide = paired({0: 0.5, 1: 0.1}, {0: 0.1, 1: 0.3})
    assert wide is not None and not wide.decided
    equal = paired({0: 0.3, 1: 0.7}, {0: 0.2, 1: 0.6})  # differences that are equal, but for rounding, in both seeds
    assert equal is not None and equal.mean == pytest.approx(0.1) and not equal.decided
