from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from oner_fast.ops import mixup_info_nce, reference
from oner_fast.ops.implementations import implementations

EVERY = [name for name, one in implementations("mixup_info_nce").items() if not one.reasons_against("cpu")]


def normalised(x: Tensor) -> Tensor:
    return torch.stack([row / row.norm().clamp(min=1e-12) for row in x])


def formula(
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor | float,
    query_other: Tensor | None = None,
    key_other: Tensor | None = None,
    mix: Tensor | float = 0.5,
    partner: Tensor | None = None,
    partner_weight: Tensor | None = None,
    symmetric: bool = True,
    normalized: bool = False,
    logit_bias: Tensor | float = 0.0,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    same: str = "positive",
) -> Tensor:
    """The contract, with the N x N targets written out."""
    rows = query.shape[0]
    share = torch.as_tensor(mix, dtype=query.dtype).expand(rows).unsqueeze(1)
    q = query if query_other is None else (1 - share) * query + share * query_other
    k = key if key_other is None else (1 - share) * key + share * key_other
    q, k = (q, k) if normalized else (normalised(q), normalised(k))
    logits = logit_scale * q @ k.T + logit_bias
    target = torch.zeros(rows, rows, dtype=query.dtype)
    for i in range(rows):
        weight = 0.0 if partner is None else 0.5 if partner_weight is None else float(partner_weight[i])
        target[i, i] += 1 - weight
        if partner is not None:
            target[i, int(partner[i])] += weight
    if query_ids is not None:
        return formula_of_ids(logits, query_ids, query_ids if key_ids is None else key_ids, same, symmetric)
    loss = -(target * logits.log_softmax(1)).sum() / rows
    if not symmetric:
        return loss
    columns = logits.log_softmax(0)
    for j in range(rows):
        mass = target[:, j].sum()
        if mass > 0:
            loss = loss - (target[:, j] / mass * columns[:, j]).sum() / rows
    return loss / 2


def formula_of_ids(logits: Tensor, query_ids: Tensor, key_ids: Tensor, same: str, symmetric: bool) -> Tensor:
    """The contract of ids, one row or column after the other."""
    rows = logits.shape[0]

    def pairs(i: int, j: int) -> bool:
        return i == j or (int(query_ids[i]) == int(key_ids[j]) != -1)

    loss = logits.new_zeros(())
    for line in range(rows):
        for lines in (logits, logits.T)[: 1 + symmetric]:
            marked = [n for n in range(rows) if (pairs(line, n) if lines is logits else pairs(n, line))]
            kept = [n for n in range(rows) if same == "positive" or n == line or n not in marked]
            targets = marked if same == "positive" else [line]
            loss = loss + lines[line, kept].logsumexp(0) - lines[line, targets].mean()
    return loss / rows / (1 + symmetric)


@dataclasses.dataclass
class Case:
    """Inputs of one call; all that can ask for a gradient do."""

    positional: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (*self.positional, *self.options.values()) if isinstance(x, Tensor) and x.requires_grad]


def make(
    rows: int, width: int, *, others: str, mix: str, partner: str, symmetric: bool, scale: str,
    normalized: bool = False, bias: str = "none", ids: str = "none",
) -> Case:  # fmt: skip
    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    options: dict[str, Any] = {"symmetric": symmetric}
    if "q" in others:
        options["query_other"] = numbers(rows, width)
    if "k" in others:
        options["key_other"] = numbers(rows, width)
    if others:
        mixes = {"scalar": 0.3, "0-d": torch.tensor(0.4, dtype=torch.float64), "each": torch.rand(rows).double()}
        chosen = mixes[mix]
        options["mix"] = chosen.requires_grad_() if isinstance(chosen, Tensor) else chosen
    if partner != "none":
        options["partner"] = torch.randint(rows, (rows,))
    if partner == "weighted":
        # Whole weights leave some columns without any mass.
        weights = torch.rand(rows, dtype=torch.float64)
        options["partner_weight"] = torch.where(weights < 0.4, 1.0, weights)
        options["partner"][0] = 0
    one = torch.full((1,) if scale == "one" else (), 5.0, dtype=torch.float64)
    logit_scale = 5.0 if scale == "number" else one.requires_grad_()
    if ids != "none":
        options |= {"query_ids": torch.randint(-1, 3, (rows,)), "key_ids": torch.randint(-1, 3, (rows,)), "same": ids}
    if normalized:
        options["normalized"] = True
    if bias != "none":
        options["logit_bias"] = -10.0 if bias == "number" else torch.full_like(one, -10.0).requires_grad_()
    return Case((numbers(rows, width), numbers(rows, width), logit_scale), options)


