"""The estimate of a step: its counts are exact, its parts add up, and one switch changes one part."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from oner_fast.benchmarks.gpuless import estimate as roofline
from oner_fast.benchmarks.step.ours import OurStep
from oner_fast.benchmarks.step.setting import Words, synthetic_batch
from oner_fast.budget import command, elementwise, flops, sizes, techniques, tiles, workload
from oner_fast.budget.machine import MACHINES
from oner_fast.budget.parts import Setting, estimate
from oner_fast.budget.report import BEGIN, END, Report, replaced
from oner_fast.budget.workload import Sequences
from oner_fast.models.oner import OneR
from oner_fast.train.oner.flops import step_flops
from oner_fast.train.oner.inputs import student_input
from oner_fast.train.oner.recipes import oner_tiny_pictograms_cpu, oner_vitb16_4m_a100x32
from oner_fast.train.oner.settings import OneRConfiguration
from oner_fast.train.oner.student import Student

RECIPE = "oner_vitb16_4m_a100x32"
PAGE = Path(__file__).parents[2] / "docs" / "budget.md"


def tiny(model: dict[str, Any], objectives: dict[str, Any], accum_freq: int = 1) -> OneRConfiguration:
    base = oner_tiny_pictograms_cpu()
    return replace(
        base,
        model=replace(base.model, **({"depth": 2, "width": 64, "vocab_size": 100} | model)),
        objectives=replace(base.objectives, **objectives),
        optim=replace(base.optim, batch_size=4, accum_freq=accum_freq),
    )


@cache
def paper() -> Setting:
    return command.setting_of(RECIPE, "A100", None, 16)


@pytest.mark.parametrize(
    ("model", "objectives", "accum_freq"),
    [
        ({}, {}, 1),
        ({"depth": 3, "projector_hidden": 64}, {}, 1),
        ({}, {"xmc": 1.0, "cic": 1.0}, 1),
        ({}, {"momentum_teacher": False, "symmetric": True}, 1),
        ({}, {"mim": 0.0, "force_patch_dropout": 0.3}, 1),
        ({}, {"mlm": 0.0}, 2),
        ({"grad_checkpointing": True}, {}, 1),
        ({"grad_checkpointing": True}, {}, 2),
    ],
)
def test_flops_are_exactly_those_that_pytorchs_counter_finds(
    model: dict[str, Any], objectives: dict[str, Any], accum_freq: int
) -> None:
    config = tiny(model, objectives, accum_freq)
    batch = synthetic_batch(config, 3, 7)
    step = OurStep(config, batch, None)
    if not config.objectives.momentum_teacher:
        step.step.teacher = None
    masked = student_input(batch, config.objectives, config.model, config.run.seed, Words(100))
    work = workload.drawn(config, batch, masked)
    with FlopCounterMode(display=False) as counter:
        step.gradient()
    found = sum(each.flops for each in flops.products(work))
    found += flops.attention_flops(work, flops.ATTENTION_BACKWARD) + flops.contrast_flops(work, ranks=1)
    assert found == counter.get_total_flops()


def test_the_expected_masks_are_those_of_the_trainers_own_count() -> None:
    """The trainer's count, from which MFU comes, takes a backward for two forwards: it differs where none is needed."""
    config = oner_vitb16_4m_a100x32()
    config = replace(config, optim=replace(config.optim, batch_size=32))
    batch = synthetic_batch(config, 8, 24)
    work = workload.expected(config, 1, 16)
    needed = sum(each.flops for each in flops.products(work, again=False)) + flops.contrast_flops(work, 1)
    needed += flops.attention_flops(work, flops.MODEL_BACKWARD, again=False)
    assert needed == pytest.approx(step_flops(config, batch), rel=0.01)


def test_parameters_are_counted_without_memory() -> None:
    config = tiny({}, {})
    student, teacher = Student(config.model, config.objectives), OneR(config.model)
    trained = sum(one.numel() for one in student.parameters() if one.requires_grad)
    assert sizes.parameters(config) == (trained, sum(one.numel() for one in teacher.parameters()))


def test_operations_grow_by_the_same_number_a_layer() -> None:
    config = tiny({"depth": 4}, {})
    assert sizes.operations(config) == sizes._operations_of(config, 4)


def test_bytes_are_linear_in_tokens() -> None:
    config = oner_vitb16_4m_a100x32()
    once, twice = (workload.expected(config, ranks, 15) for ranks in (64, 32))
    doubled = replace(twice, student=_doubled(once.student), teacher=_doubled(once.teacher))
    for fused in (False, True):
        assert elementwise.bytes_of(doubled, fused) == pytest.approx(2 * elementwise.bytes_of(once, fused), rel=1e-12)
    assert elementwise.bytes_per_number(elementwise.EAGER_FORWARD, 4) == 64
    assert elementwise.bytes_per_number(elementwise.EAGER_BACKWARD, 4) == 142
    fused = elementwise.bytes_per_number(elementwise.FUSED_FORWARD + elementwise.FUSED_BACKWARD, 4)
    assert fused == 106


def _doubled(seen: Sequences) -> Sequences:
    return Sequences(2 * seen.lengths, 2 * seen.key_lengths, 2 * seen.wanted)


