"""sigmoid_loss on every implementation of this machine, against its contract written out pair by pair."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from oner_fast.ops import reference, sigmoid_loss
from oner_fast.ops.implementations import implementations
from tests.ops.test_mixup_info_nce import Case, bfloat16_products, normalised

EVERY = [name for name, one in implementations("sigmoid_loss").items() if not one.reasons_against("cpu")]
COMPUTED = [name for name in EVERY if name != "reference"]
HALVES = (torch.bfloat16, torch.float16)
LARGEST, SMALLEST = 2**63 - 1, -(2**63)


def formula(
    query: Tensor, key: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float | None = None,
    query_other: Tensor | None = None, key_other: Tensor | None = None, mix: Tensor | float = 0.5,
    partner: Tensor | None = None, partner_weight: Tensor | None = None, query_ids: Tensor | None = None,
    key_ids: Tensor | None = None, same: str = "positive", normalized: bool = False,
) -> Tensor:  # fmt: skip
    """The contract, one pair after the other."""
    rows = query.shape[0]
    share = torch.as_tensor(mix, dtype=query.dtype).expand(rows).unsqueeze(1)
    q = query if query_other is None else (1 - share) * query + share * query_other
    k = key if key_other is None else (1 - share) * key + share * key_other
    q, k = (q, k) if normalized else (normalised(q), normalised(k))
    logits = logit_scale * (q @ k.T) + (0.0 if logit_bias is None else logit_bias)
    loss = logits.new_zeros(())
    others = query_ids if key_ids is None else key_ids
    for i in range(rows):
        weight = 0.0 if partner is None else 0.5 if partner_weight is None else float(partner_weight[i])
        for j in range(rows):
            equal = query_ids is not None and int(query_ids[i]) == int(others[j]) != -1
            target = (1 - weight if i == j else 0.0) + (weight if partner is not None and int(partner[i]) == j else 0.0)
            if equal and i != j:
                if same == "ignore":
                    continue
                target = 1.0
            loss = loss - target * logits[i, j].sigmoid().log() - (1 - target) * (-logits[i, j]).sigmoid().log()
    return loss / rows


def make(
    rows: int, width: int, *, others: str = "", mix: str = "scalar", partner: str = "none", scale: str = "tensor",
    bias: str = "tensor", normalized: bool = False, ids: str = "none",
) -> Case:  # fmt: skip
    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    options: dict[str, Any] = {}
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
        weights = torch.rand(rows, dtype=torch.float64)
        options["partner_weight"] = torch.where(weights < 0.3, 1.0, weights)
        options["partner"][0] = 0
    if ids != "none":
        options |= {"query_ids": torch.randint(-1, 3, (rows,)), "key_ids": torch.randint(-1, 3, (rows,)), "same": ids}
    if normalized:
        options["normalized"] = True
    one = torch.full((1,) if scale == "one" else (), 5.0, dtype=torch.float64)
    logit_scale = 5.0 if scale == "number" else one.requires_grad_()
    biases = {"none": None, "number": -2.0, "tensor": torch.full((), -2.0).double(), "one": torch.tensor([-2.0])}
    logit_bias = biases[bias]
    if isinstance(logit_bias, Tensor):
        logit_bias = logit_bias.double().requires_grad_()
    return Case((numbers(rows, width), numbers(rows, width), logit_scale, logit_bias), options)


def gradients(loss: Tensor, case: Case) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, case.leaves)


def check(case: Case, implementation: str) -> None:
    ours = sigmoid_loss(*case.positional, **case.options, implementation=implementation)
    exact = formula(*case.positional, **case.options)
    assert ours.shape == () and ours.dtype == torch.float64
    torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-11)
    for one, other in zip(gradients(ours, case), gradients(exact, case), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("implementation", EVERY)
@given(
    rows=st.integers(1, 7),
    width=st.integers(1, 5),
    others=st.sampled_from(["", "q", "k", "qk"]),
    mix=st.sampled_from(["scalar", "0-d", "each"]),
    partner=st.sampled_from(["none", "half", "weighted"]),
    scale=st.sampled_from(["number", "tensor", "one"]),
    bias=st.sampled_from(["none", "number", "tensor", "one"]),
    normalized=st.booleans(),
)
def test_the_loss_agrees_with_its_formula(implementation: str, **drawn: Any) -> None:
    check(make(**drawn), implementation)


@pytest.mark.parametrize("implementation", EVERY)
@given(
    ids=st.lists(st.sampled_from([-1, 0, 1, -2, LARGEST, SMALLEST]), min_size=1, max_size=7),
    keys=st.one_of(st.none(), st.randoms(use_true_random=False)),
    width=st.integers(1, 4),
    others=st.sampled_from(["", "qk"]),
    normalized=st.booleans(),
    same=st.sampled_from(["positive", "ignore"]),
)
def test_the_loss_with_ids_agrees_with_its_formula(
    implementation: str, ids: list[int], keys: Any, width: int, others: str, normalized: bool, same: str
) -> None:
    case = make(len(ids), width, others=others, mix="each", normalized=normalized)
    case.options |= {"query_ids": torch.tensor(ids), "same": same}
    if keys is not None:
        case.options["key_ids"] = torch.tensor(keys.sample(ids, len(ids)))
    check(case, implementation)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize(
    "options",
    [
        {"mix": "each"},
        {"mix": "0-d", "partner": "weighted"},
        {"mix": "each", "normalized": True, "partner": "half"},
        {"mix": "each", "ids": "positive"},
        {"mix": "0-d", "ids": "ignore"},
    ],
)
def test_gradcheck(implementation: str, options: dict[str, Any]) -> None:
    case = make(4, 3, others="qk", **options, scale="one")
    names = [name for name, x in case.options.items() if isinstance(x, Tensor) and x.requires_grad]
    fixed = {name: x for name, x in case.options.items() if name not in names}

    def call(*x: Tensor) -> Tensor:
        return sigmoid_loss(*x[:4], **dict(zip(names, x[4:], strict=True)), **fixed, implementation=implementation)

    assert torch.autograd.gradcheck(call, tuple(case.leaves))


@pytest.mark.parametrize("implementation", EVERY)
def test_it_is_the_loss_of_siglip_in_its_own_words(implementation: str) -> None:
    """Algorithm 1 of SigLIP: labels 2 I - 1, and the sum of log sigmoid over the batch divided by its rows."""
    case = make(6, 8)
    query, key, scale, bias = case.positional
    logits = normalised(query) @ normalised(key).T * scale + bias
    exact = -torch.nn.functional.logsigmoid((2 * torch.eye(6).double() - 1) * logits).sum() / 6
    torch.testing.assert_close(sigmoid_loss(*case.positional, implementation=implementation), exact)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_scale_100_and_bias_minus_10_overflow_nothing(implementation: str, dtype: torch.dtype) -> None:
    """Every pair is opposite, every other pair equal: logits of -110 and 90, where exp overflows in float32."""
    query = torch.zeros(4, 2, dtype=dtype)
    query[:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    leaves = [query.requires_grad_(), torch.tensor(100.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)]
    loss = sigmoid_loss(query, -query.detach(), *leaves[1:], implementation=implementation)
    # A row has its own pair at -110, one other at -110 and two at 90.
    torch.testing.assert_close(loss, torch.tensor(110.0 + 2 * 90.0), rtol=1e-6, atol=0)
    _, to_scale, to_bias = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(to_scale, torch.tensor(1.0 + 2.0), rtol=1e-6, atol=0)
    torch.testing.assert_close(to_bias, torch.tensor(-1.0 + 2.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_terms_and_small_gradients_are_exact(implementation: str, dtype: torch.dtype) -> None:
    """A right pair at a logit of 20: a term and a gradient of exp(-20), which a difference of numbers near 1 loses."""
    query = torch.ones(1, 1, dtype=dtype, requires_grad=True)
    bias = torch.zeros((), dtype=dtype, requires_grad=True)
    loss = sigmoid_loss(query, query.detach(), 20.0, bias, normalized=True, implementation=implementation)
    tiny = math.log1p(math.exp(-20))
    assert loss.item() == pytest.approx(tiny, rel=1e-6)
    assert torch.autograd.grad(loss, bias)[0].item() == pytest.approx(-1 / (1 + math.exp(20)), rel=1e-6)
    wrong = sigmoid_loss(
        query.repeat(2, 1), query.repeat(2, 1), 0.0, -20.0, normalized=True, query_ids=torch.tensor([1, 2]),
        implementation=implementation,
    )  # fmt: skip
    assert wrong.item() == pytest.approx(20 + 2 * tiny, rel=1e-6)


@pytest.mark.parametrize("implementation", EVERY)
def test_a_row_of_zeros_has_logits_of_the_bias_and_no_gradient(implementation: str) -> None:
    query, key = torch.randn(3, 4), torch.randn(3, 4)
    query[1], key[2, :] = 0, 1e-14
    query.requires_grad_()
    key.requires_grad_()
    loss = sigmoid_loss(query, key, 3.0, -1.0, implementation=implementation)
    exact = formula(query.double(), torch.where(torch.arange(3).unsqueeze(1) == 2, 0.0, key.double()), 3.0, -1.0)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    to_query, to_key = torch.autograd.grad(loss, (query, key))
    assert to_query.isfinite().all() and to_key.isfinite().all()
    assert not to_query[1].any() and not to_key[2].any() and to_query[0].any()


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"query_ids": torch.tensor([1, 1, 2])}, {"partner": torch.tensor([1, 0, 2])}])
def test_a_loss_of_not_finite_inputs_is_not_finite(implementation: str, bad: float, options: dict[str, Any]) -> None:
    query = torch.randn(3, 4)
    query[2, 1] = bad
    assert not sigmoid_loss(query, torch.randn(3, 4), 1.0, **options, implementation=implementation).isfinite()


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bias_that_is_not_finite_makes_the_loss_not_finite(implementation: str, bad: float) -> None:
    x = torch.randn(3, 4)
    assert not sigmoid_loss(x, x, 1.0, torch.tensor([bad]), implementation=implementation).isfinite()


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_low_precision_inputs_have_float32_terms(implementation: str, dtype: torch.dtype) -> None:
    """The only error is float32's in the loss, and one rounding to `dtype` in each gradient; where the processor has
    products of bfloat16, mixed rows are rounded once more."""
    wide = [torch.randn(24, 16, dtype=torch.float64).to(dtype).double().requires_grad_() for _ in range(4)]
    narrow = [x.detach().to(dtype).requires_grad_() for x in wide]

    def call(function: Any, x: list[Tensor], **how: Any) -> Tensor:
        return function(x[0], x[1], 14.0, -3.0, query_other=x[2], key_other=x[3], **how)

    exact, ours = call(formula, wide), call(sigmoid_loss, narrow, implementation=implementation)
    assert ours.dtype == torch.float32
    rounded = implementation == "cpp" and dtype == torch.bfloat16 and bfloat16_products()
    torch.testing.assert_close(ours.double(), exact, rtol=1e-3 if rounded else 1e-6, atol=0)
    for one, other in zip(torch.autograd.grad(ours, narrow), torch.autograd.grad(exact, wide), strict=True):
        assert one.dtype == dtype
        unit = torch.finfo(dtype).eps * (3 if rounded else 1)
        torch.testing.assert_close(
            one.double(), other, rtol=max(unit, 1e-5), atol=unit * float(other.abs().max()) + 1e-7
        )


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_casts_rows_to_its_dtype_except_beside_float64(implementation: str, dtype: torch.dtype) -> None:
    leaves = [torch.randn(8, 16, requires_grad=True) for _ in range(3)]
    query, key, other = leaves

    def loss(*rows: Tensor) -> Tensor:
        return sigmoid_loss(rows[0], rows[1], 10.0, -10.0, key_other=rows[2], implementation=implementation)

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
        both = (torch.autograd.grad(x, leaves, retain_graph=True) for x in (found, right))
        for one, exact in zip(*both, strict=True):
            assert torch.equal(one, exact) and one.dtype == torch.float32


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("same", ["positive", "ignore"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ids_without_equals_change_no_more_than_rounding(implementation: str, same: str, dtype: torch.dtype) -> None:
    query, key = (torch.randn(150, 24).to(dtype).requires_grad_() for _ in range(2))

    def run(**options: Any) -> list[Tensor]:
        loss = sigmoid_loss(query, key, 20.0, -5.0, **options, implementation=implementation)
        return [loss.detach(), *torch.autograd.grad(loss, (query, key))]

    right = run()
    for ids in (torch.full((150,), -1), torch.randperm(150) * 2**50 + SMALLEST):
        for one, other in zip(run(query_ids=ids, same=same), right, strict=True):
            step = torch.finfo(other.dtype).eps  # a compiler may fuse other products and sums
            torch.testing.assert_close(one, other, rtol=step, atol=8 * step * float(other.abs().max()))


@pytest.mark.parametrize("implementation", EVERY)
def test_the_weight_of_a_partner_takes_no_gradient(implementation: str) -> None:
    query, weight = torch.randn(4, 8, requires_grad=True), torch.rand(4, requires_grad=True)
    options = {"partner": torch.tensor([1, 0, 3, 2]), "partner_weight": weight}
    loss = sigmoid_loss(query, torch.randn(4, 8), 5.0, **options, implementation=implementation)
    assert torch.autograd.grad(loss, (query, weight), allow_unused=True)[1] is None


@pytest.mark.parametrize("implementation", EVERY)
def test_a_row_may_be_its_own_partner(implementation: str) -> None:
    query, key = torch.randn(4, 8), torch.randn(4, 8)
    plain = sigmoid_loss(query, key, 5.0, -1.0, implementation=implementation)
    own = {"partner": torch.arange(4), "partner_weight": torch.tensor([0.0, 0.3, 0.5, 1.0])}
    torch.testing.assert_close(sigmoid_loss(query, key, 5.0, -1.0, **own, implementation=implementation), plain)


@pytest.mark.parametrize("implementation", EVERY)
def test_any_strides(implementation: str) -> None:
    query, key = torch.randn(6, 10)[:, ::2].t().contiguous().t(), torch.randn(12, 5)[::2]
    assert not query.is_contiguous() and not key.is_contiguous()
    ours = sigmoid_loss(query, key, 3.0, implementation=implementation)
    plain = sigmoid_loss(query.contiguous(), key.contiguous(), 3.0, implementation=implementation)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)
    ids = torch.randint(3, (6, 2))
    strided = sigmoid_loss(query, key, 3.0, query_ids=ids[:, 0], implementation=implementation)
    dense = sigmoid_loss(query, key, 3.0, query_ids=ids[:, 0].contiguous(), implementation=implementation)
    assert torch.equal(strided, dense)


def test_the_reference_is_public_with_the_same_arguments() -> None:
    case = make(5, 4, others="qk", mix="each", partner="half")
    served = sigmoid_loss(*case.positional, **case.options, implementation="reference")
    assert torch.equal(served, reference.sigmoid_loss(*case.positional, **case.options, group=None))


X = torch.zeros(3, 4)
PARTNER = torch.zeros(3, dtype=torch.int64)
WRONG: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "query must be a torch.Tensor, got list", {"query": [[0.0]]}),
    (TypeError, "query must be float32, float16, bfloat16 or float64, got torch.int64", {"query": X.long()}),
    (ValueError, r"query must hold at least one row, got shape \(0, 4\)", {"query": X[:0], "key": X[:0]}),
    (ValueError, r"key must have shape \(N, D\) = \(3, 4\), got \(2, 4\)", {"key": X[:2]}),
    (ValueError, r"query_other must have shape.*got \(3, 2\)", {"query_other": X[:, :2]}),
    (TypeError, "logit_scale must be a number or a tensor of one number, got str", {"logit_scale": "10"}),
    (ValueError, r"logit_scale must have shape \(\) or \(1,\), got \(2,\)", {"logit_scale": torch.ones(2)}),
    (ValueError, "logit_bias must be a finite number, got inf", {"logit_bias": math.inf}),
    (TypeError, "logit_bias must be a number or a tensor of one number, got list", {"logit_bias": [0.0]}),
    (ValueError, r"logit_bias must have shape \(\) or \(1,\), got \(3,\)", {"logit_bias": torch.ones(3)}),
    (TypeError, "normalized must be True or False, got int", {"normalized": 1}),
    (TypeError, "query_ids must be int64, got torch.int32; pass query_ids.long()", {"query_ids": PARTNER.int()}),
    (ValueError, r"key_ids must have shape \(N,\) = \(3,\), got \(\)", {"query_ids": PARTNER, "key_ids": PARTNER[0]}),
    (ValueError, "key_ids was given without query_ids", {"key_ids": PARTNER}),
    (ValueError, "partner and query_ids both say.*give one of them", {"query_ids": PARTNER, "partner": PARTNER}),
    (ValueError, "same must be 'positive' or 'ignore', got 'masked'", {"same": "masked"}),
    (TypeError, r"mix must be a number or a \(N,\) tensor, got NoneType", {"mix": None}),
    (IndexError, r"partner must hold values in \[0, 3\), found 3", {"partner": PARTNER + 3}),
    (ValueError, "partner_weight was given without partner", {"partner_weight": torch.ones(3)}),
    (TypeError, "group must be a torch.distributed.ProcessGroup, got str", {"group": "gloo"}),
    (ValueError, "key is on meta but query is on cpu", {"key": X.to("meta")}),
    (ValueError, "logit_bias is on meta but query is on cpu", {"logit_bias": torch.ones((), device="meta")}),
    (ValueError, "no implementation 'fast'", {"implementation": "fast"}),
]


@pytest.mark.parametrize(("error", "message", "arguments"), WRONG)
def test_errors_name_the_op_and_the_bad_argument(
    error: type[Exception], message: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(error, match=rf"^sigmoid_loss.*{message}"):
        sigmoid_loss(**{"query": X, "key": X, "logit_scale": 1.0, **arguments})


@pytest.mark.parametrize("implementation", COMPUTED)
@pytest.mark.parametrize("ids", ["none", "positive", "ignore"])
def test_compiles_to_one_graph(implementation: str, ids: str) -> None:
    case = make(20, 8, ids=ids, partner="weighted" if ids == "none" else "none")

    def call(query: Tensor, key: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return sigmoid_loss(query, key, scale, bias, **case.options, implementation=implementation)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*case.positional)
    eager = call(*case.positional)
    for one, other in zip((compiled, *gradients(compiled, case)), (eager, *gradients(eager, case)), strict=True):
        torch.testing.assert_close(one, other)


def test_a_size_may_be_a_number_where_sizes_are_symbols() -> None:
    def call(x: Tensor) -> Tensor:
        rows, width = x.shape
        return sigmoid_loss(x, x.flip(0), width, width, key_other=x, mix=rows)

    x = torch.randn(3, 4)
    torch.testing.assert_close(make_fx(call, tracing_mode="symbolic")(x)(x), call(x))


def test_no_gradient_is_computed_for_keys_that_want_none() -> None:
    query, key = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    for implementation in EVERY:
        loss = sigmoid_loss(query, key, 2.0, implementation=implementation)
        loss.backward()
        assert key.grad is None and query.grad is not None
        query.grad = None
