"""The Triton kernels of mixup_info_nce against the float64 definition, at sizes around their blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from oner_fast.kernels import mixup_info_nce as statistics_kernels
from oner_fast.kernels import mixup_info_nce_deep as deep
from oner_fast.ops import mixup_info_nce, reference

raw = torch.ops.oner_fast_triton


@dataclass(frozen=True)
class Case:
    rows: int
    width: int
    dtype: torch.dtype
    others: str = ""  # "q", "k": which sides are mixed
    mix: str = "scalar"
    partner: bool = False
    symmetric: bool = True
    scale: float = 14.0
    normalized: bool = False
    same: str = ""  # "positive", "ignore": what keys with the same id are

    def __str__(self) -> str:
        options = [
            self.others and f"{self.others}_{self.mix}",
            self.partner and "partner",
            not self.symmetric and "rows",
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
        options: dict[str, Any] = {"symmetric": self.symmetric, "normalized": self.normalized}
        if self.mix == "each":
            leaves["mix"] = torch.rand(self.rows, generator=generator).to(device)
        elif self.others:
            options["mix"] = 0.3
        if self.partner:
            options["partner"] = torch.randint(self.rows, (self.rows,), generator=generator)
            options["partner"][: self.rows // 4] = self.rows - 1  # repeats, and columns that nobody points at
            weight = torch.rand(self.rows, generator=generator)
            options["partner_weight"] = torch.where(weight < 0.2, 1.0, weight)
            options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
        if self.same:
            ids = torch.randint(-1, max(self.rows // 3, 1), (2, self.rows), generator=generator)
            ids[:, : self.rows // 4] = 2**40  # one large class; keys have other ids than queries
            options |= {"query_ids": ids[0].to(device), "key_ids": ids[1].to(device), "same": self.same}
        leaves["logit_scale"] = torch.tensor(self.scale, device=device)
        return {name: x.requires_grad_() for name, x in leaves.items()}, options


def plain(
    query: Tensor, key: Tensor, logit_scale: Tensor, symmetric: bool, query_other: Tensor | None = None,
    key_other: Tensor | None = None, mix: Tensor | float = 0.5, partner: Tensor | None = None,
    partner_weight: Tensor | None = None, normalized: bool = False, query_ids: Tensor | None = None,
    key_ids: Tensor | None = None, same: str = "",
) -> Tensor:  # fmt: skip
    """The obvious PyTorch code, in the inputs' dtype, with N x N targets."""
    dtype, rows = query.dtype, torch.arange(query.shape[0], device=query.device)
    share = mix.to(dtype).unsqueeze(1) if isinstance(mix, Tensor) else mix
    q = query if query_other is None else (1 - share) * query + share * query_other
    k = key if key_other is None else (1 - share) * key + share * key_other
    q, k = (q, k) if normalized else (F.normalize(q, dim=-1), F.normalize(k, dim=-1))
    logits = logit_scale.to(dtype) * q @ k.T
    target = torch.zeros_like(logits, dtype=torch.float64)
    weight = torch.zeros_like(target[0]) if partner is None else partner_weight.double()
    target[rows, rows] += 1 - weight
    if partner is not None:
        target[rows, partner] += weight
    if query_ids is not None and key_ids is not None:
        equal = (query_ids.unsqueeze(1) == key_ids) & (key_ids != -1)
        if same == "ignore":
            logits = logits.masked_fill(equal & (target == 0), -1e4)  # finite, as a target of 0 times -inf is NaN
        else:
            positive = equal | (target > 0)
            of_rows, of_columns = ((positive / positive.sum(d, keepdim=True)).to(dtype) for d in (1, 0))
            loss = -(of_rows * logits.log_softmax(1)).sum() / len(rows)
            return (loss - (of_columns * logits.log_softmax(0)).sum() / len(rows)) / 2 if symmetric else loss
    loss = -(target.to(dtype) * logits.log_softmax(1)).sum() / len(rows)
    if not symmetric:
        return loss
    mass = target.sum(0)
    target = (target / torch.where(mass == 0, 1.0, mass)).to(dtype)
    return (loss - (target * logits.log_softmax(0)).sum() / len(rows)) / 2


