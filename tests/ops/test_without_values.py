"""Tensors without values (meta, fake, traced), and calls under autocast: right shapes and dtypes, nothing is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from oner_fast import _extension
from oner_fast.ops import (
    boundaries,
    draw_masks,
    gather_patches,
    masked_gather,
    mixup_info_nce,
    padded_attention,
    patch_mask,
    sigmoid_loss,
    token_alignment,
    varlen_attention,
)

Make = Callable[[Tensor], Tensor]
HALF = torch.bfloat16


def _inputs() -> dict[str, Tensor]:
    return {
        "tokens": torch.randn(2, 4, 8), "positions": torch.randn(4, 8), "prefix": torch.randn(1, 8),
        "kept": torch.tensor([[0, 3], [1, 2]]), "cu": torch.tensor([0, 1, 4], dtype=torch.int32),
        "images": torch.rand(2, 3, 4, 4), "bytes": torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
        "query": torch.randn(4, 8), "key": torch.randn(4, 8), "scale": torch.tensor(5.0), "mix": torch.rand(4),
        "partner": torch.tensor([1, 0, 3, 2]), "rows": torch.randn(4, 2, 8), "other": torch.randn(4, 1, 8),
        "heads": torch.randn(2, 2, 3, 8), "shared": torch.randn(2, 1, 3, 8), "lengths": torch.tensor([3, 1]),
        "seen": torch.tensor([[True, False, True], [False, True, True]]), "seed": torch.tensor(7),
        "student": torch.randn(2, 2, 8), "samples": torch.arange(3), "counts": torch.tensor([1, 3]),
    }  # fmt: skip


CALLS: dict[str, Callable[..., Any]] = {
    "masked_gather": lambda t, **o: masked_gather(t["tokens"], t["kept"], t["positions"], t["prefix"], **o),
    "masked_gather ragged": lambda t, **o: masked_gather(
        t["tokens"], t["kept"].flatten(), None, t["prefix"], cu_seqlens=t["cu"], **o
    ),
    "gather_patches": lambda t, **o: gather_patches(t["images"], t["kept"], 2, [0.5] * 3, [2.0] * 3, **o),
    "gather_patches of bytes": lambda t, **o: gather_patches(
        t["bytes"], t["kept"].flatten(), 2, [0.5] * 3, dtype=HALF, cu_seqlens=t["cu"], **o
    ),
    "mixup_info_nce": lambda t, **o: mixup_info_nce(t["query"], t["key"], t["scale"], **o),
    "mixup_info_nce mixed": lambda t, **o: mixup_info_nce(
        t["query"], t["key"], 5.0, key_other=t["query"], mix=t["mix"], partner=t["partner"], **o
    ),
    "mixup_info_nce with ids": lambda t, **o: mixup_info_nce(
        t["query"], t["key"], t["scale"], query_ids=t["partner"], key_ids=t["partner"], **o
    ),
    "mixup_info_nce with ids ignored": lambda t, **o: mixup_info_nce(
        t["query"], t["key"], t["scale"], query_ids=t["partner"], same="ignore", **o
    ),
    "mixup_info_nce normalized": lambda t, **o: mixup_info_nce(
        t["query"],
        t["key"],
        t["scale"].reshape(1),
        key_other=t["query"],
        mix=t["mix"],
        normalized=True,
        logit_bias=t["scale"],
        **o,
    ),
    "sigmoid_loss": lambda t, **o: sigmoid_loss(t["query"], t["key"], t["scale"], t["scale"].reshape(1), **o),
    "sigmoid_loss mixed": lambda t, **o: sigmoid_loss(
        t["query"], t["key"], 5.0, -1.0, key_other=t["query"], mix=t["mix"], partner=t["partner"], normalized=True, **o
    ),
    "sigmoid_loss with ids": lambda t, **o: sigmoid_loss(
        t["query"], t["key"], t["scale"], query_ids=t["partner"], key_ids=t["partner"], **o
    ),
    "varlen_attention": lambda t, **o: varlen_attention(
        t["rows"], t["other"], t["other"], t["cu"], max_seqlen_q=3, causal=True, **o
    ),
    "varlen_attention of int64": lambda t, **o: varlen_attention(
        t["rows"], t["rows"], t["rows"], t["cu"].long(), t["cu"], scale=0.5, **o
    ),
    "varlen_attention with dropout": lambda t, **o: varlen_attention(
        t["rows"], t["rows"], t["rows"], t["cu"], dropout_p=0.5, dropout_seed=t["seed"], **o
    ),
    "padded_attention": lambda t, **o: padded_attention(t["heads"], t["shared"], t["shared"], **o),
    "padded_attention with lengths": lambda t, **o: padded_attention(
        t["heads"], t["shared"], t["shared"], key_lengths=t["lengths"], causal=True, **o
    ),
    "padded_attention with a mask": lambda t, **o: padded_attention(
        t["heads"], t["heads"], t["heads"], key_mask=t["seen"], causal=True, dropout_p=0.5, dropout_seed=3, **o
    ),
    "token_alignment": lambda t, **o: token_alignment(t["student"], t["tokens"], t["kept"], **o),
    "patch_mask": lambda t, **o: patch_mask(1, 2, t["samples"], 16, 5, **o),
    "draw_masks": lambda t, **o: draw_masks(1, 2, t["samples"], (4, 4), 5, **o),
    "draw_masks in blocks": lambda t, **o: draw_masks(1, 2, t["samples"], (5, 5), 5, "block", **o),
    "boundaries": lambda t, **o: boundaries(t["counts"], **o),
}


def _fake(tensors: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """Make fake tensors like these on a device, inside the active mode. None is a constant with a value."""
    return {name: torch.empty(x.shape, dtype=x.dtype, device=device) for name, x in tensors.items()}


def _facts(found: Any) -> list[tuple[torch.Size, torch.dtype]]:
    found = found if isinstance(found, tuple) else (found,)
    return [(x.shape, x.dtype) for x in found]


def _run(op: str, tensors: dict[str, Tensor], **options: Any) -> list[Any]:
    """Call an op forward and backward; return the facts of its results and of the gradients of its inputs.

    A torch without CUDA has no backward for fake tensors of a GPU: forward alone is called there.
    """
    for name, x in tensors.items():
        tensors[name] = x.detach().requires_grad_(x.is_floating_point() and x.device.type != "cuda")
    results = CALLS[op](tensors, **options)
    first = results[0] if isinstance(results, tuple) else results
    gradients: list[Any] = []
    if first.requires_grad:
        first.sum().backward()
        gradients = [(name, _facts(x.grad)) for name, x in tensors.items() if x.grad is not None]
    return [_facts(results), gradients, first.device.type]


@pytest.mark.parametrize("op", CALLS)
def test_meta_tensors_give_the_shapes(op: str) -> None:
    """Also where a name is forced: an implementation has no kernels for the meta device."""
    expected = _run(op, _inputs())
    for forced in (None, "reference"):
        found = _run(op, {name: x.to("meta") for name, x in _inputs().items()}, implementation=forced)
        assert found[:2] == expected[:2] and found[2] == "meta"
    with pytest.raises(ValueError, match="no implementation 'fast'"):
        _run(op, {name: x.to("meta") for name, x in _inputs().items()}, implementation="fast")


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors_give_the_shapes_and_nothing_is_read(op: str, device: str) -> None:
    """A fake tensor raises where its value is read, a scale on a GPU included; no GPU is needed."""
    expected = _run(op, _inputs())
    with FakeTensorMode():
        made = _fake(_inputs(), device)
        found = _run(op, dict(made))
        assert found[0] == expected[0] and found[2] == device
        if device == "cpu":
            assert found[1] == expected[1]
            assert _run(op, dict(made), implementation="reference")[0] == expected[0]


@pytest.mark.parametrize("op", CALLS)
def test_a_graph_can_be_traced(op: str) -> None:
    """make_fx records an op; the graph gives the numbers of the call."""
    tensors = _inputs()
    if op == "draw_masks in blocks":
        pytest.skip("blocks are drawn in a loop whose length depends on values")

    def call(*values: Tensor) -> Any:
        return CALLS[op](dict(zip(tensors, values, strict=True)))

    graph = make_fx(call, tracing_mode="fake")(*tensors.values())
    torch.testing.assert_close(graph(*tensors.values()), call(*tensors.values()))


def test_a_check_of_values_is_made_again_outside() -> None:
    tensors = _inputs()
    tensors["kept"] += 9
    with FakeTensorMode() as mode:
        masked_gather(mode.from_tensor(tensors["tokens"]), mode.from_tensor(tensors["kept"]))
    with pytest.raises(IndexError, match="kept must hold values"):
        masked_gather(tensors["tokens"], tensors["kept"])


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[Callable[[dict[str, Tensor]], dict[str, Tensor]]]:
    """Yield a function that moves tensors to a device; that of a GPU holds fake ones."""
    if request.param == "cpu":
        yield lambda tensors: tensors
        return
    with FakeTensorMode():
        yield lambda tensors: _fake(tensors, "cuda")


def _mixed(op: str) -> dict[str, Tensor]:
    """Inputs as autocast leaves them: activations in bfloat16, parameters in float32."""
    tensors = _inputs()
    halves = {
        "mixup_info_nce": ["query"], "sigmoid_loss": ["query"],
        "varlen_attention": ["rows"], "padded_attention": ["heads"],
    }.get(op.split()[0], ["tokens", "student"])  # fmt: skip
    return {**tensors, **{name: tensors[name].to(HALF) for name in halves}}


@contextmanager
def _autocast(kind: str) -> Iterator[None]:
    """Switch autocast on, also for a GPU that is not there, where `torch.autocast` would switch it off."""
    torch.set_autocast_enabled(kind, True)
    torch.set_autocast_dtype(kind, HALF)
    try:
        yield
    finally:
        torch.set_autocast_enabled(kind, False)


@pytest.mark.parametrize("op", [name for name in CALLS if not name.startswith(("draw", "patch_mask", "boundaries"))])
def test_dtypes_may_differ_under_autocast(op: str, device: Any) -> None:
    """Gradients come back in the dtype of each input; results are those of inputs that were cast by hand."""
    tensors = device(_mixed(op))
    kind = tensors["tokens"].device.type
    with _autocast(kind):
        _run(op, tensors)
    assert all(x.grad is None or x.grad.dtype == x.dtype for x in tensors.values())
    assert any(x.grad is not None for x in tensors.values()) or "bytes" in op or kind == "cuda"


def test_numbers_under_autocast_are_those_of_tensors_cast_by_hand() -> None:
    for op in ("masked_gather", "masked_gather ragged"):
        mixed = _mixed(op)
        with torch.autocast("cpu", dtype=HALF):
            found = CALLS[op](mixed)
        cast = {name: x.to(HALF) if name in ("positions", "prefix") else x for name, x in mixed.items()}
        torch.testing.assert_close(found, CALLS[op](cast), rtol=0, atol=0)
    mixed = _mixed("mixup_info_nce")
    with torch.autocast("cpu", dtype=HALF):
        found = CALLS["mixup_info_nce"](mixed)
    assert torch.equal(found, CALLS["mixup_info_nce"]({**mixed, "key": mixed["key"].to(HALF)}))


@pytest.mark.parametrize("autocast", [nullcontext, lambda: torch.autocast("cpu", dtype=HALF, enabled=False)])
def test_without_autocast_another_dtype_stays_an_error(autocast: Callable[[], Any]) -> None:
    tensors = _mixed("masked_gather")
    with autocast(), pytest.raises(TypeError, match="positions must have dtype torch.bfloat16"):
        CALLS["masked_gather"](tensors)


@pytest.mark.skipif(not _extension.status().loaded, reason="needs the compiled extension")
def test_a_tensor_subclass_is_taken() -> None:
    class Tagged(Tensor):
        pass

    tensors = _inputs()
    found = masked_gather(tensors["tokens"].as_subclass(Tagged), tensors["kept"].as_subclass(Tagged))
    assert torch.equal(found.as_subclass(Tensor), masked_gather(tensors["tokens"], tensors["kept"]))
    with pytest.raises(IndexError, match="kept must hold values"):
        masked_gather(tensors["tokens"], (tensors["kept"] + 9).as_subclass(Tagged))
