"""The Triton kernels of sigmoid_loss against the float64 definition, at sizes around their blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from oner_fast.kernels import mixup_info_nce as parts_of_columns
from oner_fast.kernels import mixup_info_nce_deep as deep
from oner_fast.ops import reference, sigmoid_loss

raw = torch.ops.oner_fast_triton
SLOW = pytest.mark.slow_emulated
HALF, WIDE, FULL = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    rows: int
    width: int
    dtype: torch.dtype
    others: str = ""  # "q", "k": which sides are mixed
    mix: str = "scalar"
    partner: bool = False
    scale: float = 10.0
    bias: float | None = -5.0
    normalized: bool = False
    same: str = ""  # "positive", "ignore": what keys with the same id are

    def __str__(self) -> str:
        options = [
            self.others and f"{self.others}_{self.mix}",
            self.partner and "partner",
            self.bias is None and "no_bias",
            self.normalized and "normalized",
            self.same,
        ]
        return "-".join([f"{self.rows}x{self.width}", str(self.dtype)[6:], *(x for x in options if x)])

    def arguments(self, device: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The arguments that may take a gradient, and the others."""
        generator = torch.Generator().manual_seed(self.rows * 1000 + self.width)

        def numbers() -> Tensor:
            return torch.randn(self.rows, self.width, generator=generator)

        query = numbers()
        leaves = {"query": query, "key": query + 2 * numbers()}
        if "q" in self.others:
            leaves["query_other"] = numbers()
        if "k" in self.others:
            leaves["key_other"] = query + numbers()
        if self.normalized:
            leaves = {name: F.normalize(x, dim=1) for name, x in leaves.items()}
        leaves = {name: x.to(device, self.dtype) for name, x in leaves.items()}
        options: dict[str, Any] = {"normalized": self.normalized}
        if self.mix == "each":
            leaves["mix"] = torch.rand(self.rows, generator=generator).to(device)
        elif self.others:
            options["mix"] = 0.3
        if self.partner:
            partner = torch.randint(self.rows, (self.rows,), generator=generator)
            partner[: self.rows // 4] = self.rows - 1  # repeats, and columns that nobody points at
            weight = torch.rand(self.rows, generator=generator)
            options |= {"partner": partner.to(device), "partner_weight": torch.where(weight < 0.2, 1.0, weight)}
            options["partner_weight"] = options["partner_weight"].to(device)
        if self.same:
            ids = torch.randint(-1, max(self.rows // 3, 1), (2, self.rows), generator=generator)
            ids[:, : self.rows // 4] = 2**40  # one large class; keys have other ids than queries
            options |= {"query_ids": ids[0].to(device), "key_ids": ids[1].to(device), "same": self.same}
        leaves["logit_scale"] = torch.tensor(self.scale, device=device)
        if self.bias is not None:
            leaves["logit_bias"] = torch.tensor([self.bias], device=device)
        return {name: x.requires_grad_() for name, x in leaves.items()}, options


def plain(
    query: Tensor, key: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None,
    query_other: Tensor | None = None, key_other: Tensor | None = None, mix: Tensor | float = 0.5,
    partner: Tensor | None = None, partner_weight: Tensor | None = None, normalized: bool = False,
    query_ids: Tensor | None = None, key_ids: Tensor | None = None, same: str = "",
) -> Tensor:  # fmt: skip
    """The obvious PyTorch code, in the inputs' dtype, with N x N targets."""
    dtype, rows = query.dtype, torch.arange(query.shape[0], device=query.device)
    share = mix.to(dtype).unsqueeze(1) if isinstance(mix, Tensor) else mix
    q = query if query_other is None else (1 - share) * query + share * query_other
    k = key if key_other is None else (1 - share) * key + share * key_other
    q, k = (q, k) if normalized else (F.normalize(q, dim=-1), F.normalize(k, dim=-1))
    logits = logit_scale.to(dtype) * q @ k.T
    logits = logits if logit_bias is None else logits + logit_bias.to(dtype)
    target = torch.eye(len(rows), dtype=torch.float64, device=query.device)
    if partner is not None and partner_weight is not None:
        target[rows, rows] -= partner_weight.double()
        target[rows, partner] += partner_weight.double()
    left_out = torch.zeros_like(target, dtype=torch.bool)
    if query_ids is not None and key_ids is not None:
        equal = (query_ids.unsqueeze(1) == key_ids) & (key_ids != -1)
        if same == "ignore":
            left_out = equal & (target == 0)
        else:
            target = torch.where(equal, 1.0, target)
    target = target.to(dtype)
    terms = target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits)
    return -terms.masked_fill(left_out, 0.0).sum() / len(rows)


CASES = [
    Case(64, 64, HALF),
    Case(129, 40, HALF, partner=True),
    Case(100, 64, WIDE, others="qk", mix="each", same="positive"),
    Case(65, 200, WIDE),
    Case(66, 264, HALF, others="q", mix="each", scale=100.0, bias=-10.0),
    Case(67, 33, FULL, scale=100.0, bias=-10.0),
    Case(70, 64, HALF, same="ignore"),
    Case(66, 136, WIDE, others="k", normalized=True, bias=None),
    Case(130, 40, FULL, same="positive"),
    Case(70, 100, WIDE, others="k", mix="each", partner=True),
    Case(66, 200, HALF, same="positive", normalized=True),
    Case(66, 264, HALF, same="ignore"),
    Case(65, 264, WIDE, partner=True, bias=None),
    Case(67, 40, FULL, others="qk", mix="each", partner=True),
    Case(130, 33, FULL, same="ignore", normalized=True),
]


@pytest.mark.parametrize("case", [*CASES[:9], *(pytest.param(one, marks=SLOW) for one in CASES[9:])], ids=str)
def test_error_against_float64_is_near_that_of_plain_pytorch(case: Case, device: str) -> None:
    leaves, options = case.arguments(device)
    ours = sigmoid_loss(**leaves, **options, implementation="triton")
    assert ours.shape == () and ours.dtype == torch.float32
    wide = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    exact = reference.sigmoid_loss(**wide, **options)
    theirs = plain(**leaves, **options)
    step = torch.finfo(case.dtype).eps
    # A single number of plain PyTorch may be right by chance; mixed rows are rounded once more.
    rounded = 0.25 * step * case.scale if case.others and case.dtype != FULL else 0.0
    bound = 2 * abs(theirs.double() - exact) + torch.finfo(torch.float32).eps * (1 + abs(exact)) * 2 + rounded
    assert abs(ours.double() - exact) <= bound
    mine = torch.autograd.grad(ours, list(leaves.values()))
    plains = torch.autograd.grad(theirs, list(leaves.values()))
    rights = torch.autograd.grad(exact, list(wide.values()))
    for name, one, other, right in zip(leaves, mine, plains, rights, strict=True):
        assert one.dtype == leaves[name].dtype and one.shape == right.shape
        unit = step * right.abs().max() * (1 if right.ndim > 1 else 16)
        error = (one.double() - right).abs().max()
        assert error <= 3 * (other.double() - right).abs().max() + unit, name


@pytest.mark.parametrize("dtype", [HALF, pytest.param(FULL, marks=SLOW)])
def test_many_small_terms_add_up(dtype: torch.dtype, device: str) -> None:
    """Every wrong pair has a term of about exp(-10) where training begins, which 1 + x would round to 2^-23."""
    generator = torch.Generator().manual_seed(2)
    query, key = (F.normalize(torch.randn(150, 64, generator=generator), dim=1).to(device, dtype) for _ in range(2))
    bias = torch.tensor(-10.0, device=device, requires_grad=True)
    loss = sigmoid_loss(query, key, 1.0, bias, normalized=True, implementation="triton")
    wide = torch.tensor(-10.0, dtype=torch.float64, device=device, requires_grad=True)
    exact = reference.sigmoid_loss(query.double(), key.double(), 1.0, wide, normalized=True)
    torch.testing.assert_close(loss.double(), exact, rtol=5e-7, atol=0)
    found, right = (torch.autograd.grad(*x)[0].double() for x in ((loss, bias), (exact, wide)))
    torch.testing.assert_close(found, right, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [HALF, FULL])
def test_scale_100_and_bias_minus_10_overflow_nothing(dtype: torch.dtype, device: str) -> None:
    """Every pair is opposite, every other pair equal: logits of -110 and 90, where exp overflows in float32."""
    query = torch.zeros(4, 2, dtype=dtype, device=device)
    query[:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    key = -query
    bias = torch.tensor(-10.0, device=device, requires_grad=True)
    loss = sigmoid_loss(query.requires_grad_(), key, 100.0, bias, implementation="triton")
    torch.testing.assert_close(loss.cpu(), torch.tensor(110.0 + 180.0), rtol=1e-6, atol=0)
    to_query, to_bias = torch.autograd.grad(loss, (query, bias))
    assert to_query.isfinite().all() and to_bias.item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("width", [64, 264])
def test_small_gradients_of_float16_keep_their_digits(width: int, device: str) -> None:
    """A trained model tells pairs apart: G is about 1e-6 everywhere, where float16 has one or two digits."""
    generator = torch.Generator().manual_seed(4)
    query = torch.eye(40, width)
    key = F.normalize(query + 0.02 * torch.randn(40, width, generator=generator), dim=1)
    leaves = [x.to(device, HALF).requires_grad_() for x in (query, key)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    loss = 2**12 * sigmoid_loss(*leaves, 30.0, -16.0, implementation="triton")
    exact = 2**12 * reference.sigmoid_loss(*wide, 30.0, -16.0)
    for mine, right in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(exact, wide), strict=True):
        assert (mine.double() - right).abs().max() <= 2.0**-10 * right.abs().max()


def test_norms_of_float16_may_lie_far_apart(device: str) -> None:
    """Rows of 1e-4 and of 1e3, and one of zeros: no product with an inverse norm leaves float16."""
    generator = torch.Generator().manual_seed(3)
    sizes = 10 ** (7 * torch.rand(48, 1, generator=generator) - 4)
    rows = [torch.randn(48, 64, generator=generator) * each for each in (sizes, sizes.flip(0))]
    rows[0][5], rows[1][7] = 0, 0
    query, key = (x.to(device, HALF).requires_grad_() for x in rows)
    loss = sigmoid_loss(query, key, 5.0, -3.0, implementation="triton")
    wide = [x.detach().double().requires_grad_() for x in (query, key)]
    exact = reference.sigmoid_loss(*wide, 5.0, -3.0)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    for mine, right in zip(torch.autograd.grad(loss, (query, key)), torch.autograd.grad(exact, wide), strict=True):
        unit = 2.0**-9 * right.abs().amax(1, keepdim=True) + 2.0**-23
        assert ((mine.double() - right).abs() <= unit).all()
        assert mine.isfinite().all()


# The host has several NaNs, a GPU one. Warps that write the same NaN would look like a race.
@pytest.mark.parametrize("executor", [{"race": False}], indirect=True, ids=[""])
@pytest.mark.parametrize("dtype", [WIDE, FULL])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e20])
def test_a_diverged_row_has_no_finite_loss(dtype: torch.dtype, bad: float, device: str) -> None:
    leaves, options = Case(20, 64, dtype).arguments(device)
    with torch.no_grad():
        leaves["key"][4, 9] = bad
    assert not sigmoid_loss(**leaves, **options, implementation="triton").isfinite()


@pytest.mark.parametrize("dtype", [HALF, FULL])
@pytest.mark.parametrize("first_pair", [-37, 0, 70])
@pytest.mark.parametrize("kind", ["partner", "positive", "ignored"])
def test_a_block_of_a_larger_matrix(first_pair: int, dtype: torch.dtype, kind: str, device: str) -> None:
    """Rows, columns and pairs need not agree: no target where a column lies elsewhere. Keys are unit vectors."""
    generator = torch.Generator().manual_seed(first_pair + 100)
    query = torch.randn(70, 48, generator=generator).to(device, dtype)
    key = F.normalize(torch.randn(101, 48, generator=generator), dim=1).to(device, dtype)
    scale, bias = torch.tensor(9.0, device=device), torch.tensor(-2.0, device=device)
    each = torch.tensor([0.125], device=device)
    partner = weight = codes = None
    if kind == "partner":
        partner = torch.randint(-20, 140, (70,), generator=generator).to(device)
        weight = torch.rand(70, generator=generator).to(device)
    else:
        codes = [torch.randint(30, (n,), generator=generator, dtype=torch.int32).to(device) for n in (70, 101)]
    norm = raw.mixup_inverse_norms(query, None, None)
    side = (query, None, None, norm, key, None, None, None, scale, bias, partner, weight, first_pair)
    code = (*(codes or (None, None)), kind == "positive")

    logits = 9.0 * F.normalize(query.double(), dim=1) @ key.double().T - 2.0
    columns = torch.arange(101, device=device)
    own = columns == torch.arange(70, device=device).unsqueeze(1) + first_pair
    target, kept = own.double(), torch.ones_like(own)
    if partner is not None and weight is not None:
        target = target * (1 - weight.double()).unsqueeze(1)
        target = target + (columns == partner.unsqueeze(1)) * weight.double().unsqueeze(1)
    elif codes is not None:
        equal = codes[0].unsqueeze(1) == codes[1]
        target = (own | equal).double() if kind == "positive" else target
        kept = kept if kind == "positive" else own | ~equal
    terms = (-target * F.logsigmoid(logits) - (1 - target) * F.logsigmoid(-logits)) * kept
    sums = raw.sigmoid_loss_sums(*side, *code)
    torch.testing.assert_close(sums.double(), terms.sum(1), rtol=1e-5, atol=1e-5)
    found = raw.sigmoid_loss_backward(*side, each, True, True, *code)
    gradient = 0.125 * (logits.sigmoid() - target) * kept
    unit = 4 * torch.finfo(dtype).eps
    to_keys = 9.0 * gradient.T @ F.normalize(query.double(), dim=1)
    torch.testing.assert_close(found[3].double(), to_keys, rtol=unit, atol=unit * float(to_keys.abs().max()))
    torch.testing.assert_close(found[7].double(), gradient.sum(), rtol=1e-4, atol=1e-5 * float(gradient.abs().sum()))
    to_scale = (gradient * (logits + 2.0)).sum() / 9.0
    torch.testing.assert_close(found[6].double(), to_scale, rtol=unit, atol=unit * float(gradient.abs().sum()))
    assert all(x.isfinite().all() for x in found)


def test_the_sums_of_many_parts_add_up(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(70, 64, HALF, same="ignore")
    leaves, options = case.arguments(device)
    whole = sigmoid_loss(**leaves, **options, implementation="triton")
    for parts in (1, 2):
        monkeypatch.setattr(parts_of_columns, "_LARGEST_PARTS", parts)
        torch.testing.assert_close(sigmoid_loss(**leaves, **options, implementation="triton"), whole)


def test_few_chunks_add_up(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose gradients are kept for a chunk at a time: the keys' sums take the chunks in order."""
    leaves, options = Case(67, 33, FULL).arguments(device)

    def gradients() -> tuple[Tensor, ...]:
        loss = sigmoid_loss(**leaves, **options, implementation="triton")
        return torch.autograd.grad(loss, list(leaves.values()))

    whole = gradients()
    monkeypatch.setattr(deep, "_CHUNK", 1)  # so that 2 D = 66 rows are one, and one row another
    for one, other in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_rows_or_columns_may_be_missing(device: str) -> None:
    query, scale = torch.randn(5, 8, dtype=WIDE, device=device), torch.tensor(3.0, device=device)
    for q, k in ((query[:0], query), (query, query[:0])):
        side = (q, None, None, None, k, None, None, None, scale, None, None, None, 0)
        sums = raw.sigmoid_loss_sums(*side)
        assert sums.shape == (len(q),) and not sums.any()
        results = raw.sigmoid_loss_backward(*side, torch.ones(1, device=device), True, True)
        assert results[0].shape == q.shape and results[3].shape == k.shape
        assert not any(x.any() for x in results)


_FIRST_RUN: dict[str, list[Tensor]] = {}


@pytest.mark.parametrize("executor", [{"shuffle": 1}, {"shuffle": 2}], indirect=True, ids=["one", "another"])
@pytest.mark.parametrize("case", [CASES[1], CASES[8]], ids=str)
def test_programs_may_run_in_any_order(case: Case, executor: Any, device: str) -> None:
    leaves, options = case.arguments(device)
    loss = sigmoid_loss(**leaves, **options, implementation="triton")
    found = [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))]
    for one, other in zip(found, _FIRST_RUN.setdefault(str(case), found), strict=True):
        assert torch.equal(one, other)


class Largest(TorchDispatchMode):
    """The largest tensor that anything makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize(("dtype", "rows"), [(HALF, 500), (FULL, 600)])
def test_no_logits_are_kept(dtype: torch.dtype, rows: int, device: str) -> None:
    query, key = (torch.randn(rows, 8, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    with Largest() as largest:
        loss = sigmoid_loss(query, key, 5.0, -5.0, implementation="triton")
        torch.autograd.grad(loss, (query, key))
    assert largest.elements <= (32 if dtype == HALF else 512) * rows < rows * rows


def test_compiles_without_a_break(device: str) -> None:
    leaves, options = CASES[1].arguments(device)

    def call(leaves: dict[str, Tensor]) -> Tensor:
        return sigmoid_loss(**leaves, **options, implementation="triton")

    eager = call(leaves)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(leaves)
    assert torch.equal(compiled, eager)
    for one, other in zip(*(torch.autograd.grad(x, list(leaves.values())) for x in (eager, compiled)), strict=True):
        assert torch.equal(one, other)


def test_float64_is_refused_with_a_reason(device: str) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match="no float64 products"):
        sigmoid_loss(x, x, 1.0, implementation="triton")
    assert sigmoid_loss(x, x, 1.0).dtype == torch.float64


@pytest.mark.parametrize("dtype", [HALF, FULL])
def test_rows_of_any_stride(dtype: torch.dtype, device: str) -> None:
    wide = torch.randn(40, 90, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    found = []
    for dense in (False, True):
        query, key = wide[:, 3:43], wide[:, 45:85].t().contiguous().t()
        leaves = [(x.contiguous() if dense else x).detach().requires_grad_() for x in (query, key)]
        loss = sigmoid_loss(*leaves, 0.5, -1.0, normalized=True, implementation="triton")
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