SLOW = pytest.mark.slow_emulated
HALF, WIDE, FULL = torch.float16, torch.bfloat16, torch.float32
CASES = [
    Case(64, 64, HALF),
    Case(129, 40, HALF, partner=True),
    Case(100, 64, WIDE, others="qk", mix="each", partner=True),
    Case(70, 100, WIDE, others="k", symmetric=False),
    Case(65, 200, WIDE),
    Case(66, 264, HALF, others="q", mix="each", scale=100.0),
    Case(67, 33, FULL, scale=100.0),
    Case(130, 64, FULL, others="qk", mix="each", partner=True),
    Case(68, 72, HALF, partner=True, normalized=True),
    Case(69, 40, WIDE, others="qk", mix="each", normalized=True),
    Case(66, 136, WIDE, others="k", symmetric=False, normalized=True),
    Case(67, 40, FULL, others="q", normalized=True),
    Case(129, 40, HALF, same="positive"),
    Case(70, 64, HALF, same="ignore", scale=100.0),
    Case(100, 64, WIDE, others="qk", mix="each", same="positive"),
    Case(70, 100, WIDE, others="k", same="ignore", symmetric=False),
    Case(66, 200, WIDE, same="positive", normalized=True),
    Case(66, 264, HALF, others="q", same="ignore"),
    Case(65, 264, HALF, same="positive", symmetric=False),
    Case(67, 33, FULL, same="positive"),
    Case(130, 40, FULL, same="ignore"),
]


@pytest.mark.parametrize("case", [*CASES[:14], *(pytest.param(one, marks=SLOW) for one in CASES[14:])], ids=str)
def test_error_against_float64_is_near_that_of_plain_pytorch(case: Case, device: str) -> None:
    leaves, options = case.arguments(device)
    ours = mixup_info_nce(**leaves, **options, implementation="triton")
    assert ours.shape == () and ours.dtype == torch.float32
    wide = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    exact = reference.mixup_info_nce(**wide, **options)
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
def test_pairs_with_all_the_probability_have_no_loss_and_no_gradient(dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(5)
    unit = torch.linalg.qr(torch.randn(40, 40, generator=generator))[0]
    query = (unit * torch.rand(40, 1, generator=generator) * 3).to(device, dtype).requires_grad_()
    key = unit.to(device, dtype).requires_grad_()
    loss = mixup_info_nce(query, key, 1e4, implementation="triton")
    assert loss.item() == 0.0
    for gradient in torch.autograd.grad(loss, (query, key)):
        assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [HALF, pytest.param(WIDE, marks=SLOW), FULL])
