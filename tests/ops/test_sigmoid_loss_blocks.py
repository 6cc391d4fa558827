"""The compiled sigmoid_loss at sizes of several blocks: precision, memory, threads, graphs, raw ops."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oner_fast import _extension
from oner_fast.benchmarks import peak_memory
from oner_fast.benchmarks.cases import Call
from oner_fast.ops import reference, sigmoid_loss
from oner_fast.ops.same_ids import same_pairs
from oner_fast.ops.unit_rows import through_normalisation

pytestmark = pytest.mark.skipif(not _extension.status().loaded, reason=_extension.status().reason or "built")

REFUSED = (ValueError, RuntimeError)  # what a check in C++ raises: the first up to torch 2.13, the second in 2.15
HALVES = (torch.float16, torch.bfloat16)
ops = torch.ops.oner_fast


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def inputs(rows: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Pairs that resemble each other, so that logits of all sizes occur."""
    generator = torch.Generator().manual_seed(rows * 1000 + width)

    def numbers() -> Tensor:
        return torch.randn(rows, width, generator=generator)

    query = numbers()
    found = {"query": query, "key": query + 2 * numbers(), "query_other": numbers(), "key_other": query + numbers()}
    return {name: x.to(dtype).requires_grad_() for name, x in found.items()}


def plain(
    query: Tensor, key: Tensor, scale: Tensor, bias: Tensor, others: tuple[Tensor, ...] = (), ids: Tensor | None = None,
    same: str = "positive",
) -> Tensor:  # fmt: skip
    """The obvious PyTorch code, in the inputs' dtype, as open_clip's SigLipLoss has it."""
    if others:
        query, key = 0.5 * query + 0.5 * others[0], 0.5 * key + 0.5 * others[1]
    logits = scale * F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T + bias
    labels = 2 * torch.eye(len(query), dtype=logits.dtype) - 1
    if ids is None:
        return -F.logsigmoid(labels * logits).sum() / len(query)
    equal = ids.unsqueeze(1) == ids
    if same == "positive":
        return -F.logsigmoid(torch.where(equal, 1, -1).to(logits.dtype) * logits).sum() / len(query)
    kept = ~equal | torch.eye(len(query), dtype=torch.bool)
    return -torch.where(kept, F.logsigmoid(labels * logits), 0).sum() / len(query)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("kind", ["plain", "mixed", "positive", "ignore"])
@pytest.mark.parametrize(
    ("rows", "width", "scale", "bias"), [(33, 24, 10.0, -10.0), (301, 80, 20.0, -5.0), (530, 64, 100.0, -10.0)]
)
def test_error_against_float64_is_near_that_of_plain_pytorch(
    rows: int, width: int, scale: float, bias: float, kind: str, dtype: torch.dtype
) -> None:
    given = inputs(rows, width, dtype)
    if kind != "mixed":
        given = {name: given[name] for name in ("query", "key")}
    leaves = [*given.values(), *(torch.tensor(x, dtype=dtype, requires_grad=True) for x in (scale, bias))]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    ids = torch.arange(rows) // 3 if kind in ("positive", "ignore") else None
    options: dict[str, Any] = {} if ids is None else {"query_ids": ids, "same": kind}
    others = leaves[2:4] if kind == "mixed" else []
    named = dict(zip(("query_other", "key_other"), others, strict=False))
    ours = sigmoid_loss(*leaves[:2], *leaves[-2:], **named, **options, implementation="cpp")

    def run(x: list[Tensor]) -> Tensor:
        return plain(*x[:2], *x[-2:], tuple(x[2:-2]), ids, kind)

    exact, theirs = run(wide), run(leaves)
    bound = 2 * abs(theirs.double() - exact) + torch.finfo(torch.float32).eps * (1 + abs(exact))
    if kind == "mixed" and dtype == torch.bfloat16:
        bound = bound + 1e-3 * abs(exact)  # mixed rows are rounded once more
    assert abs(ours.double() - exact) <= bound
    found = (torch.autograd.grad(*x) for x in ((ours, leaves), (theirs, leaves), (exact, wide)))
    for one, other, right in zip(*found, strict=True):
        unit = torch.finfo(dtype).eps * right.abs().max() * (1 if right.ndim else 16)  # one number, right by chance
        assert (one.double() - right).abs().max() <= 3 * (other.double() - right).abs().max() + unit


def test_many_small_terms_add_up() -> None:
    """Every wrong pair has a term of about exp(-10) where training begins, which 1 + x would round to 2^-23."""
    rows = 1500
    query, key = (F.normalize(torch.randn(rows, 64), dim=1) for _ in range(2))
    bias = torch.tensor(-10.0, requires_grad=True)
    loss = sigmoid_loss(query, key, 1.0, bias, normalized=True, implementation="cpp")
    wide = torch.tensor(-10.0, dtype=torch.float64, requires_grad=True)
    exact = plain(query.double(), key.double(), torch.tensor(1.0).double(), wide)
    of_wrong = exact - 10
    assert of_wrong > 0.05
    torch.testing.assert_close(loss.double(), exact, rtol=3e-7, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, bias)[0].double(), torch.autograd.grad(exact, wide)[0], rtol=3e-7, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (31, 7), (257, 48), (300, 520)])
