"""open_clip's losses by our ops: values and gradients, flags, dtypes, and what goes to open_clip's own code."""

from __future__ import annotations

import inspect
import pickle
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from oner_fast.models.optional_packages import optional_package

if find_spec("open_clip") is None:
    pytest.skip("needs open_clip (pip install $(oner-fast requirements clip))", allow_module_level=True)

from oner_fast.integrations import fallback as ours_fallback
from oner_fast.integrations import open_clip as ours

theirs = optional_package("open_clip").loss
NAMES = ("ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss")


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    ours.unpatch()


def rows(count: int = 12, width: int = 8, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Image and text features, which are unit rows."""
    generator = torch.Generator().manual_seed(seed)
    found = (torch.randn(count, width, generator=generator, dtype=torch.float64) for _ in range(2))
    return [torch.nn.functional.normalize(x, dim=1).to(dtype).requires_grad_() for x in found]


def call(name: str, dtype: torch.dtype = torch.float64, count: int = 12) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of a loss and of its forward."""
    image, text = rows(count, dtype=dtype)
    scale = torch.tensor(20.0, dtype=dtype, requires_grad=True)
    given: dict[str, Any] = {"image_features": image, "text_features": text, "logit_scale": scale}
    if name == "CoCaLoss":
        logits = torch.randn(count, 6, 5, dtype=dtype, requires_grad=True)
        given |= {"logits": logits, "labels": torch.randint(5, (count, 5))}
        given["logits"] = logits.transpose(1, 2)  # (N, positions, vocabulary)
        return {"caption_loss_weight": 2.0, "clip_loss_weight": 0.5}, given
    if name == "DistillClipLoss":
        teacher = [x.detach() for x in rows(count, 10, dtype, seed=1)]
        given |= {"dist_image_features": teacher[0], "dist_text_features": teacher[1], "dist_logit_scale": 30.0}
    if name == "SigLipLoss":
        given["logit_bias"] = torch.tensor([-10.0], dtype=dtype, requires_grad=True)
    return {}, given


def value_and_gradients(loss: Any, given: dict[str, Any], **options: Any) -> list[Tensor]:
    found = loss(**given, **options)
    parts = list(found.values()) if isinstance(found, dict) else list(found) if isinstance(found, tuple) else [found]
    leaves = [x for x in given.values() if isinstance(x, Tensor) and x.requires_grad]
    return [*(x.detach() for x in parts), *torch.autograd.grad(sum(parts), leaves)]


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_those_of_open_clip(name: str) -> None:
    options, given = call(name)
    own, other = (getattr(module, name)(**options) for module in (ours, theirs))
    for one, right in zip(value_and_gradients(own, given), value_and_gradients(other, given), strict=True):
        torch.testing.assert_close(one, right, rtol=1e-11, atol=1e-13)
    named = own(**given, output_dict=True)
    assert list(named) == list(other(**given, output_dict=True))
    with ours.patch():
        patched = value_and_gradients(other, given)
    assert all(torch.equal(one, two) for one, two in zip(value_and_gradients(own, given), patched, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_those_of_open_clip(name: str) -> None:
    def parameters(function: Callable[..., Any]) -> list[tuple[Any, ...]]:
        return [(x.name, x.default, x.kind) for x in inspect.signature(function).parameters.values()]

    own, other = getattr(ours, name), getattr(theirs, name)
    assert parameters(own) == parameters(other)
    assert parameters(own.forward) == parameters(other.forward) and issubclass(own, other)


@pytest.mark.parametrize("name", NAMES)
def test_no_matrix_of_logits_is_stored(name: str) -> None:
    """Beside the inputs a few numbers for each pair are kept for backward."""
    if name == "CoCaLoss":
        options, given = {"caption_loss_weight": 0.0, "clip_loss_weight": 1.0}, call(name, torch.float32, 200)[1]
    else:
        options, given = call(name, torch.float32, 200)
    seen: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (seen.append(x.numel()), x)[1], lambda x: x):
        getattr(ours, name)(**options)(**given)
    assert seen and max(seen) < 200 * 200


def test_a_bias_of_the_softmax_takes_a_gradient_of_zero() -> None:
    _, given = call("ClipLoss")
    bias = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    loss = ours.ClipLoss()(**given, logit_bias=bias)
    assert torch.autograd.grad(loss, bias, retain_graph=True)[0] == 0
    torch.testing.assert_close(loss, theirs.ClipLoss()(**given, logit_bias=bias))
    for broken in (float("nan"), float("inf")):
        assert ours.ClipLoss()(**given, logit_bias=torch.tensor(broken)).isnan()


def floats(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


@pytest.mark.parametrize("name", NAMES)
def test_in_bfloat16_ours_is_nearer_to_float64(name: str) -> None:
    """Under autocast open_clip rounds the logits to bfloat16; ours are float32 sums of bfloat16 products.

    A gradient of one number may be right by chance: ours is within one rounding to bfloat16.
    """
    options, narrow = call(name, torch.float32, 64)
    options = {"caption_loss_weight": 0.0, "clip_loss_weight": 1.0} if name == "CoCaLoss" else options
    narrow = {key: x.detach().bfloat16().to(x.dtype) if floats(x) and x.ndim == 2 else x for key, x in narrow.items()}
    wide, narrow = (
        {key: x.detach().to(dtype).requires_grad_(x.ndim != 2 or "dist" not in key) if floats(x) else x
         for key, x in narrow.items()}
        for dtype in (torch.float64, torch.float32)
    )  # fmt: skip
    exact = value_and_gradients(getattr(theirs, name)(**options), wide)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own, other = (value_and_gradients(getattr(module, name)(**options), narrow) for module in (ours, theirs))
    for at, (one, two, right) in enumerate(zip(own, other, exact, strict=True)):
        allowed = (two.double() - right).norm() if right.ndim == 2 or at == 0 else 2**-9 * right.norm()
        assert (one.double() - right).norm() <= allowed + 8 * torch.finfo(torch.float32).eps * right.abs().max(), at
    assert own[0].dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_torch_compile(name: str) -> None:
    options, given = call(name, torch.float32)
    loss = getattr(ours, name)(**options)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for one, two in zip(value_and_gradients(compiled, given), value_and_gradients(loss, given), strict=True):
        torch.testing.assert_close(one, two)


def test_pickles_of_patched_modules_are_open_clips_and_ours_are_ours() -> None:
    _, given = call("ClipLoss")
    with ours.patch():
        sent = pickle.dumps(theirs.ClipLoss(cache_labels=True))
    assert b"oner_fast" not in sent
    assert type(pickle.loads(sent)) is theirs.ClipLoss
    own = pickle.loads(pickle.dumps(ours.ClipLoss(cache_labels=True)))
    assert type(own) is ours.ClipLoss and own.cache_labels
    torch.testing.assert_close(own(**given), theirs.ClipLoss()(**given))


def test_what_open_clips_trainer_builds_is_served() -> None:
    """`create_loss` imported the classes by name before they were patched."""
    from types import SimpleNamespace

    arguments = SimpleNamespace(
        distill=False, model="ViT-B-32", siglip=False, local_loss=False, gather_with_grad=False, rank=0, world_size=1,
        horovod=False,
    )  # fmt: skip
    loss = optional_package("open_clip").create_loss(arguments)
    _, given = call("ClipLoss")
    own = loss(**given)
    with ours.patch():
        patched = loss(**given)
    assert "mixup_info_nce" in names_of(patched)
    assert "mixup_info_nce" not in names_of(own)
    torch.testing.assert_close(patched, own)


def names_of(loss: Tensor) -> set[str]:
    """The names of all functions of autograd in the graph of a loss."""
    found, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            found.add(getattr(node, "_forward_cls", type(node)).__name__)
            waiting += [each for each, _ in node.next_functions]
    return found


class OwnLogits(theirs.ClipLoss):  # type: ignore[name-defined, misc]
    def get_logits(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Any, logit_bias: Any = None
    ) -> Any:
        logits = (2 * logit_scale) * image_features @ text_features.T
        return logits, logits.T


class OwnDistillation(theirs.DistillClipLoss):  # type: ignore[name-defined, misc]
    def dist_loss(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        return (teacher_logits - student_logits).square().mean()


class OwnPairs(theirs.SigLipLoss):  # type: ignore[name-defined, misc]
    def _loss(self, *arguments: Any, **options: Any) -> Tensor:
        return 3 * super()._loss(*arguments, **options)


@pytest.mark.parametrize(
    ("make", "name", "change", "reason"),
    [
        (OwnLogits, "ClipLoss", {}, "OwnLogits has a get_logits of its own"),
        (OwnDistillation, "DistillClipLoss", {}, "OwnDistillation has a dist_loss of its own"),
        (OwnPairs, "SigLipLoss", {}, "OwnPairs has a _loss of its own"),
        (theirs.ClipLoss, "ClipLoss", {"logit_scale": torch.ones(12, 1)}, "takes? one floating-point number"),
        (theirs.SigLipLoss, "SigLipLoss", {"logit_bias": torch.ones(12, 1)}, "logit_bias is"),
        (theirs.ClipLoss, "ClipLoss", {"image_features": torch.ones(0, 8), "text_features": torch.ones(0, 8)}, "empty"),
        (theirs.DistillClipLoss, "DistillClipLoss", {"dist_image_features": rows(12, 10)[0]}, "want a gradient"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_goes_to_open_clip_with_one_warning(
    make: type, name: str, change: dict[str, Any], reason: str
) -> None:
    options, given = call(name)
    if "image_features" in change:
        given = {key: x for key, x in given.items() if key == "logit_scale"}
    given |= change
    loss = make(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = loss(**given)
    with ours.patch(), pytest.warns(UserWarning, match=f"open_clip.loss.{name} to its own code: .*{reason}") as told:
        found = [loss(**given) for _ in range(2)]
    assert len(told) == 1
    torch.testing.assert_close(found[1], right, equal_nan=True)


@pytest.mark.parametrize("name", ["ClipLoss", "CoCaLoss", "DistillClipLoss"])
def test_horovod_is_refused_by_our_classes(name: str) -> None:
    with pytest.raises(ValueError, match="use_horovod=True is not served: .*torch.distributed"):
        getattr(ours, name)(**call(name)[0], use_horovod=True)


def test_horovod_and_missing_ranks_go_to_open_clip() -> None:
    _, given = call("ClipLoss")
    with ours.patch():
        with (
            pytest.warns(UserWarning, match="use_horovod=True"),
            pytest.raises(AssertionError, match="install horovod"),
        ):
            theirs.ClipLoss(world_size=2, use_horovod=True)(**given)
        with pytest.warns(UserWarning, match="no process group is initialised"), pytest.raises(ValueError):
            theirs.ClipLoss(world_size=2)(**given)


def test_only_what_is_asked_for_is_patched_and_unpatch_puts_back_the_same_objects() -> None:
    towers = optional_package("open_clip").transformer
    places = {
        "loss": [(getattr(theirs, name), "forward") for name in ("ClipLoss", "DistillClipLoss", "SigLipLoss")],
        "patch_dropout": [(towers.PatchDropout, "forward")],
        "attention": [(towers.ResidualAttentionBlock, "attention"), (towers.Attention, "forward")],
    }
    before = {place: getattr(*place) for group in places.values() for place in group}
    for chosen in places:
        ours.patch(**{name: name == chosen for name in places})
        for name, group in places.items():
            assert all((getattr(*place) is before[place]) == (name != chosen) for place in group)
        ours.unpatch()
        assert all(getattr(*place) is one for place, one in before.items())
    with ours.patch():
        ours.patch()
        assert all(getattr(*place) is not one for place, one in before.items())
    assert all(getattr(*place) is one for place, one in before.items())


@pytest.mark.parametrize(
    ("name", "part"), [("ClipLoss", "get_logits"), ("SigLipLoss", "_loss"), ("DistillClipLoss", "dist_loss")]
)
def test_a_part_replaced_in_one_loss_is_called(name: str, part: str) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyError(part)

    options, given = call(name)
    loss = getattr(ours, name)(**options)
    setattr(loss, part, stop)
    with pytest.raises(KeyError, match=part), pytest.warns(ours_fallback.Fallback, match=f"has a {part} of its own"):
        loss(**given)
