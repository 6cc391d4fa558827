"""The gradient of a step is that of the whole batch, whatever the micro-batches and the processes."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from oner_fast.train.config.serialization import from_dict, to_dict
from oner_fast.train.engine.distributed import World, setup, shutdown
from oner_fast.train.oner.settings import OneRConfiguration
from oner_fast.train.oner.student import Student

ALL = {"xmc": 2.0, "cic": 0.5, "learnable_temperature": True, "force_patch_dropout": 0.25}
CLIP = {"cmc": 0, "mlm": 0, "mim": 0, "momentum_teacher": False, "symmetric": True, "learnable_temperature": True}
TWO_TOWERS = {"shared_trunk": False, "shared_head": False}
SETS: dict[str, dict[str, Any]] = {
    "all contrasts": {**ALL, "mlm": 0, "mim": 0},
    "everything": {**ALL, "symmetric": True},
    "CLIP": {**CLIP, "model": TWO_TOWERS},
    "student's own keys": {"momentum_teacher": False, "xmc": 1.0},
    "one tower, ITC": {"cmc": 0, "mlm": 0, "mim": 0},
    "two heads": {"cmc": 0, "model": {"shared_head": False}},
    "a predictor a head": {"xmc": 1.0, "cic": 0.5, "predictor": "per_head", "model": {"shared_head": False}},
    "no predictor, factor": {"predictor": "none", "temperature_factor": True, "init_gap": 3.0},
    "second view": {"teacher_view": "second"},
    "same captions are positives": {"mlm": 0, "mim": 0, "xmc": 1.0, "symmetric": True, "same_caption": "positive"},
    "same captions are ignored": {"mlm": 0, "mim": 0, "momentum_teacher": False, "same_caption": "ignore"},
    "masked losses alone": {"itc": 0, "cmc": 0, "learnable_temperature": True},
}


def gradients(student: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None}


def tolerance(config: OneRConfiguration) -> float:
    """Masked losses are summed in float32, all else in float64."""
    return 2e-5 if config.objectives.mlm or config.objectives.mim else 1e-10


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], near: float) -> None:
    assert set(found) == set(wanted)
    for name, one in found.items():
        largest = max(float(wanted[name].abs().max()), 1e-2)
        torch.testing.assert_close(
            one, wanted[name], rtol=0, atol=near * largest, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize(
    ("name", "accum_freq"), [*((name, 2) for name in SETS), ("all contrasts", 4), ("everything", 4)]
)
def test_micro_batches_change_nothing(small: Any, name: str, accum_freq: int) -> None:
    whole, parted = small.config(**SETS[name]), small.config(accum_freq=accum_freq, **SETS[name])
    first, student = small.step(whole)
    second, other = small.step(parted)
    batch = small.batch(second=whole.objectives.teacher_view == "second")
    one, two = first(batch), second(batch)
    near = tolerance(whole)
    torch.testing.assert_close(one.loss, two.loss, rtol=near, atol=0)
    assert set(one.parts) == set(two.parts)
    for part, value in one.parts.items():
        torch.testing.assert_close(value, two.parts[part], rtol=near, atol=0)
    assert_equal(gradients(other), gradients(student), near)
    assert ("log_logit_scale" in gradients(other)) == bool(
        SETS[name].get("learnable_temperature") and whole.objectives.contrastive
    )


def test_the_share_of_repeated_captions(small: Any) -> None:
    """Eight captions repeat four of two cases, two and two; of three captions two are equal."""
    step, _ = small.step(small.config())
    assert step(small.batch()).repeated_captions == 1.0
    assert step(small.batch(3)).repeated_captions == pytest.approx(2 / 3)


def test_gradients_add_up_over_calls(small: Any) -> None:
    step, student = small.step(small.config())
    batch = small.batch()
    step(batch)
    once = {name: gradient.clone() for name, gradient in gradients(student).items()}
    step(batch)
    assert_equal(gradients(student), {name: 2 * gradient for name, gradient in once.items()}, 1e-6)


@pytest.mark.parametrize("name", ["all contrasts", "one tower, ITC"])
def test_the_temperature_learns_only_where_asked(small: Any, name: str) -> None:
    config = small.config(**SETS[name])
    step, student = small.step(config)
    step(small.batch())
    assert student.log_logit_scale.requires_grad == config.objectives.learnable_temperature
    if config.objectives.learnable_temperature:
        # By a central difference of the loss itself.
        grad, losses = student.log_logit_scale.grad.clone(), []
        for shift in (1e-4, -2e-4):
            with torch.no_grad():
                student.log_logit_scale += shift
            losses.append(step(small.batch()).loss)
        torch.testing.assert_close(grad, (losses[0] - losses[1]) / 2e-4, rtol=1e-6, atol=0)
    else:
        assert student.log_logit_scale.grad is None


def test_the_logit_scale_stops_at_100(small: Any) -> None:
    step, student = small.step(small.config(learnable_temperature=True))
    with torch.no_grad():
        student.log_logit_scale.fill_(9.0)
    student.clamp_temperature()
    assert student.log_logit_scale.exp().item() == pytest.approx(100.0)
    # There it still learns: the gradient is that of the loss, and may lead back.
    assert step(small.batch()).loss.isfinite() and student.log_logit_scale.grad.item() != 0.0


def test_no_op_reads_memory_that_it_has_not_written(small: Any) -> None:
    """PyTorch's filling of fresh tensors with NaN, which training switches off, changes no bit of a step."""
    torch.use_deterministic_algorithms(True)
    before, found = torch.utils.deterministic.fill_uninitialized_memory, []
    try:
        for fill in (True, False):
            torch.utils.deterministic.fill_uninitialized_memory = fill
            step, student = small.step(small.config(accum_freq=2, **ALL), torch.float32)
            loss = step(small.batch()).loss
            found.append([loss, *gradients(student).values()])
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_without_teacher_both_sides_take_gradients(small: Any) -> None:
    """CLIP: the loss falls for image and text alike, and there is neither predictor nor teacher."""
    step, student = small.step(small.config(**SETS["CLIP"]))
    assert step.teacher is None and student.predictor is None
    step(small.batch())
    for part in (student.tower.trunk, student.tower.text_trunk, student.tower.head, student.tower.text_head):
        assert all(parameter.grad is not None for parameter in part.parameters())