def test_scale_100_is_exact_where_every_pair_is_wrong(dtype: torch.dtype, device: str) -> None:
    """Every pair is opposite, every other pair equal: logits of -100 and 100, where exp overflows in float32."""
    query = torch.zeros(4, 2, dtype=dtype, device=device)
    query[:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    key = -query
    query.requires_grad_()
    loss = mixup_info_nce(query, key, 100.0, implementation="triton")
    torch.testing.assert_close(loss.cpu(), torch.tensor(200 + math.log(2)), rtol=1e-6, atol=0)
    assert torch.autograd.grad(loss, query)[0].isfinite().all()


def test_mixed_rows_in_bfloat16_at_a_high_scale_err_no_more_than_plain_pytorch(device: str) -> None:
    """By the error of the loss, the root of its mean square over draws: a single draw of PyTorch's may be lucky."""

    def plain(query: Tensor, key: Tensor, query_other: Tensor, key_other: Tensor) -> Tensor:
        q, k = (F.normalize((x + other) / 2, dim=-1) for x, other in ((query, query_other), (key, key_other)))
        logits, own = 300.0 * (q @ k.T), torch.arange(len(q), device=q.device)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    ours, theirs = [], []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        query, key, *others = (torch.randn(64, 64, generator=generator) for _ in range(4))
        rows = [x.to(device, WIDE) for x in (query, 0.2 * query + key, *others)]
        exact = plain(*(x.double() for x in rows))
        loss = mixup_info_nce(rows[0], rows[1], 300.0, query_other=rows[2], key_other=rows[3], implementation="triton")
        ours.append(loss.double() - exact)
        theirs.append(plain(*rows).double() - exact)
    assert torch.stack(ours).square().mean().sqrt() <= torch.stack(theirs).square().mean().sqrt()


def test_one_pair_has_no_loss(device: str) -> None:
    query, key = (torch.randn(1, 8, dtype=WIDE, device=device, requires_grad=True) for _ in range(2))
    loss = mixup_info_nce(query, key, 7.0, implementation="triton")
    assert loss.item() == 0.0
    assert all(x.count_nonzero() == 0 for x in torch.autograd.grad(loss, (query, key)))


def test_norms_of_float16_may_lie_far_apart(device: str) -> None:
    """Rows of 1e-4 and of 1e3, and one of zeros: no product with an inverse norm leaves float16."""
    generator = torch.Generator().manual_seed(3)
    sizes = 10 ** (7 * torch.rand(48, 1, generator=generator) - 4)
    rows = [torch.randn(48, 64, generator=generator) * each for each in (sizes, sizes.flip(0))]
    rows[0][5], rows[1][7] = 0, 0
    query, key = (x.to(device, HALF).requires_grad_() for x in rows)
    loss = mixup_info_nce(query, key, 5.0, implementation="triton")
    wide = [x.detach().double().requires_grad_() for x in (query, key)]
    exact = reference.mixup_info_nce(*wide, 5.0)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    for mine, right in zip(torch.autograd.grad(loss, (query, key)), torch.autograd.grad(exact, wide), strict=True):
        unit = 2.0**-9 * right.abs().amax(1, keepdim=True) + 2.0**-23
        assert ((mine.double() - right).abs() <= unit).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_of_not_finite_inputs_is_not_finite(bad: float, device: str) -> None:
    query = torch.randn(3, 4, dtype=WIDE, device=device)
    query[2, 1] = bad
    assert not mixup_info_nce(query, torch.ones_like(query), 1.0, implementation="triton").isfinite()


ZEROS = [Case(20, 64, HALF), Case(20, 64, FULL, others="qk", mix="each"), Case(20, 300, WIDE, others="k")]


@pytest.mark.parametrize("case", ZEROS, ids=str)
@pytest.mark.parametrize("implementation", ["triton", "triton_atomic"])
def test_rows_of_zeros_take_no_gradient(case: Case, implementation: str, device: str) -> None:
    leaves, options = case.arguments(device)
    with torch.no_grad():
        for name, x in leaves.items():
            if x.ndim == 2:
                x[3 if name.startswith("query") else 5] = 0
    loss = mixup_info_nce(**leaves, **options, implementation=implementation)
    found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    wide = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    exact = reference.mixup_info_nce(**wide, **options)
    near = {HALF: 1e-4, WIDE: 1e-4, FULL: 1e-5}[case.dtype]
    torch.testing.assert_close(loss.double(), exact, rtol=near, atol=near)
    right = dict(zip(wide, torch.autograd.grad(exact, list(wide.values())), strict=True))
    for name, gradient in found.items():
        assert gradient.isfinite().all()
        assert ((gradient.double() - right[name]).abs() <= 100 * near * right[name].abs().max()).all(), name
        if gradient.ndim == 2:
            row = gradient[3 if name.startswith("query") else 5]
            assert row.count_nonzero() == 0 and gradient.count_nonzero() > 0


# The host has several NaNs, a GPU one. Warps that write the same NaN would look like a race.
@pytest.mark.parametrize("executor", [{"race": False}], indirect=True, ids=[""])
@pytest.mark.parametrize("dtype", [WIDE, FULL])
@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_diverged_row_has_no_finite_loss(dtype: torch.dtype, side: str, mixed: bool, device: str) -> None:
    leaves, options = Case(20, 64, dtype, others="qk" if mixed else "").arguments(device)
    with torch.no_grad():
        leaves[side][4, 9] = 1e20
    assert not mixup_info_nce(**leaves, **options, implementation="triton").isfinite()


def dense(
    query: Tensor, key: Tensor, scale: float, partner: Tensor, first_pair: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits in float64, their own and partner columns as N x M masks, and what the rows have there."""
    logits = scale * F.normalize(query.double(), dim=1) @ key.double().T
    columns = torch.arange(key.shape[0], device=key.device)
    own = columns == torch.arange(query.shape[0], device=key.device).unsqueeze(1) + first_pair
    shared = columns == partner.unsqueeze(1)
    return logits, own, shared, (logits * own).sum(1), (logits * shared).sum(1)


@pytest.mark.parametrize("dtype", [HALF, FULL])
@pytest.mark.parametrize("first_pair", [-37, 0, 70])
@pytest.mark.parametrize("atomic", [False, True])
def test_a_block_of_a_larger_matrix(first_pair: int, dtype: torch.dtype, atomic: bool, device: str) -> None:
    """Rows, columns and pairs need not agree: no target where a column lies elsewhere. Keys are unit vectors."""
    if atomic and (dtype == FULL or first_pair):
        pytest.skip("the same kernels, or the same masks")
    ops = torch.ops.oner_fast_triton_atomic if atomic else raw
    generator = torch.Generator().manual_seed(first_pair + 100)
    query = torch.randn(70, 48, generator=generator).to(device, dtype)
    key = F.normalize(torch.randn(101, 48, generator=generator), dim=1).to(device, dtype)
    partner = torch.randint(-20, 140, (70,), generator=generator).to(device)
    weights = [torch.rand(n, generator=generator).to(device) / n for n in (70, 101, 70, 70)]
    scale = torch.tensor(9.0, device=device)
    norm = ops.mixup_inverse_norms(query, None, None)
    found = ops.mixup_info_nce_statistics(
        query, None, None, norm, key, None, None, None, scale, partner, first_pair, True
    )
    logits, own, shared, own_logit, shared_logit = dense(query, key, 9.0, partner, first_pair)
    sums = [(logits - logits.amax(d, keepdim=True)).exp().sum(d) for d in (1, 0)]
    exact = [logits.amax(1), sums[0], logits.amax(0), sums[1], own_logit, shared_logit]
    for one, right in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), right, rtol=1e-5, atol=1e-5)
    row_weight, column_weight, own_weight, partner_weight = weights
    results = ops.mixup_info_nce_backward(
        query, None, None, norm, key, None, None, None, scale, partner, first_pair, found[0], row_weight, found[2],
        column_weight, own_weight, partner_weight, True, True,
    )  # fmt: skip
    g = row_weight.unsqueeze(1) * (logits - logits.amax(1, keepdim=True)).exp()
    g = g + column_weight * (logits - logits.amax(0)).exp()
    g = g - own * own_weight.unsqueeze(1) - shared * partner_weight.unsqueeze(1)
    wide = query.double().requires_grad_()
    (to_query,) = torch.autograd.grad((9.0 * g * (F.normalize(wide, dim=1) @ key.double().T)).sum(), wide)
    unit = 4 * torch.finfo(dtype).eps
    assert results[3].dtype == torch.float32
    exact = [to_query, 9.0 * g.T @ F.normalize(query.double(), dim=1), (g * logits).sum() / 9.0]
    for one, right in zip((results[0], results[3], results[6]), exact, strict=True):
        torch.testing.assert_close(one.double(), right, rtol=unit, atol=unit * float(right.abs().max()))


@pytest.mark.parametrize("dtype", [HALF, pytest.param(FULL, marks=SLOW)])
@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("first_pair", [-37, 20, 70])
def test_a_block_of_keys_with_codes(first_pair: int, positive: bool, dtype: torch.dtype, device: str) -> None:
    """As `dense` has them: own pairs that lie elsewhere, and a last tile whose logits overflow where they are ignored.

    Rows 60 to 69 lie opposite to the only keys that are not ignored for them, and along those that are. With 20, a row
    after the last would have one of these as its own pair.
    """
    generator = torch.Generator().manual_seed(first_pair + 100)
    query, key = torch.randn(70, 48, generator=generator), F.normalize(torch.randn(101, 48, generator=generator), dim=1)
    key[90:] = key[90] + 0.01 * key[90:]
    query[60:] = key[90] + 0.01 * query[60:]
    query, key = query.to(device, dtype), F.normalize(key, dim=1).to(device, dtype)
    codes = [torch.randint(30, (n,), generator=generator, dtype=torch.int32) for n in (70, 101)]
    codes[0][60:], codes[1][90:] = 31, 31
    codes = [x.to(device) for x in codes]
    shares = [torch.rand(n, generator=generator).to(device) for n in (70, 101)]
    scale, norm = torch.tensor(300.0, device=device), raw.mixup_inverse_norms(query, None, None)
    side = (query, None, None, norm, key, None, None, None, scale, None, first_pair)
    found = raw.mixup_info_nce_statistics(*side, True, *codes, *(shares if positive else ()))
    logits, own, _, own_logit, _ = dense(
        query, key, 300.0, torch.zeros(70, dtype=torch.int64, device=device), first_pair
    )
    equal = codes[0].unsqueeze(1) == codes[1]
    marked = equal | (own > 0) if positive else equal & (own == 0)
    share = shares[0].double().unsqueeze(1) + shares[1].double()
    kept = logits if positive else logits.masked_fill(marked, -torch.inf)
    exact = [kept.logsumexp(1), kept.logsumexp(0), torch.where(marked, share * logits, 0.0).sum(1)]
    ours = [found[0] + found[1].log(), found[2] + found[3].log(), found[4]]
    for one, right in zip(ours, exact if positive else [*exact[:2], own_logit], strict=True):
        torch.testing.assert_close(one.double(), right, rtol=1e-5, atol=1e-3)
    weights = [torch.rand(n, generator=generator).to(device) / n for n in (70, 101)]
    results = raw.mixup_info_nce_backward(
        *side, found[0], weights[0], found[2], weights[1], shares[0], None, True, True, *codes,
        shares[1] if positive else None,
    )  # fmt: skip
    g = weights[0].unsqueeze(1) * (kept - kept.amax(1, keepdim=True)).exp() + weights[1] * (kept - kept.amax(0)).exp()
    g = g - (torch.where(marked, share, 0.0) if positive else own * shares[0].unsqueeze(1))
    unit = 4 * torch.finfo(dtype).eps
    to_keys = 300.0 * g.T @ F.normalize(query.double(), dim=1)
    torch.testing.assert_close(results[3].double(), to_keys, rtol=unit, atol=unit * float(to_keys.abs().max()))
    assert all(x.isfinite().all() for x in results)


@pytest.mark.parametrize("dtype", [HALF, FULL])
@pytest.mark.parametrize("rows", [260, 9])  # 9: the partials of all parts are fewer than what a program merges at once
def test_few_stripes_of_many_row_tiles(
    rows: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program merges what several row tiles find of its columns, and the partials of all stripes and parts merge."""
    monkeypatch.setattr(statistics_kernels, "_LARGEST_PARTS", 2)
    generator = torch.Generator().manual_seed(11)
    query, key = (torch.randn(n, 40, generator=generator).to(device, dtype) for n in (rows, 70))
    scale, partner = torch.tensor(9.0, device=device), torch.randint(70, (rows,), generator=generator).to(device)
    norms = [raw.mixup_inverse_norms(x, None, None) for x in (query, key)]
    found = raw.mixup_info_nce_statistics(
        query, None, None, norms[0], key, None, None, norms[1], scale, partner, -3, True
    )
    logits, _, _, own_logit, shared_logit = dense(query, F.normalize(key.double(), dim=1), 9.0, partner, -3)
    sums = [(logits - logits.amax(d, keepdim=True)).exp().sum(d) for d in (1, 0)]
    exact = [logits.amax(1), sums[0], logits.amax(0), sums[1], own_logit, shared_logit]
    for one, right in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), right, rtol=1e-5, atol=1e-5)