def test_the_parts_add_up_and_before_is_the_breakdown_by_hand() -> None:
    """Each part within 10 % of a breakdown that was made by hand: counts and a roofline, no measurement."""
    one = estimate(paper(), "before")
    assert one.seconds == pytest.approx(sum(part.seconds for part in one.parts), rel=1e-12)
    by_hand = {
        "matrix products": 142, "contrast": 60, "element-wise passes": 67, "attention": 32, "host": 21,
        "mask token": 12, "row selection": 7,
    }  # fmt: skip
    for name, milliseconds in by_hand.items():
        assert 1e3 * one.part(name).seconds == pytest.approx(milliseconds, rel=0.1), name
    others = sum(part.seconds for part in one.parts if part.name not in by_hand)
    assert 1e3 * others == pytest.approx(12, rel=0.1)
    assert 1e3 * one.seconds == pytest.approx(353, rel=0.03) and one.mfu == pytest.approx(0.30, abs=0.01)


def test_after_all_techniques_the_target_is_met() -> None:
    one, config = estimate(paper(), "after"), paper().work.config
    hours = one.seconds * config.optim.steps / 3600
    assert one.seconds < 0.220 and hours < 2.5 and 32 * hours < 80


def test_a_technique_changes_its_own_part_alone() -> None:
    parts = {
        "short attention": "attention", "fused passes": "element-wise passes", "mask token": "mask token",
        "counting sort": "row selection", "gathered keys": "contrast", "no waits": "host",
    }  # fmt: skip
    assert parts.keys() == techniques.TECHNIQUES.keys()
    before = estimate(paper(), "before", frozenset())
    for technique, part in parts.items():
        one = estimate(paper(), "now", frozenset({technique}))
        changed = {new.name for new, old in zip(one.parts, before.parts, strict=True) if new != old}
        assert changed == {part} and one.part(part).seconds < before.part(part).seconds


def test_what_the_code_has_now_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert techniques.TECHNIQUES.keys() >= techniques.NOW
    monkeypatch.setattr(techniques, "NOW", frozenset({"mask token"}))
    assert estimate(paper(), "now") == replace(estimate(paper(), "now", frozenset({"mask token"})), state="now")
    assert estimate(paper(), "now").part("mask token").seconds < 1e-3


def test_one_gpu_sends_nothing_and_many_small_launches_are_not_hidden() -> None:
    alone = replace(paper(), ranks=1)
    assert estimate(alone, "before").part("communication").seconds == 0
    assert estimate(alone, "before").part("contrast").seconds < 1e-3
    slow = replace(paper(), operations=1_000_000)
    host, whole = estimate(slow, "after").part("host").seconds, estimate(slow, "after").seconds
    assert host > 5 and whole == pytest.approx(6.0)


def test_tiles_are_filled_as_far_as_lengths_go() -> None:
    def of(*lengths: int) -> Sequences:
        return Sequences(lengths, lengths, tuple(map(float, lengths)))

    assert tiles.efficiency(of(197), tiles.TRITON) == 197**2 / 256**2
    assert tiles.efficiency(of(64, 128), tiles.TRITON) == 1
    assert tiles.efficiency(of(197), tiles.SHORT) == 197**2 / (208 * 200)
    assert tiles.efficiency(of(), tiles.TRITON) == 1


def test_the_a100_has_the_rates_of_the_other_roofline() -> None:
    machine, chip = MACHINES["A100"], roofline.CHIPS["A100"]
    assert machine.bytes_per_second == chip.bytes_per_second
    assert machine.product_share == roofline.TENSOR_SHARE
    assert machine.instructions_per_second == pytest.approx(chip.sms * 4 * chip.hertz * roofline.PIPE_SHARE)


def test_the_command_prints_every_part_assumption_and_the_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "step.json"
    assert command.main([RECIPE, "--step", "--json", str(path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("ESTIMATE, +-30 %") and "a step, ms" in said
    for field in (*fields(paper().assumed), *fields(paper().machine)):
        assert field.name in said or field.name == "name"
    data = json.loads(path.read_text())
    assert data["estimate"] is True and data["ranks"] == 32
    for state in data["states"].values():
        assert state["seconds"] == pytest.approx(sum(part["seconds"] for part in state["parts"]))
    assert command.main([RECIPE, "--step", "--as-of", "before", "--gpu", "H100"]) == 0
    said = capsys.readouterr().out
    assert "H100 SXM" in said and "additions one after another" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["oner_vitb61_4m_a100x32"], "oner_vitb61_4m_a100x32"),
        (["uta_b_in21k_a100x8"], "uta"),
        ([RECIPE, "--ranks", "3"], "3 GPUs do not divide the batch of 4096 pairs: give another --ranks"),
        ([RECIPE, "--ranks", "0"], "--ranks must be at least 1, got 0"),
        ([RECIPE, "--caption-tokens", "70"], "captions of 105 tokens do not fit max_text_tokens 78"),
        ([RECIPE, "--page", "nowhere.md"], "nowhere.md"),
    ],
)
def test_bad_input_gets_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command.sizes, "operations", lambda config: 0)
    assert command.main([*arguments, "--step"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("oner-fast budget: ") and message in said and said.count("\n") == 1


def test_the_page_has_what_the_command_says_today() -> None:
    """`oner-fast budget oner_vitb16_4m_a100x32 --step --page docs/budget.md` writes it again."""
    report = Report(RECIPE, paper(), {state: estimate(paper(), state) for state in command.STATES})
    page = PAGE.read_text(encoding="utf-8")
    operations = f"{paper().operations:,} operations"
    written = [line for line in page.splitlines() if " operations of " not in line]
    again = [line for line in replaced(page, report).splitlines() if operations not in line]
    assert written == again
    with pytest.raises(ValueError, match="the page needs the lines"):
        replaced("# A page", report)
    assert replaced(f"a {BEGIN} b {END} c", report).startswith(f"a {BEGIN}\n\n**ESTIMATE")