def test_the_teacher_sees_the_second_view(small: Any) -> None:
    """Only the keys depend on the second view: the masked losses stay, and the contrasts change."""
    step, _ = small.step(small.config(teacher_view="second"))
    same, other = step(small.batch()), step(small.batch(second=True))
    assert torch.equal(same.parts["mim"], other.parts["mim"]) and not torch.equal(same.parts["itc"], other.parts["itc"])


def test_an_initial_gap_parts_words_and_patches_and_leaves_the_rest(small: Any) -> None:
    def tower(init_gap: float) -> Any:
        config = small.config(init_gap=init_gap)
        torch.manual_seed(5)
        return Student(config.model, config.objectives).tower

    plain, parted = tower(0.0), tower(4.0)
    words = parted.word_embedding.positions - plain.word_embedding.positions
    patches = parted.patch_embedding.positions - plain.patch_embedding.positions
    torch.testing.assert_close(words.abs(), torch.full_like(words, 0.08))
    torch.testing.assert_close(patches, -words[:1].expand_as(patches))
    for (name, one), two in zip(plain.named_parameters(), parted.parameters(), strict=True):
        assert torch.equal(one, two) or name.endswith("positions"), name


def test_two_heads_can_begin_equal(small: Any) -> None:
    for equal in (False, True):
        config = small.config(model={"shared_head": False}, equal_heads=equal)
        tower = Student(config.model, config.objectives).tower
        pairs = zip(tower.head.parameters(), tower.text_head.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs) == equal


def test_the_teacher_is_never_changed_by_a_step(small: Any) -> None:
    step, _ = small.step(small.config())
    before = [parameter.clone() for parameter in step.teacher.parameters()]
    step(small.batch())
    for one, other in zip(before, step.teacher.parameters(), strict=True):
        assert torch.equal(one, other) and other.grad is None