def test_few_chunks_add_up(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose gradients are kept for a chunk at a time: the keys' sums take the chunks in order."""
    case = Case(67, 33, FULL)
    leaves, options = case.arguments(device)

    def gradients() -> tuple[Tensor, ...]:
        loss = mixup_info_nce(**leaves, **options, implementation="triton")
        return torch.autograd.grad(loss, list(leaves.values()))

    whole = gradients()
    monkeypatch.setattr(deep, "_CHUNK", 1)  # so that 2 D = 66 rows are one, and one row another
    for one, other in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_rows_or_columns_may_be_missing(device: str) -> None:
    query, scale = torch.randn(5, 8, dtype=WIDE, device=device), torch.tensor(3.0, device=device)
    norm = raw.mixup_inverse_norms(query, None, None)
    for q, k in ((query[:0], query), (query, query[:0])):
        found = raw.mixup_info_nce_statistics(q, None, None, norm[: len(q)], k, None, None, None, scale, None, 0, True)
        assert [len(x) for x in found] == [len(q), len(q), len(k), len(k), len(q), 0]
        assert found[0].eq(-math.inf).all() and found[2].eq(-math.inf).all() and not any(found[i].any() for i in (1, 3))
        rows, columns = torch.zeros(len(q), device=device), torch.zeros(len(k), device=device)
        results = raw.mixup_info_nce_backward(
            q, None, None, norm[: len(q)], k, None, None, None, scale, None, 0, rows, rows, columns, columns, rows,
            None, True, True,
        )  # fmt: skip
        assert results[0].shape == q.shape and results[3].shape == k.shape
        assert not any(x.any() for x in results)


def test_partner_sums_ignore_what_lies_outside(device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    partner = torch.randint(-30, 170, (150,), generator=generator).to(device)
    values = torch.rand(150, generator=generator).to(device)
    inside = (partner >= 0) & (partner < 131)
    exact = torch.zeros(131, dtype=torch.float64, device=device).index_add(0, partner[inside], values[inside].double())
    torch.testing.assert_close(raw.mixup_partner_sums(partner, values, 131).double(), exact, rtol=1e-6, atol=1e-6)


_FIRST_RUN: dict[str, list[Tensor]] = {}


@pytest.mark.parametrize("executor", [{"shuffle": 1}, {"shuffle": 2}], indirect=True, ids=["one", "another"])
@pytest.mark.parametrize("case", [CASES[1], CASES[7], CASES[12]], ids=str)
def test_programs_may_run_in_any_order(case: Case, executor: Any, device: str) -> None:
    leaves, options = case.arguments(device)
    loss = mixup_info_nce(**leaves, **options, implementation="triton")
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
        loss = mixup_info_nce(query, key, 5.0, implementation="triton")
        torch.autograd.grad(loss, (query, key))
    assert largest.elements <= (32 if dtype == HALF else 512) * rows < rows * rows


def test_compiles_without_a_break(device: str) -> None:
    case = CASES[1]
    leaves, options = case.arguments(device)

    def call(leaves: dict[str, Tensor]) -> Tensor:
        return mixup_info_nce(**leaves, **options, implementation="triton")

    eager = call(leaves)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(leaves)
    assert torch.equal(compiled, eager)
    for one, other in zip(*(torch.autograd.grad(x, list(leaves.values())) for x in (eager, compiled)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", [CASES[1], CASES[9], pytest.param(CASES[12], marks=SLOW)], ids=str)
def test_atomics_are_right_and_refused_under_deterministic_algorithms(case: Case, device: str) -> None:
    leaves, options = case.arguments(device)
    one, other = (mixup_info_nce(**leaves, **options, implementation=x) for x in ("triton", "triton_atomic"))
    assert torch.equal(one, other)
    gradients = [torch.autograd.grad(x, list(leaves.values())) for x in (one, other)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=1e-3 * float(mine.abs().max()))
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="adds atomically, in no fixed order"):
            mixup_info_nce(**leaves, **options, implementation="triton_atomic")
    finally:
        torch.use_deterministic_algorithms(False)


def test_float64_is_refused_with_a_reason(device: str) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match="no float64 products"):
        mixup_info_nce(x, x, 1.0, implementation="triton")
    assert mixup_info_nce(x, x, 1.0).dtype == torch.float64


@pytest.mark.parametrize("dtype", [HALF, FULL])
def test_normalized_rows_may_have_any_stride(dtype: torch.dtype, device: str) -> None:
    """The deep kernels multiply by the rows themselves, which they read one behind the other."""
    wide = torch.randn(40, 90, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    found = []
    for dense in (False, True):
        query, key = wide[:, 3:43], wide[:, 45:85].t().contiguous().t()
        leaves = [(x.contiguous() if dense else x).detach().requires_grad_() for x in (query, key)]
        loss = mixup_info_nce(*leaves, 0.5, normalized=True, implementation="triton")
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_rows_of_any_stride(device: str) -> None:
    wide = torch.randn(40, 200, dtype=HALF, device=device)
    query, key = wide[:, 3:67], wide[:, 70:134].t().contiguous().t()
    ours = mixup_info_nce(query, key, 3.0, implementation="triton")
    dense_rows = mixup_info_nce(query.contiguous(), key.contiguous(), 3.0, implementation="triton")
    assert torch.equal(ours, dense_rows)
