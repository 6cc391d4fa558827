"""The step benchmark: its baseline computes the same step, and its shares add up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from oner_fast.benchmarks.step import run
from oner_fast.benchmarks.step.agreement import Disagreement, check
from oner_fast.benchmarks.step.baseline import PlainStep, plain_model
from oner_fast.benchmarks.step.ours import OurStep
from oner_fast.benchmarks.step.setting import synthetic_batch, vitb16
from oner_fast.benchmarks.step.shares import REST, kind_of, shares
from oner_fast.train.oner.settings import OneRConfiguration
from oner_fast.train.oner.student import Student


def tiny() -> OneRConfiguration:
    base = vitb16()
    model = replace(
        base.model, image_size=48, width=32, depth=2, heads=4, vocab_size=300, projector_hidden=48, embed_dim=16
    )
    return replace(base, model=model, objectives=replace(base.objectives, predictor_hidden=24))


def steps(dtype: torch.dtype | None = None) -> tuple[OurStep, PlainStep]:
    config = tiny()
    ours = OurStep(config, synthetic_batch(config), dtype)
    return ours, PlainStep(ours, dtype)


def test_the_baseline_is_the_same_step() -> None:
    ours, plain = steps()
    check(ours, plain, 1e-5, 1e-4)
    # Both update: after one step of each, the next losses still agree, and they have changed.
    before = ours.gradient()["loss"]
    ours.optimizer.zero_grad()
    for step in (ours, plain):
        for _ in range(3):
            step()
    assert abs(ours.gradient()["loss"] - before) > 1e-3 * before
    ours.optimizer.zero_grad()
    check(ours, plain, 1e-4, 1e-2)
    for name, parameter in plain.teacher.named_parameters():
        assert parameter.grad is None, name


def test_autocast_agrees_too() -> None:
    check(*steps(torch.bfloat16), 1e-2, 0.2)


def test_the_compiled_baseline_is_the_same_step() -> None:
    ours, _ = steps()
    check(ours, PlainStep(ours, None, compiled=True), 1e-5, 1e-4)


def test_a_wrong_baseline_is_refused() -> None:
    ours, plain = steps()
    with torch.no_grad():
        plain.student.tower.cls_token.mul_(1.5)
    with pytest.raises(Disagreement, match="tower.cls_token"):
        check(ours, plain, 1e-5, 1e-4)
    assert not ours.gradients() and not plain.gradients()


def test_a_teacher_with_other_weights_is_refused() -> None:
    ours, plain = steps()
    with torch.no_grad():
        plain.teacher.norm.weight[0] += 1.0
    with pytest.raises(Disagreement, match="itc"):
        check(ours, plain, 1e-5, 1e-4)


def test_the_captions_have_the_stated_lengths() -> None:
    lengths = synthetic_batch(tiny()).text.lengths
    assert (int(lengths.min()), int(lengths.max()), lengths.numel()) == (8, 40, 8)
    assert torch.equal(synthetic_batch(tiny()).images, synthetic_batch(tiny()).images)


def test_weights_of_another_model_are_refused() -> None:
    config = tiny()
    with pytest.raises(ValueError, match="text_head"):
        plain_model(Student(replace(config.model, shared_head=False), config.objectives))


def test_shares_add_up_to_the_step() -> None:
    for step in steps():
        step()
        found = shares(step)
        assert sum(share.share for share in found) == pytest.approx(1.0)
        kinds = {share.kind for share in found}
        assert {"linear layers", "attention", "layer norm", "GELU", "optimizer and clipping"} <= kinds
        assert found[-1].kind == REST and len(kinds) == len(found)


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::addmm", "linear layers"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("oner_fast::varlen_attention", "attention"),
        ("oner_fast::mixup_info_nce", "contrast"),
        ("oner_fast::masked_gather_backward", "gathers"),
        ("aten::_fused_adamw_", "optimizer and clipping"),
        ("aten::lerp_", "teacher's average"),
        ("aten::native_layer_norm_backward", "layer norm"),
        ("aten::view", REST),
    ],
)
def test_operations_are_grouped_by_kind(operation: str, kind: str) -> None:
    assert kind_of(operation) == kind


def test_the_row_holds_ratios_and_shares(tmp_path: Path) -> None:
    row, found = run.measure("fp32", tiny(), rounds=2, compiled=False)
    assert not row.refused and row.best == row.eager == "plain, eager" and row.speedup is not None
    assert row.speedup.p50 == pytest.approx(row.speedup_eager.p50)  # type: ignore[union-attr]
    assert row.limit_unit == "GFLOP/s" and set(row.floor) == {"gemm"}
    assert sum(row.parts.values()) == pytest.approx(1.0) and set(found) == {"oner_fast", "plain, eager"}
    wholes = {name: sum(seconds.values()) for name, seconds in row.breakdown.items()}
    assert wholes == {name: pytest.approx(row.times[name].p50) for name in found}
    json.dumps(row.as_dict())
    text = run.markdown(row, found)
    assert "linear layers" in text and "8 to 40 tokens" in text
