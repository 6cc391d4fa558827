"""The compiled mixup_info_nce at sizes of several blocks: precision, memory, threads, graphs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oner_fast import _extension
from oner_fast.ops import mixup_info_nce, reference
from oner_fast.ops.unit_rows import through_normalisation

pytestmark = pytest.mark.skipif(not _extension.status().loaded, reason=_extension.status().reason or "built")

REFUSED = (ValueError, RuntimeError)  # what a check in C++ raises: the first up to torch 2.13, the second in 2.15
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def inputs(rows: int, width: int, dtype: torch.dtype, *, noise: float = 1.0) -> dict[str, Tensor]:
    """Pairs that resemble each other, so that logits of all sizes occur."""
    generator = torch.Generator().manual_seed(rows * 1000 + width)

    def numbers() -> Tensor:
        return torch.randn(rows, width, generator=generator)

    query = numbers()
    found = {
        "query": query, "key": query + noise * numbers(), "query_other": numbers(), "key_other": query + numbers(),
    }  # fmt: skip
    return {name: x.to(dtype).requires_grad_() for name, x in found.items()}


def plain(
    query: Tensor, key: Tensor, scale: Tensor, other: tuple[Tensor, Tensor] | None = None, normalized: bool = False
) -> Tensor:
    """The obvious PyTorch code, in the inputs' dtype."""
    if other is not None:
        query, key = 0.5 * query + 0.5 * other[0], 0.5 * key + 0.5 * other[1]
    if not normalized:
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    logits = scale * query @ key.T
    target = torch.arange(logits.shape[0])
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "scale", "normalized"),
    [
        (33, 24, 14.0, False),
        (301, 80, 20.0, False),
        (530, 64, 100.0, False),
        (33, 24, 14.0, True),
        (301, 80, 20.0, True),
    ],
)
def test_error_against_float64_is_near_that_of_plain_pytorch(
    rows: int, width: int, scale: float, normalized: bool, mixed: bool, dtype: torch.dtype
) -> None:
    given = inputs(rows, width, dtype, noise=2.0)
    if normalized:
        given = {name: F.normalize(x.detach().float(), dim=1).to(dtype).requires_grad_() for name, x in given.items()}
    if not mixed:
        given = {name: given[name] for name in ("query", "key")}
    leaves = list(given.values())
    logit_scale = torch.tensor(scale, dtype=dtype, requires_grad=True)
    ours = mixup_info_nce(**given, logit_scale=logit_scale, normalized=normalized, implementation="cpp")
    wide = [x.detach().double().requires_grad_() for x in (*leaves, logit_scale)]

    def others(x: list[Tensor]) -> tuple[Tensor, Tensor] | None:
        return (x[2], x[3]) if mixed else None

    exact = plain(wide[0], wide[1], wide[-1], others(wide), normalized)
    theirs = plain(leaves[0], leaves[1], logit_scale, others(leaves), normalized)
    step = torch.finfo(dtype).eps
    # A single number of plain PyTorch may be right by chance; a row's entropy is a difference of numbers of size 1.
    bound = 2 * abs(theirs.double() - exact) + torch.finfo(torch.float32).eps * (1 + abs(exact))
    if mixed and dtype == torch.bfloat16:
        bound = bound + 1e-3 * abs(exact)
    assert abs(ours.double() - exact) <= bound
    mine = torch.autograd.grad(ours, [*leaves, logit_scale])
    plains = torch.autograd.grad(theirs, [*leaves, logit_scale])
    for one, other, right in zip(mine, plains, torch.autograd.grad(exact, wide), strict=True):
        unit = step * right.abs().max() * (1 if right.ndim else 16)  # plain PyTorch's one number may be right by chance
        assert (one.double() - right).abs().max() <= 3 * (other.double() - right).abs().max() + unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (31, 7), (257, 48), (300, 520)])