@pytest.mark.parametrize("implementation", EVERY)
@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 5),
    others=st.sampled_from(["", "q", "k", "qk"]),
    mix=st.sampled_from(["scalar", "0-d", "each"]),
    partner=st.sampled_from(["none", "half", "weighted"]),
    symmetric=st.booleans(),
    scale=st.sampled_from(["number", "tensor", "one"]),
    normalized=st.booleans(),
    bias=st.sampled_from(["none", "number", "tensor"]),
)
def test_the_loss_agrees_with_its_formula(implementation: str, **drawn: Any) -> None:
    case = make(**drawn)
    ours = mixup_info_nce(*case.positional, **case.options, implementation=implementation)
    exact = formula(*case.positional, **case.options)
    assert ours.shape == () and ours.dtype == torch.float64
    torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-11)
    mine, theirs = torch.autograd.grad(ours, case.leaves), torch.autograd.grad(exact, case.leaves)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("mix", "partner", "normalized"), [("each", "none", False), ("0-d", "weighted", False), ("each", "half", True)]
)
def test_gradcheck(implementation: str, symmetric: bool, mix: str, partner: str, normalized: bool) -> None:
    case = make(4, 3, others="qk", mix=mix, partner=partner, symmetric=symmetric, scale="one")
    query, key, scale = case.positional
    fixed = {name: case.options[name] for name in ("partner", "partner_weight") if name in case.options}

    def call(*x: Tensor) -> Tensor:
        options = {"query_other": x[3], "key_other": x[4], "mix": x[5], "symmetric": symmetric, **fixed}
        options |= {"normalized": normalized, "logit_bias": x[6]}
        return mixup_info_nce(x[0], x[1], x[2], **options, implementation=implementation)

    bias = torch.tensor([-10.0], dtype=torch.float64, requires_grad=True)
    inputs = (query, key, scale, case.options["query_other"], case.options["key_other"], case.options["mix"], bias)
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_column_without_targets_adds_nothing_to_the_loss(implementation: str, dtype: torch.dtype) -> None:
    """All rows point at row 0 with their whole weight: columns 1 and 2 have no target at all."""
    query, key = torch.eye(3, dtype=dtype).requires_grad_(), torch.eye(3, dtype=dtype).requires_grad_()
    partner, weight = torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=dtype)
    loss = mixup_info_nce(query, key, 2.0, partner=partner, partner_weight=weight, implementation=implementation)
    total = math.log(math.exp(2) + 2)  # of every row and column
    rows = (3 * total - 2) / 3  # only row 0 has a logit of 2 at its target
    columns = (total - 2 / 3) / 3  # column 0 alone, with a third of its mass on each row
    torch.testing.assert_close(loss, torch.tensor((rows + columns) / 2, dtype=dtype), rtol=1e-6, atol=0)
    for gradient in torch.autograd.grad(loss, (query, key)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("symmetric", [True, False])
def test_one_pair_has_no_loss(implementation: str, symmetric: bool) -> None:
    query = torch.randn(1, 8, requires_grad=True)
    loss = mixup_info_nce(query, torch.randn(1, 8), 7.0, symmetric=symmetric, implementation=implementation)
    assert abs(loss.item()) < 1e-6 and loss.dtype == torch.float32
    assert torch.autograd.grad(loss, query)[0].abs().max() < 1e-6


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scale_100_is_exact_where_every_pair_is_wrong(implementation: str, dtype: torch.dtype) -> None:
    """Every pair is opposite, every other pair equal: logits of -100 and 100, where exp overflows in float32."""
    query = torch.zeros(4, 2, dtype=dtype)
    query[:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    key = -query
    query.requires_grad_()
    loss = mixup_info_nce(query, key, 100.0, implementation=implementation)
    torch.testing.assert_close(loss, torch.tensor(200 + math.log(2)), rtol=1e-6, atol=0)
    assert torch.autograd.grad(loss, query)[0].isfinite().all()
    right = mixup_info_nce(torch.eye(4, dtype=dtype), torch.eye(4, dtype=dtype), 1e4, implementation=implementation)
    assert right.item() == 0.0


@pytest.mark.parametrize("implementation", [name for name in EVERY if name != "reference"])
@pytest.mark.parametrize("autocast", [False, True])
def test_mixed_rows_in_bfloat16_at_a_high_scale_err_no_more_than_plain_pytorch(
    implementation: str, autocast: bool
) -> None:
    """By the error of the loss, the root of its mean square over draws: a single draw of PyTorch's may be lucky."""

    def plain(query: Tensor, key: Tensor, query_other: Tensor, key_other: Tensor) -> Tensor:
        q, k = (F.normalize((x + other) / 2, dim=-1) for x, other in ((query, query_other), (key, key_other)))
        logits, own = 300.0 * (q @ k.T), torch.arange(len(q))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    ours, theirs = [], []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        query, key, *others = (torch.randn(192, 96, generator=generator) for _ in range(4))
        rows = [query, 0.2 * query + key, *others]
        rows = rows if autocast else [x.bfloat16() for x in rows]
        exact = plain(*(x.double() for x in rows))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            options: dict[str, Any] = {"query_other": rows[2], "key_other": rows[3], "implementation": implementation}
            loss = mixup_info_nce(rows[0], rows[1], 300.0, **options)
            ours.append(loss.double() - exact)
            theirs.append(plain(*rows).double() - exact)
    assert torch.stack(ours).square().mean().sqrt() <= torch.stack(theirs).square().mean().sqrt()


@pytest.mark.parametrize("implementation", EVERY)
def test_scale_100_with_random_rows(implementation: str) -> None:
    case = make(16, 4, others="qk", mix="each", partner="half", symmetric=True, scale="number")
    exact = formula(*case.positional[:2], 100.0, **case.options)
    ours = mixup_info_nce(*case.positional[:2], 100.0, **case.options, implementation=implementation)
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=0)
    for one, other in zip(torch.autograd.grad(ours, case.leaves), torch.autograd.grad(exact, case.leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("implementation", EVERY)
def test_a_row_of_zeros_causes_no_division_by_zero(implementation: str) -> None:
    query, key = torch.randn(3, 4), torch.randn(3, 4)
    query[1] = 0
    query.requires_grad_()
    loss = mixup_info_nce(query, key, 1.0, implementation=implementation)
    torch.testing.assert_close(loss.double(), formula(query.double(), key.double(), 1.0), rtol=1e-6, atol=0)
    gradient = torch.autograd.grad(loss, query)[0]
    assert gradient.isfinite().all()


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_of_not_finite_inputs_is_not_finite(implementation: str, bad: float) -> None:
    query = torch.randn(3, 4)
    query[2, 1] = bad
    assert not mixup_info_nce(query, torch.randn(3, 4), 1.0, implementation=implementation).isfinite()


def bfloat16_products() -> bool:
    return torch.ops.oner_fast.cpu_capability() in ("avx512_bf16", "amx")


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_inputs_have_float32_statistics(implementation: str, dtype: torch.dtype) -> None:
    """The only error is float32's in the loss, and one rounding to `dtype` in each gradient; where the processor has
    products of bfloat16, mixed rows are rounded once more."""
    wide = [torch.randn(24, 16, dtype=torch.float64).to(dtype).double().requires_grad_() for _ in range(4)]
    narrow = [x.detach().to(dtype).requires_grad_() for x in wide]
    exact = formula(wide[0], wide[1], 14.0, query_other=wide[2], key_other=wide[3])
    ours = mixup_info_nce(
        narrow[0], narrow[1], 14.0, query_other=narrow[2], key_other=narrow[3], implementation=implementation
    )
    assert ours.dtype == torch.float32
    rounded = implementation == "cpp" and dtype == torch.bfloat16 and bfloat16_products()
    torch.testing.assert_close(ours.double(), exact, rtol=1e-3 if rounded else 1e-5, atol=1e-6)
    for one, other in zip(torch.autograd.grad(ours, narrow), torch.autograd.grad(exact, wide), strict=True):
        assert one.dtype == dtype
        unit = torch.finfo(dtype).eps * (3 if rounded else 1)
        torch.testing.assert_close(
            one.double(), other, rtol=max(unit, 1e-4), atol=unit * float(other.abs().max()) + 1e-6
        )


HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_casts_rows_to_its_dtype_except_beside_float64(implementation: str, dtype: torch.dtype) -> None:
    leaves = [torch.randn(8, 16, requires_grad=True) for _ in range(3)]
    query, key, other = leaves

    def loss(*rows: Tensor) -> Tensor:
        return mixup_info_nce(rows[0], rows[1], 10.0, key_other=rows[2], implementation=implementation)

    cases = {
        "float32": (query, key, other),
        "two halves": (query, key.half(), other.bfloat16()),
        "float64": (query.double(), key, other),
    }
    with torch.autocast("cpu", dtype=dtype):
        inside = {name: loss(*rows) for name, rows in cases.items()}
    for name, found in inside.items():
        right = loss(*(x.double() if name == "float64" else x.to(dtype) for x in cases[name]))
        assert torch.equal(found, right) and found.dtype == right.dtype
        gradients = (torch.autograd.grad(x, leaves, retain_graph=True) for x in (found, right))
        for one, exact in zip(*gradients, strict=True):
            assert one.dtype == torch.float32 and torch.equal(one, exact)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize(
    ("dtypes", "common"),
    [
        ((torch.float32, torch.bfloat16), torch.float32),
        ((torch.float16, torch.float32), torch.float32),
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.bfloat16, torch.float64), torch.float64),
    ],
    ids=str,
)
def test_rows_of_different_dtypes_take_the_widest(
    implementation: str, dtypes: tuple[torch.dtype, torch.dtype], common: torch.dtype
) -> None:
    leaves = [torch.randn(6, 5).to(dtype).requires_grad_() for dtype in (*dtypes, *dtypes)]
    wide = [x.detach().to(common).requires_grad_() for x in leaves]

    def run(query: Tensor, other: Tensor, query_other: Tensor, key_other: Tensor) -> Tensor:
        options = {"query_other": query_other, "key_other": key_other, "implementation": implementation}
        return mixup_info_nce(query, other, 5.0, **options)

    loss, right = run(*leaves), run(*wide)
    assert torch.equal(loss, right) and loss.dtype == common
    for leaf, one, exact in zip(
        leaves, torch.autograd.grad(loss, leaves), torch.autograd.grad(right, wide), strict=True
    ):
        assert one.dtype == leaf.dtype and torch.equal(one, exact.to(leaf.dtype))


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_normalized_rows_have_the_same_loss_and_a_gradient_that_is_not_projected(
    implementation: str, dtype: torch.dtype
) -> None:
    """As a loss on features that were normalised before: the two gradients differ along the rows alone."""
    rows = [normalised(torch.randn(40, 24, dtype=torch.float64)).to(dtype) for _ in range(2)]
    scale = torch.tensor(9.0, dtype=torch.float64)
    losses, gradients = [], []
    for normalized in (False, True):
        leaves = [x.clone().requires_grad_() for x in rows]
        losses.append(mixup_info_nce(*leaves, scale, normalized=normalized, implementation=implementation))
        gradients.append(torch.autograd.grad(losses[-1], leaves))
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(losses[1], losses[0], rtol=40 * step, atol=0)
    for x, projected, whole in zip(rows, *gradients, strict=True):
        x, projected, whole = x.double(), projected.double(), whole.double()
        along = (whole * x).sum(1, keepdim=True) * x
        largest = whole.abs().max()
        assert projected.dtype == whole.dtype and along.abs().max() > 0.1 * largest
        assert (whole - along - projected).abs().max() <= 40 * step * largest


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("others", ["", "qk"])
def test_normalized_rows_are_taken_as_they_are(implementation: str, others: str) -> None:
    """Rows of any length, of zeros and shorter than what has a direction: none is divided by its norm."""
    case = make(9, 6, others=others, mix="each", partner="half", symmetric=True, scale="tensor", normalized=True)
    with torch.no_grad():
        for x in (*case.positional[:2], *(case.options[name] for name in case.options if "other" in name)):
            x[2], x[3] = 0, 1e-13
            x[4] *= 7
    ours = mixup_info_nce(*case.positional, **case.options, implementation=implementation)
    exact = formula(*case.positional, **case.options)
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=0)
    for one, other in zip(torch.autograd.grad(ours, case.leaves), torch.autograd.grad(exact, case.leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
        assert one.ndim < 2 or one[2].count_nonzero() > 0


@pytest.mark.parametrize("implementation", [name for name in EVERY if name != "reference"])
def test_a_bias_changes_no_bit_and_takes_a_gradient_of_0(implementation: str) -> None:
    query, key = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    plain = mixup_info_nce(query, key, 10.0, implementation=implementation)
    gradients = torch.autograd.grad(plain, (query, key))
    for bias in (-10.0, 3, torch.tensor(1e30), torch.tensor([-10.0], dtype=torch.float16)):
        leaves = [query, key]
        if isinstance(bias, Tensor):
            leaves.append(bias.requires_grad_())
        loss = mixup_info_nce(query, key, 10.0, logit_bias=bias, implementation=implementation)
        found = torch.autograd.grad(loss, leaves)
        assert torch.equal(loss, plain) and loss.dtype == torch.float32
        assert all(torch.equal(one, right) for one, right in zip(found, gradients, strict=False))
        for leaf, one in zip(leaves[2:], found[2:], strict=True):
            assert one.shape == leaf.shape and one.dtype == leaf.dtype and not one.any()


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bias_that_is_not_finite_makes_the_loss_nan(implementation: str, bad: float) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    loss = mixup_info_nce(x, x, 1.0, logit_bias=torch.tensor([bad]), implementation=implementation)
    assert loss.isnan() and torch.autograd.grad(loss, x)[0].isnan().all()


@pytest.mark.parametrize("implementation", EVERY)
def test_the_weight_of_a_partner_takes_no_gradient(implementation: str) -> None:
    query, weight = torch.randn(4, 8, requires_grad=True), torch.rand(4, requires_grad=True)
    options = {"partner": torch.tensor([1, 0, 3, 2]), "partner_weight": weight}
    loss = mixup_info_nce(query, torch.randn(4, 8), 5.0, **options, implementation=implementation)
    assert torch.autograd.grad(loss, (query, weight), allow_unused=True)[1] is None


@pytest.mark.parametrize("implementation", EVERY)
def test_a_scale_of_shape_1_takes_a_gradient_of_its_shape(implementation: str) -> None:
    query, key = torch.randn(8, 16), torch.randn(8, 16)
    scales = [torch.tensor(10.0, requires_grad=True), torch.tensor([10.0], requires_grad=True)]
    losses = [mixup_info_nce(query, key, scale, implementation=implementation) for scale in scales]
    assert losses[1].shape == () and torch.equal(*losses)
    gradients = [torch.autograd.grad(loss, scale)[0] for loss, scale in zip(losses, scales, strict=True)]
    assert gradients[1].shape == (1,) and gradients[0].item() == gradients[1].item() != 0


@pytest.mark.parametrize("implementation", EVERY)
def test_non_contiguous_inputs(implementation: str) -> None:
    query, key = torch.randn(6, 10)[:, ::2].t().contiguous().t(), torch.randn(12, 5)[::2]
    assert not query.is_contiguous() and not key.is_contiguous()
    ours = mixup_info_nce(query, key, 3.0, implementation=implementation)
    plain = mixup_info_nce(query.contiguous(), key.contiguous(), 3.0, implementation=implementation)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)


def test_the_reference_is_public_with_the_same_arguments() -> None:
    case = make(5, 4, others="qk", mix="each", partner="half", symmetric=True, scale="tensor")
    served = mixup_info_nce(*case.positional, **case.options, implementation="reference")
    defined = reference.mixup_info_nce(*case.positional, **case.options, group=None, implementation=None)
    assert torch.equal(served, defined)


X = torch.zeros(3, 4)
PARTNER = torch.zeros(3, dtype=torch.int64)
WRONG: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "query must be float32, float16, bfloat16 or float64, got torch.int64", {"query": X.long()}),
    (ValueError, r"query must have shape \(N, D\) = \(\*, \*\), got \(4,\)", {"query": X[0]}),
    (ValueError, r"query must hold at least one row, got shape \(0, 4\)", {"query": X[:0], "key": X[:0]}),
    (TypeError, "key must be a torch.Tensor, got NoneType", {"key": None}),
    (TypeError, "key must be float32, float16, bfloat16 or float64, got torch.int64", {"key": X.long()}),
    (ValueError, r"key must have shape \(N, D\) = \(3, 4\), got \(2, 4\)", {"key": X[:2]}),
    (TypeError, "query_other must be float32.*got torch.int64", {"key": X.half(), "query_other": X.long()}),
    (TypeError, "key_other must be a torch.Tensor, got list", {"key": X.half(), "key_other": [0.0]}),
    (TypeError, "query_other must be a torch.Tensor, got list", {"query_other": [0.0]}),
    (ValueError, r"query_other must have shape.*got \(3, 2\)", {"query_other": X[:, :2]}),
    (TypeError, "key_other must be float32.*got torch.bool", {"key_other": X.bool()}),
    (TypeError, "logit_scale must be a number or a tensor of one number, got str", {"logit_scale": "10"}),
    (TypeError, "logit_scale must be a number or a tensor of one number, got bool", {"logit_scale": True}),
    (TypeError, "logit_scale must be a number or a floating tensor, got torch.int64", {"logit_scale": PARTNER[0]}),
    (ValueError, r"logit_scale must have shape \(\) or \(1,\), got \(2,\)", {"logit_scale": torch.ones(2)}),
    (ValueError, r"logit_scale must have shape \(\) or \(1,\), got \(1, 1\)", {"logit_scale": torch.ones(1, 1)}),
    (ValueError, "logit_bias must be a finite number, got inf", {"logit_bias": math.inf}),
    (TypeError, "logit_bias must be a number or a tensor of one number, got list", {"logit_bias": [0.0]}),
    (ValueError, r"logit_bias must have shape \(\) or \(1,\), got \(3,\)", {"logit_bias": torch.ones(3)}),
    (TypeError, "normalized must be True or False, got int", {"normalized": 1}),
    (TypeError, "query_ids must be int64, got torch.int32; pass query_ids.long()", {"query_ids": PARTNER.int()}),
    (TypeError, "query_ids must be int64, got torch.float32", {"query_ids": PARTNER.float()}),
    (TypeError, "key_ids must be a torch.Tensor, got list", {"query_ids": PARTNER, "key_ids": [0, 1, 2]}),
    (ValueError, r"query_ids must have shape \(N,\) = \(3,\), got \(2,\)", {"query_ids": PARTNER[:2]}),
    (ValueError, r"key_ids must have shape \(N,\) = \(3,\), got \(\)", {"query_ids": PARTNER, "key_ids": PARTNER[0]}),
    (ValueError, "key_ids was given without query_ids", {"key_ids": PARTNER}),
    (ValueError, "partner and query_ids both say.*give one of them", {"query_ids": PARTNER, "partner": PARTNER}),
    (ValueError, "query_ids is on meta but query is on cpu", {"query_ids": PARTNER.to("meta")}),
    (ValueError, "same must be 'positive' or 'ignore', got 'masked'", {"same": "masked"}),
    (TypeError, "same must be 'positive' or 'ignore', got NoneType", {"same": None}),
    (TypeError, r"mix must be a number or a \(N,\) tensor, got NoneType", {"mix": None}),
    (TypeError, "mix must be a number or a floating tensor, got torch.int64", {"mix": PARTNER}),
    (ValueError, r"mix must have shape \(N,\) = \(3,\), got \(2,\)", {"mix": torch.ones(2)}),
    (TypeError, "partner must be a torch.Tensor, got list", {"partner": [0, 1, 2]}),
    (TypeError, "partner must be int64, got torch.int32", {"partner": PARTNER.int()}),
    (ValueError, r"partner must have shape \(N,\) = \(3,\), got \(3, 1\)", {"partner": PARTNER.unsqueeze(1)}),
    (IndexError, r"partner must hold values in \[0, 3\), found 3", {"partner": PARTNER + 3}),
    (IndexError, r"partner must hold values in \[0, 3\), found -1", {"partner": PARTNER - 1}),
    (ValueError, "partner_weight was given without partner", {"partner_weight": torch.ones(3)}),
    (TypeError, "partner_weight must be floating, got torch.int64", {"partner": PARTNER, "partner_weight": PARTNER}),
    (ValueError, r"partner_weight must have shape.*got \(1,\)", {"partner": PARTNER, "partner_weight": X[0, :1]}),
    (ValueError, "key is on meta but query is on cpu", {"key": X.to("meta")}),
    *(
        (ValueError, f"{name} is on meta but query is on cpu; move one of them", {name: torch.ones((), device="meta")})
        for name in ("logit_scale", "logit_bias", "mix")
    ),
    (ValueError, "no implementation 'fast'", {"implementation": "fast"}),
]


