from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from oner_fast import _extension, ops
from oner_fast.ops import implementations, library
from oner_fast.ops.implementations import choose, explain, register

PUBLIC = [
    "distill_info_nce",
    "gather_patches",
    "masked_gather",
    "mixup_info_nce",
    "padded_attention",
    "patch_masks",
    "sigmoid_loss",
    "token_alignment",
    "varlen_attention",
]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONER_FAST_IMPLEMENTATION", raising=False)
    for name in [*PUBLIC, "toy"]:
        monkeypatch.delenv(f"ONER_FAST_{name.upper()}_IMPLEMENTATION", raising=False)


@pytest.fixture
def toy() -> Iterator[str]:
    """An op with three implementations: one for CUDA, one for few dtypes, and the definition."""

    def picky(device: str, dtype: torch.dtype | None = None, **facts: Any) -> list[str]:
        return [] if dtype in (None, torch.float32) else [f"takes float32, not {dtype}", "is in a bad mood"]

    register("toy", "reference", lambda: "reference")
    register("toy", "gpu", lambda: "gpu", devices=("cuda",), preference=100)
    register("toy", "picky", lambda: "picky", devices=("cpu", "cuda"), preference=50, reasons=picky)
    yield "toy"
    del implementations._registry["toy"]


def test_every_public_op_has_a_reference_implementation() -> None:
    assert implementations.ops() == PUBLIC
    assert all("reference" in implementations.implementations(op) for op in PUBLIC)


def test_the_most_preferred_implementation_that_can_run_is_chosen(toy: str) -> None:
    assert choose(toy, "cuda").name == "gpu"
    assert choose(toy, "cpu").name == "picky"
    assert choose(toy, "cpu", dtype=torch.float32).function() == "picky"
    assert choose(toy, "cpu", dtype=torch.float16).name == "reference"
    assert choose(toy, "meta").name == "reference"


def calls() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]:
    """A call of every public op: the function, its arguments, and its options."""
    tokens, kept = torch.randn(1, 4, 8), torch.zeros(1, 2, dtype=torch.int64)
    rows, boundaries = torch.randn(4, 2, 8, requires_grad=True), torch.tensor([0, 1, 4], dtype=torch.int32)
    return {
        "distill_info_nce": (ops.distill_info_nce, (tokens[0], tokens[0], 2.0, tokens[0], tokens[0], 3.0), {}),
        "gather_patches": (ops.gather_patches, (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), kept, 4), {}),
        "masked_gather": (ops.masked_gather, (tokens.double(), kept), {}),
        "mixup_info_nce": (ops.mixup_info_nce, (tokens[0], tokens[0], 2.0), {}),
        "sigmoid_loss": (ops.sigmoid_loss, (tokens[0], tokens[0], 2.0, -1.0), {}),
        "padded_attention": (ops.padded_attention, (rows[None],) * 3, {"causal": True, "dropout_p": 0.25}),
        "token_alignment": (ops.token_alignment, (tokens[:, :2], tokens, kept), {}),
        "varlen_attention": (ops.varlen_attention, (rows, rows, rows, boundaries), {"max_seqlen_q": 3, "scale": 0.5}),
    }


@pytest.mark.parametrize("op", sorted(calls()))
@pytest.mark.parametrize("autocast", [False, True])
def test_the_implementation_is_chosen_by_the_facts_that_facts_returns(
    op: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, dict[str, Any]]] = []

    def note(name: str, device: str, implementation: str | None = None, **facts: Any) -> implementations.Implementation:
        asked.append((name, device, facts))
        return choose(name, device, implementation, **facts)

    module = importlib.import_module(f"oner_fast.ops.{op}")
    monkeypatch.setattr(importlib.import_module("oner_fast.ops.serve"), "choose", note)
    function, arguments, options = calls()[op]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected = module.facts(*arguments, **options)
        function(*arguments, **options)
    assert asked == [expected] and expected[:2] == (op, "cpu")


def test_the_facts_of_attention_tell_lengths_head_dimension_and_gradient() -> None:
    _, arguments, options = calls()["varlen_attention"]
    facts = importlib.import_module("oner_fast.ops.varlen_attention").facts
    known = facts(*arguments, **options)[2]
    assert known == {
        "dtype": torch.float32, "causal": False, "scale": 0.5, "max_seqlen_q": 3, "max_seqlen_k": 3,
        "needs_grad": True, "head_dim": 8, "grouped": False, "dropout_p": 0.0,
    }  # fmt: skip
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        known = facts(*arguments, arguments[3], causal=True)[2]
    assert known["dtype"] == torch.bfloat16 and known["causal"] and not known["needs_grad"]
    assert known["max_seqlen_q"] is None and known["max_seqlen_k"] is None