@pytest.mark.parametrize("scale", [-3.0, 0.0, 30.0])
def test_any_size_agrees_with_the_reference(rows: int, width: int, scale: float, dtype: torch.dtype) -> None:
    given: dict[str, Any] = inputs(rows, width, dtype)
    generator = torch.Generator().manual_seed(1)
    given |= {name: torch.tensor(x, dtype=dtype, requires_grad=True) for name, x in (("logit_scale", scale),)}
    given["logit_bias"] = torch.tensor(-4.0, dtype=dtype, requires_grad=True)
    given["mix"] = torch.rand(rows, generator=generator, dtype=dtype).requires_grad_()
    leaves = list(given.values())
    given["partner"] = torch.randint(rows, (rows,), generator=generator)
    given["partner_weight"] = torch.rand(rows, generator=generator, dtype=dtype).round(decimals=1)
    ours, exact = sigmoid_loss(**given, implementation="cpp"), reference.sigmoid_loss(**given)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance)
    for one, other in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(exact, leaves), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        largest = max(float(other.abs().max()), 1.0 if width == 1 else 1e-2)  # one number has no direction
        torch.testing.assert_close(one, other, rtol=10 * tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_for_any_number_of_threads(dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    given = inputs(700, 40, dtype)
    leaves = [*given.values(), torch.tensor(20.0, requires_grad=True), torch.tensor(-5.0, requires_grad=True)]

    def run() -> list[Tensor]:
        loss = sigmoid_loss(**given, logit_scale=leaves[-2], logit_bias=leaves[-1], implementation="cpp")
        return [loss, *torch.autograd.grad(loss, leaves)]

    threads(1)
    one = run()
    for count in (2, 5):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(one, run(), strict=True))


def test_one_bad_row_changes_only_results_that_depend_on_it() -> None:
    given = {name: x.detach() for name, x in inputs(70, 16, torch.float32).items() if "other" not in name}
    given["query"][3, 2] = float("nan")
    leaves = [x.requires_grad_() for x in given.values()]
    loss = sigmoid_loss(**given, logit_scale=5.0, logit_bias=-2.0, implementation="cpp")
    assert loss.isnan()
    to_query, to_key = torch.autograd.grad(loss, leaves)
    bad = to_query.isnan().any(1)
    assert bad[3] and bad.sum() == 1 and to_key.isnan().all()


def test_misaligned_and_strided_rows() -> None:
    storage = torch.randn(2, 50, 45)
    query, key = storage[0, :, 1:34], storage[1, ::2, 3:36].repeat(2, 1)
    whole = sigmoid_loss(query.contiguous(), key.contiguous(), 9.0, -3.0, implementation="cpp")
    assert torch.equal(sigmoid_loss(query, key, 9.0, -3.0, implementation="cpp"), whole)


@pytest.mark.parametrize("implementation", ["cpp", "portable"])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("ids", [False, True])
def test_saves_its_inputs_and_an_inverse_norm_a_row(implementation: str, normalized: bool, ids: bool) -> None:
    given = inputs(512, 32, torch.float32)
    options = {"query_ids": torch.arange(512) // 2} if ids else {}

    def call(*x: Tensor) -> Tensor:
        return sigmoid_loss(
            *x[:2], 10.0, -10.0, query_other=x[2], key_other=x[3], normalized=normalized, **options,
            implementation=implementation,
        )  # fmt: skip

    leaves = tuple(given.values())
    _, beyond = peak_memory.saved_bytes(call, Call(leaves, leaves))
    # Two inverse norms, unless normalized; two codes with ids; the scale and the bias (float64) and the mix.
    assert beyond == (not normalized) * 2 * 4 * 512 + ids * 2 * 4 * 512 + 8 + 8 + 4


def raw_arguments(dtype: torch.dtype, rows: int, width: int, full: bool, normalized: bool) -> tuple[Any, ...]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given = {name: x.detach() for name, x in inputs(rows, width, dtype).items()}
    sides: list[Tensor | None] = []
    for name in ("query", "key"):
        other, mix = (given[f"{name}_other"], torch.rand(rows, dtype=wide)) if full else (None, None)
        norms = None if normalized else ops.mixup_inverse_norms(given[name], other, mix)
        sides += [given[name], other, mix, norms]
    partner = (torch.randint(rows, (rows,)), torch.rand(rows, dtype=wide)) if full else (None, None)
    return (*sides, torch.tensor(5.0), torch.tensor(-2.0) if full else None, *partner, 0)


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
    shared = raw_arguments(dtype, rows, width, full, normalized)
    sums = ops.sigmoid_loss_sums(*shared)
    gradients = ops.sigmoid_loss_backward(*shared, torch.tensor([0.1]), full, False)
    assert all(x.isfinite().all() for x in (sums, *gradients)) and sums.shape == (rows,)
    matrix, line = rows * width, full * rows
    expected = [matrix, full * matrix, line, full * matrix, full * matrix, line, 1, 1]
    assert [x.numel() for x in gradients] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["partner", "positive", "ignore"])
def test_results_of_blocks_of_keys_add_up_to_the_whole(dtype: torch.dtype, kind: str) -> None:
    """As ranks exchange keys: own pairs and partners lie in one block, and elsewhere have no term."""
    rows, width = 200, 24
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    query, key = (F.normalize(x.detach().to(wide), dim=1) for x in list(inputs(rows, width, dtype).values())[:2])
    query, key = query.to(dtype), key.to(dtype)
    partner = weight = None
    codes: tuple[Any, Any] = (None, None)
    if kind == "partner":
        partner, weight = torch.randint(rows, (rows,)), torch.rand(rows, dtype=wide)
    else:
        codes = same_pairs(query, torch.arange(rows) // 3, None, positive=False, symmetric=False)[:2]
    scale, bias, each = torch.tensor(12.0), torch.tensor(-3.0), torch.tensor([0.25], dtype=wide)

    def results(first: int, last: int) -> tuple[Tensor, ...]:
        block = (key[first:last], None, None, None, scale, bias)
        pairs = (None if partner is None else partner - first, weight, -first)
        code = (codes[0], None if codes[1] is None else codes[1][first:last], kind == "positive")
        side = (query, None, None, None, *block, *pairs)
        found = ops.sigmoid_loss_backward(*side, each, True, True, *code)
        return ops.sigmoid_loss_sums(*side, *code), found[0], found[6], found[7], found[3]

    whole, parts = results(0, rows), [results(*ends) for ends in itertools.pairwise((0, 70, 71, 71, rows))]
    step = torch.finfo(dtype).eps
    for at in range(4):
        total = sum(one[at].to(wide) for one in parts)
        torch.testing.assert_close(
            total, whole[at].to(wide), rtol=4 * step, atol=4 * step * float(whole[at].abs().max())
        )
    keys = torch.cat([one[4] for one in parts])
    torch.testing.assert_close(keys, whole[4], rtol=4 * step, atol=4 * step * float(keys.abs().max()))
    assert keys.dtype == wide
    to_key = through_normalisation(keys, key, None, scale, None)[0]
    assert to_key.shape == key.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("full", [True, False])
def test_opcheck(dtype: torch.dtype, full: bool) -> None:
    shared = raw_arguments(dtype, 20, 12, full, normalized=False)
    each = torch.tensor([0.1], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for raw in (ops, torch.ops.oner_fast_portable):
        torch.library.opcheck(raw.sigmoid_loss_sums.default, shared)
        for need_key, key_sums in ((True, False), (True, True), (False, False)):
            torch.library.opcheck(raw.sigmoid_loss_backward.default, (*shared, each, need_key, key_sums))


def test_raw_ops_refuse_gradients_and_wrong_arguments() -> None:
    shared = raw_arguments(torch.float32, 20, 12, False, normalized=True)
    with pytest.raises(RuntimeError, match=r"derivative of torch.ops.oner_fast.sigmoid_loss_sums is not implemented"):
        ops.sigmoid_loss_sums(shared[0].requires_grad_(), *shared[1:])
    shared = (shared[0].detach(), *shared[1:])
    partner, weight, code = torch.zeros(20, dtype=torch.int64), torch.ones(20), torch.zeros(20, dtype=torch.int32)
    for changed, message in (
        ({0: shared[0][:, :5]}, "one width and one dtype"),
        ({0: shared[0][0]}, r"query must have shape \(N, D\)"),
        ({8: torch.ones(2)}, "logit_scale must hold one number"),
        ({9: torch.ones(2)}, "logit_bias must hold one number"),
        ({10: partner}, "partners and their weights come together"),
        ({10: partner, 11: weight.double()}, "partner_weight must be"),
        ({10: partner[:3], 11: weight}, "partner must be"),
        ({13: code}, "codes of both sides come together"),
        ({13: code[:3], 14: code}, "query_code must be"),
        ({10: partner, 11: weight, 13: code, 14: code}, "codes and partners exclude each other"),
    ):
        arguments = [changed.get(i, x) for i, x in enumerate((*shared, None, None, True))]
        with pytest.raises(REFUSED, match=f"sigmoid_loss: .*{message}"):
            ops.sigmoid_loss_sums(*arguments)


def test_no_buffer_grows_with_the_square_of_the_rows() -> None:
    query, key = (torch.randn(3000, 16, requires_grad=True) for _ in range(2))

    def run() -> tuple[Tensor, ...]:
        loss = sigmoid_loss(query, key, 10.0, -10.0, implementation="cpp")
        return torch.autograd.grad(loss, (query, key))

    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    largest = max((event.self_cpu_memory_usage for event in profile.events()), default=0)
    assert 0 < largest < 4 * 3000 * 3000 / 8