@pytest.mark.parametrize("scale", [-3.0, 0.0, 30.0])
def test_any_size_agrees_with_the_reference(
    rows: int, width: int, scale: float, symmetric: bool, dtype: torch.dtype
) -> None:
    given = inputs(rows, width, dtype)
    generator = torch.Generator().manual_seed(1)
    logit_scale = torch.tensor(scale, dtype=dtype, requires_grad=True)
    options: dict[str, Any] = {
        "mix": torch.rand(rows, generator=generator, dtype=dtype).requires_grad_(),
        "partner": torch.randint(rows, (rows,), generator=generator),
        "partner_weight": torch.rand(rows, generator=generator, dtype=dtype).round(decimals=1),
        "symmetric": symmetric,
    }
    leaves = [*given.values(), logit_scale, options["mix"]]
    ours = mixup_info_nce(**given, logit_scale=logit_scale, **options, implementation="cpp")
    exact = reference.mixup_info_nce(**given, logit_scale=logit_scale, **options)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance)
    for one, other in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(exact, leaves), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        largest = max(float(other.abs().max()), 1e-2)
        torch.testing.assert_close(one, other, rtol=10 * tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_for_any_number_of_threads(dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    given = inputs(700, 40, dtype)

    def run() -> list[Tensor]:
        loss = mixup_info_nce(**given, logit_scale=20.0, implementation="cpp")
        return [loss, *torch.autograd.grad(loss, list(given.values()))]

    threads(1)
    one = run()
    for count in (2, 5):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(one, run(), strict=True))


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_logit_far_below_all_others_still_counts(scale: float) -> None:
    """Rows and columns whose largest logit is far below the block's: one exponential cannot represent both."""
    given = {name: x.detach() for name, x in inputs(96, 8, torch.float64).items()}
    given["query"][5] = -10 * given["key"].mean(0)
    given["key"][7] = -given["query"].mean(0)
    wide = {name: given[name].clone().requires_grad_() for name in ("query", "key")}
    narrow = {name: given[name].float().requires_grad_() for name in ("query", "key")}
    exact = reference.mixup_info_nce(**wide, logit_scale=scale)
    ours = mixup_info_nce(**narrow, logit_scale=scale, implementation="cpp")
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=0)
    gradients = zip(
        torch.autograd.grad(ours, list(narrow.values())), torch.autograd.grad(exact, list(wide.values())), strict=True
    )
    for one, other in gradients:
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, torch.float64])
@pytest.mark.parametrize("rows", [40, 300])
def test_pairs_with_all_the_probability_have_no_gradient(rows: int, dtype: torch.dtype) -> None:
    """Pairs of one direction at scale 100: what backward recomputes must be forward's largest logit to the last bit, or
    rounding alone would move the vectors."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(rows, 320, generator=generator).to(dtype)
    query, key = vectors.requires_grad_(), (4 * vectors).detach().requires_grad_()
    loss = mixup_info_nce(query, key, 100.0, implementation="cpp")
    assert loss.item() < 1e-12
    for gradient in torch.autograd.grad(loss, (query, key)):
        assert gradient.double().abs().max() < 1e-12


def test_one_bad_row_changes_only_results_that_depend_on_it() -> None:
    given = {name: x.detach() for name, x in inputs(70, 16, torch.float32).items() if "other" not in name}
    given["query"][3, 2] = float("nan")
    leaves = [x.requires_grad_() for x in given.values()]
    loss = mixup_info_nce(**given, logit_scale=5.0, symmetric=False, implementation="cpp")
    assert loss.isnan()
    to_query, to_key = torch.autograd.grad(loss, leaves)
    bad = to_query.isnan().any(1)
    assert bad[3] and bad.sum() == 1 and to_key.isnan().all()


def test_misaligned_and_strided_rows() -> None:
    storage = torch.randn(2, 50, 45)
    query, key = storage[0, :, 1:34], storage[1, ::2, 3:36].repeat(2, 1)
    whole = mixup_info_nce(query.contiguous(), key.contiguous(), 9.0, implementation="cpp")
    assert torch.equal(mixup_info_nce(query, key, 9.0, implementation="cpp"), whole)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saves_its_inputs_and_a_few_numbers_a_row(dtype: torch.dtype, normalized: bool) -> None:
    given = inputs(512, 32, dtype)
    saved: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        mixup_info_nce(**given, logit_scale=10.0, normalized=normalized, implementation="cpp")
    of_inputs = sum(x.numel() * x.element_size() for x in given.values())
    # Two inverse norms, unless normalized; maximum and sum of rows and columns; the scale and the mix, once each.
    assert sum(saved.values()) == of_inputs + (4 if normalized else 6) * 4 * 512 + 8 + 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (33, 7), (260, 72)])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
def test_every_number_of_the_outputs_is_written(
    dtype: torch.dtype, rows: int, width: int, full: bool, normalized: bool
) -> None:
    """Results filled with NaN first, as deterministic mode does with new memory, hold none."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    ops = torch.ops.oner_fast
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given = {name: x.detach() for name, x in inputs(rows, width, dtype).items()}
    sides: list[Tensor | None] = []
    for name in ("query", "key"):
        other, mix = (given[f"{name}_other"], torch.rand(rows, dtype=wide)) if full else (None, None)
        norms = None if normalized else ops.mixup_inverse_norms(given[name], other, mix)
        sides += [given[name], other, mix, norms]
    partner = torch.randint(rows, (rows,)) if full else None
    shared = (*sides, torch.tensor(5.0), partner, 0)
    statistics = ops.mixup_info_nce_statistics(*shared, full)
    row_max, row_sum, column_max, column_sum, _, _ = statistics
    weight = torch.full((rows,), 0.1, dtype=wide)
    columns = (column_max, weight / column_sum) if full else (None, None)
    targets = (weight, weight if full else None)
    gradients = ops.mixup_info_nce_backward(*shared, row_max, weight / row_sum, *columns, *targets, full, False)
    for result in (*([] if normalized else [sides[3], sides[7]]), *statistics, *gradients):
        assert result is not None and result.isfinite().all()
    assert [x.numel() for x in statistics] == [rows, rows, *[full * rows] * 2, rows, full * rows]
    matrix, line = rows * width, full * rows
    expected = [matrix, full * matrix, line, full * matrix, full * matrix, line, 1]
    assert [x.numel() for x in gradients] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_results_of_blocks_of_keys_merge_to_the_whole(dtype: torch.dtype) -> None:
    """As ranks exchange them: statistics and gradients of 150 rows against 300 unit keys, at once and in blocks."""
    ops, rows, first, cuts = torch.ops.oner_fast, 150, 100, (0, 70, 71, 140, 300)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    query, keys = (x.to(dtype) for x in (torch.randn(rows, 40), F.normalize(torch.randn(300, 40), dim=-1)))
    side = (query, None, None, ops.mixup_inverse_norms(query, None, None))
    partner, scale = torch.randint(300, (rows,)), torch.tensor(9.0)

    def block(start: int, end: int) -> tuple[Any, ...]:
        return (*side, keys[start:end], None, None, None, scale, partner - start, first - start)

    blocks = list(itertools.pairwise(cuts))
    whole = ops.mixup_info_nce_statistics(*block(0, 300), True)
    parts = list(zip(*(ops.mixup_info_nce_statistics(*block(*ends), True) for ends in blocks), strict=True))
    near = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    logs = torch.stack([maximum + total.log() for maximum, total in zip(*parts[:2], strict=True)])
    torch.testing.assert_close(logs.logsumexp(0), whole[0] + whole[1].log(), **near)
    for found, one in zip(parts[2:4], whole[2:4], strict=True):
        torch.testing.assert_close(torch.cat(found), one, **near)
    for found, target, one in zip(parts[4:], (torch.arange(rows) + first, partner), whole[4:], strict=True):
        torch.testing.assert_close(torch.stack(found).sum(0), one, **near)
        for (start, end), each in zip(blocks, found, strict=True):
            assert torch.equal(each != 0, (target >= start) & (target < end))

    weight = [torch.rand(size, dtype=wide) / 100 for size in (rows, 300, rows, rows)]

    def gradients(start: int, end: int) -> Any:
        columns = (whole[2][start:end], weight[1][start:end])
        return ops.mixup_info_nce_backward(
            *block(start, end), whole[0], weight[0], *columns, weight[2], weight[3], True, True
        )

    at_once, in_blocks = gradients(0, 300), [gradients(*ends) for ends in blocks]
    step = max(near["rtol"], torch.finfo(dtype).eps)
    for at, together in (
        (0, torch.stack([x[0].to(wide) for x in in_blocks]).sum(0)),
        (3, torch.cat([x[3] for x in in_blocks])),
    ):
        largest = at_once[at].abs().max()
        torch.testing.assert_close(together, at_once[at].to(wide), rtol=step, atol=float(4 * step * largest))
    torch.testing.assert_close(torch.stack([x[6] for x in in_blocks]).sum(0), at_once[6], rtol=step, atol=step)