@pytest.mark.parametrize("name", list(SETS))
def test_every_trainable_parameter_takes_part(small: Any, name: str) -> None:
    """A parameter that no loss reaches would make every other rank wait for its gradient."""
    step, student = small.step(small.config(**SETS[name]))
    step(small.batch())
    idle = [name for name, one in student.named_parameters() if one.requires_grad and one.grad is None]
    assert idle == []


def test_loss_and_gradients_under_autocast_are_near_float32s(small: Any) -> None:
    config = small.config(**ALL)
    plain, student = small.step(config, torch.float32)
    cast, other = small.step(config, torch.float32)
    cast.replica.autocast_dtype = torch.bfloat16
    one, two = plain(small.batch()), cast(small.batch())
    assert two.loss.dtype == torch.float32 and 0 < abs(one.loss - two.loss) < 0.03 * one.loss
    flat = [torch.cat([grad.flatten() for grad in gradients(each).values()]) for each in (student, other)]
    assert torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0) > 0.98


def test_deterministic_algorithms_give_the_same_bits(small: Any) -> None:
    torch.use_deterministic_algorithms(True)
    config = small.config(accum_freq=2, **ALL)
    found = []
    for _ in range(2):
        step, student = small.step(config, torch.float32)
        loss = step(small.batch()).loss
        found.append([loss, *gradients(student).values()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


# Two processes.


def run_rank(rank: int, size: int, folder: Path, makers: str) -> None:
    spec = importlib.util.spec_from_file_location("makers", makers)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["makers"] = module
    spec.loader.exec_module(module)
    small: Any = module.Small
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    torch.use_deterministic_algorithms(True)
    world: World = setup("cpu", init_method=f"file://{folder}/meet", timeout_seconds=60)
    results: dict[str, Any] = {}
    for name, config in torch.load(folder / "cases.pt", weights_only=True).items():
        training: OneRConfiguration = from_dict(OneRConfiguration, config)
        student = small.student(training)
        step = small.step_of(training, student, world)
        mine = small.part(small.batch(second=training.objectives.teacher_view == "second"), rank, size)
        step(mine)
        student.zero_grad(set_to_none=True)
        # The second step is where DDP complains of parameters that took no part in the first.
        result = step(mine)
        results[name] = {"loss": result.loss, "parts": result.parts, "gradients": gradients(student)}
        results[name]["repeated"] = result.repeated_captions
    torch.save(results, folder / f"{rank}.pt")
    shutdown()


def test_two_processes_give_the_gradients_of_one(small: Any, run_two_ranks: Any, tmp_path: Path) -> None:
    configs = {name: small.config(**values) for name, values in SETS.items()}
    configs["everything, two micro-batches"] = small.config(accum_freq=2, **SETS["everything"])
    configs["CLIP, two micro-batches"] = small.config(accum_freq=2, **SETS["CLIP"])
    torch.save({name: to_dict(config) for name, config in configs.items()}, tmp_path / "cases.pt")
    makers = sys.modules[small.__module__].__file__
    run_two_ranks(__file__, tmp_path, makers)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, config in configs.items():
        step, student = small.step(config)
        alone = step(small.batch(second=config.objectives.teacher_view == "second"))
        near = tolerance(config)
        for rank in found:
            torch.testing.assert_close(rank[name]["loss"], alone.loss, rtol=near, atol=0)
            assert torch.equal(rank[name]["repeated"], alone.repeated_captions)
            for part, value in alone.parts.items():
                torch.testing.assert_close(rank[name]["parts"][part], value, rtol=near, atol=0)
            assert_equal(rank[name]["gradients"], gradients(student), near)


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])


class HalfSums(TorchDispatchMode):
    """The shapes of tensors that are added in a half type."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[torch.Size] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_) and out.dtype == torch.bfloat16:
            self.shapes.add(out.shape)
        return out


def test_gradients_of_a_weight_of_two_products_are_added_in_float32(small: Any) -> None:
    """The masked images of F(I) and F(I,T) share the patch embedding and its head."""
    step, student = small.step(small.config(mim=1.0, mlm=1.0), torch.float32)
    step.replica.autocast_dtype = torch.bfloat16
    with HalfSums() as seen:
        step(small.batch())
    head = student.patch_head
    assert head is not None and seen.shapes
    assert not seen.shapes & {head.weight.shape, student.tower.patch_embedding.project.weight.shape}