@pytest.mark.parametrize(("error", "message", "arguments"), WRONG)
def test_errors_name_the_bad_argument(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        mixup_info_nce(**{"query": X, "key": X, "logit_scale": 1.0, **arguments})


@pytest.mark.parametrize("name", ["logit_scale", "logit_bias", "mix"])
def test_a_number_that_is_not_finite_is_refused_in_a_graph_too(name: str) -> None:
    """A number may be a constant of the graph, or a symbol of it; of one that a tensor holds nothing is known."""

    def call(number: float) -> Tensor:
        return mixup_info_nce(X, X, **{"logit_scale": 1.0, name: number})

    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend="eager", dynamic=dynamic)
        for number in (1.5, 2.5, 3):
            assert torch.equal(compiled(number), call(number))
        with pytest.raises(Exception, match=f"{name} must be a finite number, got -inf"):
            compiled(-math.inf)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        unknown = torch.compile(lambda x: call(x.item()), fullgraph=True, backend="eager")
        assert torch.equal(unknown(torch.tensor(2.5)), call(2.5))


def test_a_size_may_be_a_number_where_sizes_are_symbols() -> None:
    def call(x: Tensor) -> Tensor:
        rows, width = x.shape
        return mixup_info_nce(x, x.flip(0), width, key_other=x, mix=rows, logit_bias=width)

    x = torch.randn(3, 4)
    torch.testing.assert_close(make_fx(call, tracing_mode="symbolic")(x)(x), call(x))