@pytest.mark.parametrize("far", [-(2**63), -(2**40), -20, 20, 2**40, 2**63 - 1])
def test_targets_in_no_column_have_no_term(far: int) -> None:
    """However far outside: own pairs that begin there, and partners."""
    forward, backward = raw_arguments(torch.float32)
    changed = {9: torch.full((20,), far), 10: far}
    forward, away = (tuple(changed.get(at, x) for at, x in enumerate(given)) for given in (forward, backward))
    own, shared = torch.ops.oner_fast.mixup_info_nce_statistics(*forward)[4:]
    assert not own.any() and not shared.any()
    none = torch.zeros(20)
    weightless = (*backward[:15], none, none, *backward[17:])
    pairs = zip(*(torch.ops.oner_fast.mixup_info_nce_backward(*given) for given in (away, weightless)), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("normalized", [False, True])
def test_compiles_to_one_graph(normalized: bool) -> None:
    given = inputs(40, 16, torch.float32)
    scale, bias = torch.tensor([10.0], requires_grad=True), torch.tensor(-10.0, requires_grad=True)

    def call(query: Tensor, key: Tensor, query_other: Tensor, key_other: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        options = {"query_other": query_other, "key_other": key_other, "logit_bias": bias, "normalized": normalized}
        return mixup_info_nce(query, key, scale, **options) * 2

    leaves = [*given.values(), scale, bias]
    eager = call(*leaves)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, eager)
    for one, other in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves), strict=True):
        torch.testing.assert_close(one, other)


