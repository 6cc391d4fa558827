"""Arguments that no op takes, in every place of every op: each ends in a TypeError or a ValueError that names it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from oner_fast.ops import (
    boundaries,
    distill_info_nce,
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

KEPT, CU = torch.tensor([[0, 3], [1, 2]]), torch.tensor([0, 2, 4], dtype=torch.int32)
ROWS = torch.randn(4, 2, 8)
# For each op, the arguments of a good call: those that are tensors, and those that are numbers or options.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "masked_gather": (
        masked_gather,
        {"tokens": torch.randn(2, 4, 8), "kept": KEPT, "positions": torch.randn(4, 8), "prefix": torch.randn(1, 8)},
    ),
    "masked_gather ragged": (
        masked_gather, {"tokens": torch.randn(2, 4, 8), "kept": KEPT.flatten(), "cu_seqlens": CU},
    ),
    "gather_patches": (
        gather_patches,
        {"images": torch.rand(2, 3, 4, 4), "kept": KEPT, "patch_size": 2, "mean": [0.5] * 3, "std": torch.ones(3)},
    ),
    "mixup_info_nce": (
        mixup_info_nce,
        {
            "query": torch.randn(4, 8), "key": torch.randn(4, 8), "logit_scale": 5.0, "query_other": torch.randn(4, 8),
            "key_other": torch.randn(4, 8), "mix": 0.5, "partner": torch.tensor([1, 0, 3, 2]),
            "partner_weight": torch.rand(4),
        },
    ),
    "mixup_info_nce of tensors": (
        mixup_info_nce,
        {
            "query": torch.randn(4, 8), "key": torch.randn(4, 8), "logit_scale": torch.tensor(5.0),
            "key_other": torch.randn(4, 8), "mix": torch.rand(4),
        },
    ),
    "mixup_info_nce with ids": (
        mixup_info_nce,
        {
            "query": torch.randn(4, 8), "key": torch.randn(4, 8), "logit_scale": 5.0,
            "query_ids": torch.tensor([1, 1, 3, -1]), "key_ids": torch.tensor([1, 1, -1, 3]), "same": "ignore",
        },
    ),
    "mixup_info_nce normalized": (
        mixup_info_nce,
        {
            "query": torch.randn(4, 8), "key": torch.randn(4, 8), "logit_scale": torch.tensor([5.0]),
            "query_other": torch.randn(4, 8), "normalized": True, "logit_bias": torch.tensor([-10.0]),
        },
    ),
    "sigmoid_loss": (
        sigmoid_loss,
        {
            "query": torch.randn(4, 8), "key": torch.randn(4, 8), "logit_scale": 5.0,
            "logit_bias": torch.tensor([-10.0]), "query_other": torch.randn(4, 8), "key_other": torch.randn(4, 8),
            "mix": torch.rand(4), "partner": torch.tensor([1, 0, 3, 2]), "partner_weight": torch.rand(4),
        },
    ),
    "sigmoid_loss with ids": (
        sigmoid_loss,
        {
            "query": torch.randn(4, 8), "key": torch.randn(4, 8), "logit_scale": torch.tensor([5.0]),
            "query_ids": torch.tensor([1, 1, 3, -1]), "key_ids": torch.tensor([1, 1, -1, 3]), "normalized": True,
        },
    ),
    "distill_info_nce": (
        distill_info_nce,
        {
            "query": torch.randn(4, 8), "key": torch.randn(4, 8), "logit_scale": torch.tensor(5.0),
            "teacher_query": torch.randn(4, 6), "teacher_key": torch.randn(4, 6),
            "teacher_logit_scale": torch.tensor([5.0]),
        },
    ),
    "varlen_attention": (
        varlen_attention, {"query": ROWS, "key": ROWS, "value": ROWS, "cu_seqlens_q": CU, "cu_seqlens_k": CU},
    ),
    "padded_attention": (
        padded_attention,
        {
            "query": torch.randn(2, 2, 3, 8), "key": torch.randn(2, 1, 4, 8), "value": torch.randn(2, 1, 4, 8),
            "key_lengths": torch.tensor([4, 1]), "dropout_p": 0.5, "dropout_seed": torch.tensor(3),
        },
    ),
    "padded_attention with a mask": (
        padded_attention,
        {
            "query": torch.randn(2, 2, 3, 8), "key": torch.randn(2, 1, 4, 8), "value": torch.randn(2, 1, 4, 8),
            "key_mask": torch.rand(2, 4) < 0.5,
        },
    ),
    "token_alignment": (
        token_alignment, {"student": torch.randn(2, 2, 8), "teacher": torch.randn(2, 4, 8), "kept": KEPT},
    ),
    "draw_masks": (draw_masks, {"seed": 1, "step": 2, "samples": torch.arange(3), "grid": (4, 4), "masked": 5}),
    "patch_mask": (patch_mask, {"seed": 1, "step": 2, "samples": torch.arange(3), "cells": 16, "masked": 5}),
    "boundaries": (boundaries, {"counts": torch.tensor([1, 2])}),
}  # fmt: skip
TENSORS = [(op, name) for op, (_, good) in CALLS.items() for name, x in good.items() if isinstance(x, Tensor)]


def _quantised(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8)


def _nested(layout: torch.layout) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(1, 3)], layout=layout)


NOT_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "sparse": Tensor.to_sparse,
    "jagged": _nested(torch.jagged),
    "nested": _nested(torch.strided),
    "complex": lambda x: x.to(torch.complex64),
    "bool": lambda x: x.bool(),
    "quantised": _quantised,
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "numpy": lambda x: x.numpy(),
    "list": lambda x: x.tolist() if x.ndim else [x.item()],
    "string": lambda x: "tokens",
    "one dimension more": lambda x: x.unsqueeze(0),
    "a huge int": lambda x: 10**400,
}  # fmt: skip


def _call(op: str, **changed: Any) -> Any:
    function, good = CALLS[op]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(**{**good, **changed})


@pytest.mark.parametrize("op", CALLS)
def test_the_good_call_is_good(op: str) -> None:
    _call(op)


@pytest.mark.parametrize("kind", NOT_TENSORS)
@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_a_tensor_of_the_wrong_kind_is_refused_by_its_name(op: str, name: str, kind: str) -> None:
    good = CALLS[op][1][name]
    if (name, kind, good.ndim) == ("logit_scale", "one dimension more", 0):
        assert _call(op, **{name: NOT_TENSORS[kind](good)}) is not None  # (1,) is as good
        return
    if (name, kind) in {("std", "list"), ("std", "numpy"), ("std", "one dimension more")}:
        assert _call(op, **{name: NOT_TENSORS[kind](good)}) is not None  # sequences of numbers are as good
        return
    if (name, kind) == ("key_mask", "bool"):
        return  # it is one
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bad = NOT_TENSORS[kind](good)
    with pytest.raises((TypeError, ValueError), match=rf"^{op.split()[0]}: .*\b{name}\b") as raised:
        _call(op, **{name: bad})
    assert len(str(raised.value)) < 200 and "\n" not in str(raised.value)


def test_an_opaque_layout_is_refused_with_the_remedy() -> None:
    for x in (torch.randn(2, 4, 8).to_mkldnn(), torch.randn(2, 4, 8).to_sparse()):
        with pytest.raises(TypeError, match=r"tokens must be a dense tensor, got torch\..*; pass tokens.to_dense\(\)"):
            masked_gather(x, KEPT)


NUMBERS = {
    "scale": "varlen_attention", "dropout_p": "padded_attention", "logit_scale": "mixup_info_nce",
    "mix": "mixup_info_nce", "mean": "gather_patches",
}  # fmt: skip


@pytest.mark.parametrize("bad", [10**400, -(10**5000), math.nan, math.inf, -math.inf], ids=lambda x: str(float("nan")))
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_no_finite_float_holds_is_a_value_error(name: str, bad: float) -> None:
    given = [0.5, bad, 0.5] if name == "mean" else bad
    with pytest.raises(ValueError, match=rf"{name} must be a finite number, got (an int of \d+ bits|-?inf|nan)$"):
        _call(NUMBERS[name], **{name: given})


@pytest.mark.parametrize(
    "bad", ["5", True, 1j, Decimal(5), [5.0], np.ones(1), object()], ids=lambda x: type(x).__name__
)
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_a_type_error(name: str, bad: Any) -> None:
    given = [0.5, bad, 0.5] if name == "mean" else bad
    with pytest.raises(TypeError, match=rf"{name} must be a number"):
        _call(NUMBERS[name], **{name: given})


@pytest.mark.parametrize(
    ("op", "name"),
    [("gather_patches", "patch_size"), ("varlen_attention", "max_seqlen_q"), ("varlen_attention", "max_seqlen_k"),
     ("draw_masks", "masked"), ("draw_masks", "seed"), ("draw_masks", "step"), ("patch_mask", "cells"),
     ("patch_mask", "stream")],
)  # fmt: skip
def test_a_count_that_is_no_count(op: str, name: str) -> None:
    for bad in (2.0, "2", True, 1j):
        with pytest.raises(TypeError, match=rf"{name} must be an int, got"):
            _call(op, **{name: bad})
    for bad in (-1, 10**400):
        with pytest.raises(ValueError, match=rf"{name} must be "):
            _call(op, **{name: bad})


@pytest.mark.parametrize("implementation", [None, "portable", "reference"])
def test_an_integer_that_no_int64_holds_is_a_number(implementation: str | None) -> None:
    large, one = 10**30, _call("mixup_info_nce", logit_scale=1, implementation=implementation)
    found = _call("mixup_info_nce", logit_scale=large, implementation=implementation)
    assert found.isfinite() and found > one
    torch.testing.assert_close(
        _call("mixup_info_nce", mix=large, implementation=implementation),
        _call("mixup_info_nce", mix=float(large), implementation=implementation),
        equal_nan=True,
    )


@pytest.mark.parametrize("implementation", [None, "sdpa", "reference"])
def test_heads_of_no_numbers_are_refused(implementation: str | None) -> None:
    with pytest.raises(ValueError, match="heads of query must hold at least one number"):
        empty = ROWS[..., :0]
        varlen_attention(empty, empty, empty, CU, implementation=implementation)


def test_rows_of_no_numbers_are_gathered() -> None:
    for implementation in (None, "portable", "reference"):
        tokens = torch.empty(2, 4, 0, requires_grad=True)
        masked_gather(tokens, KEPT, implementation=implementation).sum().backward()
        assert tokens.grad is not None and tokens.grad.shape == tokens.shape


def test_options_that_are_no_options() -> None:
    for bad in (1, "yes", None):
        for op in ("varlen_attention", "padded_attention"):
            with pytest.raises(TypeError, match="causal must be True or False"):
                _call(op, causal=bad)
        with pytest.raises(TypeError, match="symmetric must be True or False"):
            _call("mixup_info_nce", symmetric=bad)
        with pytest.raises(TypeError, match="normalized must be True or False"):
            _call("mixup_info_nce", normalized=bad)
    with pytest.raises(TypeError, match=r"group must be a torch.distributed.ProcessGroup, got str"):
        _call("mixup_info_nce", group="gloo")
    for bad in ("float32", torch.randn(9, 9)):
        with pytest.raises(TypeError, match=r"dtype must be .*, got (str|Tensor)$"):
            _call("gather_patches", dtype=bad)
    for bad in (5, torch.randn(9, 9), ["cpp"]):
        for op in CALLS:
            with pytest.raises(TypeError, match="implementation must be a name or None, got (int|Tensor|list)$"):
                _call(op, implementation=bad)
        with pytest.raises(TypeError, match="pattern must be a name, got (int|Tensor|list)$"):
            _call("draw_masks", pattern=bad)
    for grid in (4, (4,), "44", (4, 4, 4)):
        with pytest.raises(TypeError, match=r"grid must be a pair"):
            _call("draw_masks", grid=grid)
    for mean in ("abc", {0: 1, 1: 2, 2: 3}, 0.5):
        with pytest.raises(TypeError, match="mean must be a tensor or a sequence of numbers"):
            _call("gather_patches", mean=mean)


def test_boundaries_of_int64_are_taken() -> None:
    wide = CU.long()
    for op, names in {
        "varlen_attention": ("cu_seqlens_q", "cu_seqlens_k"),
        "masked_gather ragged": ("cu_seqlens",),
    }.items():
        expected = _call(op)
        for implementation in (None, "reference"):
            found = _call(op, implementation=implementation, **dict.fromkeys(names, wide))
            torch.testing.assert_close(found, expected)  # new boundaries are int32 in both
    patches, ends = gather_patches(torch.rand(2, 3, 4, 4), KEPT.flatten(), 2, cu_seqlens=wide)
    assert ends.dtype == torch.int32 and torch.equal(ends, CU)
    with pytest.raises(
        ValueError, match=r"cu_seqlens_q must count fewer than 2\^31 rows, which int32 holds, got 4294967300"
    ):
        _call("varlen_attention", cu_seqlens_q=torch.tensor([0, 2, 2**32 + 4]), cu_seqlens_k=None)
    for dtype in (torch.int16, torch.uint8, torch.float32):
        with pytest.raises(
            TypeError, match=r"cu_seqlens_q must be int32 or int64, got .*; oner_fast.ops.boundaries\(counts\)"
        ):
            _call("varlen_attention", cu_seqlens_q=CU.to(dtype))