def test_the_definition_called_by_itself_promotes_dtypes_and_follows_autocast() -> None:
    query, key = torch.randn(4, 8), torch.randn(4, 8).bfloat16()
    assert torch.equal(reference.mixup_info_nce(query, key, 5.0), reference.mixup_info_nce(query, key.float(), 5.0))
    halves = reference.mixup_info_nce(query.bfloat16(), key, 5.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reference.mixup_info_nce(query, key, 5.0), halves)


def test_an_argument_that_is_no_tensor_is_named() -> None:
    with pytest.raises(TypeError, match=r"query must be a torch\.Tensor, got list"):
        mixup_info_nce([[0.0]], X, 1.0)  # type: ignore[arg-type]


# Several processes: unequal parts of one batch, one of them empty, in groups of two and of three.
SHARES = {2: (7, 2), 3: (4, 0, 5)}
RANK_CASES = {
    "plain": {"others": "", "mix": "scalar", "partner": "none", "symmetric": True, "scale": "tensor"},
    "rows only": {"others": "qk", "mix": "0-d", "partner": "none", "symmetric": False, "scale": "tensor"},
    "partner": {"others": "qk", "mix": "each", "partner": "weighted", "symmetric": True, "scale": "tensor"},
    "partner, rows only": {"others": "k", "mix": "scalar", "partner": "half", "symmetric": False, "scale": "tensor"},
    "normalized": {
        "others": "", "mix": "scalar", "partner": "none", "symmetric": True, "scale": "one", "normalized": True,
        "bias": "tensor",
    },
    "positive": {
        "others": "", "mix": "scalar", "partner": "none", "symmetric": True, "scale": "tensor", "ids": "positive",
    },
    "ignored, rows only": {
        "others": "k", "mix": "each", "partner": "none", "symmetric": False, "scale": "tensor", "ids": "ignore",
    },
    "normalized, mixed": {
        "others": "qk", "mix": "each", "partner": "half", "symmetric": True, "scale": "tensor", "normalized": True,
    },
}  # fmt: skip