def raw_arguments(dtype: torch.dtype, normalized: bool = False) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given = {name: x.detach() for name, x in inputs(20, 12, dtype).items()}
    mix, scale, partner = torch.tensor(0.3, dtype=wide), torch.tensor(5.0), torch.randint(20, (20,))
    query_norm = key_norm = None
    if not normalized:
        query_norm = torch.ops.oner_fast.mixup_inverse_norms(given["query"], None, None)
        key_norm = torch.ops.oner_fast.mixup_inverse_norms(given["key"], given["key_other"], mix)
    sides = (given["query"], None, None, query_norm, given["key"], given["key_other"], mix, key_norm)
    forward = (*sides, scale, partner, 0, True)
    row_max, row_sum, column_max, column_sum, *_ = torch.ops.oner_fast.mixup_info_nce_statistics(*forward)
    weight = torch.full((20,), 0.1, dtype=wide)
    rows, columns = (row_max, weight / row_sum), (column_max, weight / column_sum)
    return forward, (*forward[:-1], *rows, *columns, weight, weight, True, False)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, normalized: bool) -> None:
    forward, backward = raw_arguments(dtype, normalized)
    torch.library.opcheck(torch.ops.oner_fast.mixup_inverse_norms.default, (forward[4], forward[5], forward[6]))
    torch.library.opcheck(torch.ops.oner_fast.mixup_info_nce_statistics.default, forward)
    torch.library.opcheck(torch.ops.oner_fast.mixup_info_nce_backward.default, backward)
    torch.library.opcheck(torch.ops.oner_fast.mixup_info_nce_backward.default, (*backward[:-1], True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_keys_are_the_gradient_of_the_rows_of_the_logits(dtype: torch.dtype) -> None:
    """Mixed keys: float32, and without the norms and the mix that the gradients of the inputs pass."""
    _, backward = raw_arguments(dtype)
    found, sums = (torch.ops.oner_fast.mixup_info_nce_backward(*backward[:-1], flag) for flag in (False, True))
    key, other, mix, norm = backward[4:8]
    through = through_normalisation(sums[3], key, other, mix.expand(20), norm)
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-5}
    for one, right in zip(found[3:6], through, strict=True):
        torch.testing.assert_close(one, right, **near)
    assert sums[3].dtype == torch.float32 and not sums[4].numel() and not sums[5].numel()
    assert all(torch.equal(found[at], sums[at]) for at in (0, 1, 2, 6))


def test_raw_ops_refuse_indices_outside_their_tensors() -> None:
    forward, backward = raw_arguments(torch.float32)
    for place, value in (
        (9, torch.zeros(19, dtype=torch.int64)),
        (4, torch.randn(20, 11)),
        (7, torch.ones(3)),
    ):
        wrong = (*forward[:place], value, *forward[place + 1 :])
        with pytest.raises(REFUSED, match="must (be|have)"):
            torch.ops.oner_fast.mixup_info_nce_statistics(*wrong)
    with pytest.raises(REFUSED, match="row_max must be"):
        torch.ops.oner_fast.mixup_info_nce_backward(*backward[:11], torch.ones(19), *backward[12:])
    with pytest.raises(RuntimeError, match="derivative"):
        torch.ops.oner_fast.mixup_inverse_norms(torch.ones(2, 2, requires_grad=True), None, None).sum().backward()