def test_the_argument_beats_the_ops_variable_which_beats_the_general_one(
    toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONER_FAST_IMPLEMENTATION", "reference")
    assert choose(toy, "cuda").name == "reference"
    monkeypatch.setenv("ONER_FAST_TOY_IMPLEMENTATION", "picky")
    assert choose(toy, "cuda").name == "picky"
    assert choose(toy, "cuda", "gpu").name == "gpu"


def test_the_variable_for_all_leaves_ops_without_that_name_free(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONER_FAST_IMPLEMENTATION", "gpu")  # only the toy has it
    assert choose(toy, "cuda").name == "gpu"
    assert choose("patch_masks", "cpu").name == "reference"
    monkeypatch.setenv("ONER_FAST_PATCH_MASKS_IMPLEMENTATION", "gpu")
    with pytest.raises(ValueError, match="patch_masks has no implementation 'gpu'"):
        choose("patch_masks", "cpu")


def test_unknown_name_lists_the_known_ones(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'fast' \(asked for by the argument.*known ones: gpu, picky, reference"):
        choose(toy, "cpu", "fast")
    monkeypatch.setenv("ONER_FAST_TOY_IMPLEMENTATION", "fast")
    with pytest.raises(ValueError, match="environment variable ONER_FAST_TOY_IMPLEMENTATION"):
        choose(toy, "cpu")
    with pytest.raises(ValueError, match="unknown op 'tyo'; known ops: .*masked_gather"):
        choose("tyo", "cpu")


def test_an_implementation_that_cannot_run_lists_every_reason(toy: str) -> None:
    with pytest.raises(
        RuntimeError, match="runs on cpu and cuda, not on xpu; takes float32, not torch.float16; is in a bad"
    ):
        choose(toy, "xpu", "picky", dtype=torch.float16)


def test_some_implementations_run_only_when_named(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    register(toy, "shy", lambda: "shy", devices=("cuda",), on_request=("cpu",), preference=200)
    assert choose(toy, "cuda").name == "shy" and choose(toy, "cpu").name == "picky"
    assert choose(toy, "cpu", "shy").name == "shy"
    with pytest.raises(RuntimeError, match="runs on cuda, and on cpu when asked for by name, not on xpu"):
        choose(toy, "xpu", "shy")
    assert next(choice for choice in explain("cpu") if choice.op == toy).chosen == "picky"
    monkeypatch.setenv("ONER_FAST_TOY_IMPLEMENTATION", "shy")
    assert choose(toy, "cpu").name == "shy"
    assert next(choice for choice in explain("cpu") if choice.op == toy).chosen == "shy"


@pytest.mark.parametrize("op", [op for op in PUBLIC if "triton" in implementations.implementations(op)])
def test_triton_says_why_it_cannot_run(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = implementations.implementations(op)["triton"]
    assert triton.reasons_against("cpu"), "never without being asked for"
    monkeypatch.setattr(library, "_triton_runs_on_the_cpu", lambda: False)
    assert any("TRITON_INTERPRET=1" in reason for reason in triton.reasons_against("cpu", asked_for=True))
    monkeypatch.setattr(library, "_triton_runs_on_the_cpu", lambda: True)
    assert not triton.reasons_against("cpu", asked_for=True) and not triton.reasons_against("cuda")
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    told = triton.reasons_against("cuda")
    assert any("pip install $(oner-fast requirements triton)" in reason for reason in told), "pip moves torch else"


@pytest.mark.parametrize("stub", [ModuleType("triton"), SimpleNamespace(__spec__=object())])
def test_a_damaged_triton_is_a_reason_and_no_error(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a specification a module counts as absent; without `knobs` it is one of another version."""
    monkeypatch.setitem(sys.modules, "triton", stub)
    (why,) = library.why_not_triton("cpu")
    assert ("Triton is not installed" if stub.__spec__ is None else "Triton cannot be used: AttributeError") in why
    assert all(choice.chosen for choice in explain("cpu"))


def test_a_call_that_no_implementation_can_run_is_an_error(toy: str) -> None:
    register(toy, "reference", lambda: None, devices=("cpu",))
    with pytest.raises(RuntimeError, match="no implementation can run.*gpu: runs on cuda.*reference: runs on cpu"):
        choose(toy, "xpu")


def test_explain(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_toy() -> implementations.Choice:
        return next(choice for choice in explain("cpu") if choice.op == toy)

    free = of_toy()
    assert free.chosen == "picky" and free.others["gpu"] == ["runs on cuda, not on cpu"]
    assert free.others["reference"] == ["can run, but is less preferred"]
    monkeypatch.setenv("ONER_FAST_IMPLEMENTATION", "gpu")
    assert of_toy().chosen is None and "cannot run" in of_toy().why
    monkeypatch.setenv("ONER_FAST_IMPLEMENTATION", "nonsense")
    assert of_toy().chosen is None and "known: gpu, picky, reference" in of_toy().why


def test_the_variable_reaches_a_public_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONER_FAST_MASKED_GATHER_IMPLEMENTATION", "nonsense")
    with pytest.raises(ValueError, match="masked_gather has no implementation 'nonsense'"):
        ops.masked_gather(torch.zeros(1, 2, 3), torch.zeros(1, 1, dtype=torch.int64))


def test_a_missing_extension_warns_once_and_plain_pytorch_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = _extension.Status(False, "the C++ extension is not built: no C++ compiler was found", "install g++")
    monkeypatch.setattr(_extension, "_status", missing)
    monkeypatch.setattr(_extension, "_warned", False)
    tokens, kept = torch.randn(1, 2, 3), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.warns(RuntimeWarning, match="no C.. compiler was found. Remedy: install g..") as caught:
        result = ops.masked_gather(tokens, kept)
    assert len(caught) == 1 and torch.equal(result, tokens[:, :1])
    assert implementations.choose("masked_gather", "cpu").name == "portable"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.masked_gather(tokens, kept)
    with pytest.raises(RuntimeError, match="'cpp'.*cannot run this call: the C.. extension is not built"):
        ops.masked_gather(tokens, kept, implementation="cpp")