def rank_case(name: str) -> Case:
    torch.manual_seed(5)
    return make(9, 4, **RANK_CASES[name])  # type: ignore[arg-type]


def rank_slice(value: Any, part: slice) -> Any:
    """This rank's rows, as a leaf; what has no rows is every rank's own copy."""
    if not isinstance(value, Tensor):
        return value
    mine = (value[part] if value.ndim and value.shape[0] > 1 else value).detach().clone()
    return mine.requires_grad_(value.requires_grad)


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    results: dict[str, Any] = {}
    for implementation in EVERY:
        for size in SHARES:
            group = dist.new_group(list(range(size)))
            if rank >= size:
                continue
            start = sum(SHARES[size][:rank])
            part = slice(start, start + SHARES[size][rank])
            for name in RANK_CASES:
                whole = rank_case(name)
                case = Case(
                    tuple(rank_slice(x, part) for x in whole.positional),
                    {key: rank_slice(x, part) for key, x in whole.options.items()},
                )
                loss = mixup_info_nce(*case.positional, **case.options, group=group, implementation=implementation)
                gradients = torch.autograd.grad(loss, case.leaves)
                results[f"{implementation} {size} {name}"] = (loss.detach(), list(gradients))
            mine = torch.zeros(max(SHARES[size][rank], 1), 4)
            for error, message, rows, options in (
                (IndexError, r"\[0, \d+\), found 99", mine, {"partner": torch.full((mine.shape[0],), 99)}),
                (ValueError, "at least one row", mine[:0], {}),
                (ValueError, r"query must have shape \(N, D\)", mine[0, 0], {}),
            ):
                with pytest.raises(error, match=message):
                    mixup_info_nce(rows, rows, 1.0, group=group, implementation=implementation, **options)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of three processes for every case."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    # This file as a program, which imports once and forks: pytest has threads by now.
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(3)]


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", list(RANK_CASES))
def test_several_processes_agree_with_one(
    ranks: list[dict[str, Any]], implementation: str, size: int, name: str
) -> None:
    """The loss on every rank, and the mean over ranks of every gradient as DDP takes it."""
    whole = rank_case(name)
    exact = formula(*whole.positional, **whole.options)
    expected = torch.autograd.grad(exact, whole.leaves)
    found = [each[f"{implementation} {size} {name}"] for each in ranks[:size]]
    for loss, _ in found:
        torch.testing.assert_close(loss, exact.detach(), rtol=1e-12, atol=0)
    for index, wanted in enumerate(expected):
        parts = [gradients[index] for _, gradients in found]
        mean = torch.cat(parts) / size if wanted.numel() > 1 else torch.stack(parts).mean(0)
        torch.testing.assert_close(mean, wanted, rtol=1e-10, atol=1e-12)


def main(folder: str) -> None:
    forks = multiprocessing.get_context("fork")
    children = [forks.Process(target=run_rank, args=(rank, folder)) for rank in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(90)
    for child in children:
        child.kill()  # what hangs ends here
    sys.exit(any(child.exitcode != 0 for child in children))


if __name__ == "__main__":
    main(sys.argv[1])
