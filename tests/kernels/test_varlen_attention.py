"""The flash kernels against the definition in float64 and against plain PyTorch in the same dtype."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from oner_fast.kernels.attention_rows import head_of, own_tile
from oner_fast.kernels.varlen_attention import head_blocks, vector_of
from oner_fast.ops import varlen_attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Empty sequences on either side, more queries than keys (the first are blind under a causal mask) and fewer.
LENGTHS = ([37, 0, 70, 1, 9], [20, 3, 95, 0, 9])
FORWARD, BACKWARD = torch.ops.oner_fast_triton.varlen_attention, torch.ops.oner_fast_triton.varlen_attention_backward


def cumulative(lengths: list[int], device: str) -> Tensor:
    return torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32, device=device)


def inputs(
    heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: str, lengths: Any = LENGTHS
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """query, key, value; the gradient from above; and the boundaries."""
    torch.manual_seed(head_dim)
    rows, rows_k = sum(lengths[0]), sum(lengths[1])
    shapes = [(rows, heads[0]), (rows_k, heads[1]), (rows_k, heads[1]), (rows, heads[0])]
    *leaves, upstream = (torch.randn(*shape, head_dim, device=device).to(dtype) for shape in shapes)
    return (
        [x.requires_grad_() for x in leaves],
        upstream,
        cumulative(lengths[0], device),
        cumulative(lengths[1], device),
    )


def eager(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[list[int], list[int]], causal: bool, scale: float
) -> Tensor:
    """Plain PyTorch in the dtype of the inputs, a sequence at a time."""
    groups = query.shape[1] // key.shape[1]
    out = []
    for q, k, v in zip(query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True):
        k, v = (x.repeat_interleave(groups, 1).transpose(0, 1) for x in (k, v))
        blind = max(len(q) - k.shape[1], 0) if causal else len(q) * (k.shape[1] == 0)
        scores = (q[blind:] * scale).transpose(0, 1) @ k.mT
        if causal:
            seen = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).tril(k.shape[1] - len(q) + blind)
            scores = scores.masked_fill(~seen, -math.inf)
        out += [q[:blind] * 0, (scores.softmax(-1) @ v).transpose(0, 1)]
    return torch.cat(out)


def with_gradients(attend: Callable[..., Tensor], leaves: list[Tensor], upstream: Tensor) -> list[Tensor]:
    result = attend(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves, upstream.to(result.dtype), materialize_grads=True)]


def check(
    heads: tuple[int, int], head_dim: int, dtype: torch.dtype, causal: bool, device: str,
    scale: float | None = None, lengths: Any = LENGTHS, change: Callable[[Tensor], Tensor] = lambda x: x,
) -> None:  # fmt: skip
    """At most twice (gradients three times) the error of plain PyTorch, plus a unit in the last place."""
    leaves, upstream, cu_q, cu_k = inputs(heads, head_dim, dtype, device, lengths)
    by = head_dim**-0.5 if scale is None else scale

    def ours(*x: Tensor) -> Tensor:
        x = tuple(change(one) for one in x)
        return varlen_attention(*x, cu_q, cu_k, causal=causal, scale=scale, implementation="triton")

    mine = with_gradients(ours, leaves, change(upstream))
    plainly = with_gradients(lambda *x: eager(*x, lengths, causal, by), leaves, upstream)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = with_gradients(lambda *x: eager(*x, lengths, causal, by), wide, upstream)
    for index, (one, other, truth) in enumerate(zip(mine, plainly, exact, strict=True)):
        assert one.dtype == dtype and one.shape == truth.shape
        unit = torch.finfo(dtype).eps * truth.abs().max()
        error, allowed = (one - truth).abs(), (other - truth).abs()
        factor = 2 if index == 0 else 3
        assert error.max() <= factor * allowed.max() + unit, f"tensor {index}"
        assert error.square().mean().sqrt() <= factor * allowed.square().mean().sqrt() + unit, f"tensor {index}"


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype", "causal"),
    [
        ((2, 1), 64, torch.float16, True),
        ((2, 2), 64, torch.bfloat16, False),
        ((1, 1), 88, torch.bfloat16, True),
        ((2, 2), 16, torch.float32, False),
    ],
)
def test_error_against_float64(
    heads: tuple[int, int], head_dim: int, dtype: torch.dtype, causal: bool, device: str
) -> None:
    check(heads, head_dim, dtype, causal, device)


@pytest.mark.parametrize("head_dim", [5, 37])
def test_rows_that_begin_anywhere(head_dim: int, device: str) -> None:
    """An odd width, of numbers that lie apart: no row begins at a multiple of 16 bytes. A tile is longer than all."""
    lengths = ([2, 2], [7, 3])
    check((2, 1), head_dim, torch.float16, False, device, lengths=lengths, change=lambda x: x.mT.contiguous().mT)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [1, 16, 24, 32, 40, 64, 72, 80, 88, 96, 112, 128, 160, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_every_head_dimension(head_dim: int, dtype: torch.dtype, causal: bool, device: str) -> None:
    if dtype == torch.float32 and head_dim > 128:
        pytest.skip("float32 is served up to 128")
    check((2, 1), head_dim, dtype, causal, device, lengths=([150, 0, 3], [133, 5, 40]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, -0.3, 100 / 64])
@pytest.mark.parametrize("causal", [False, True])
def test_any_scale(dtype: torch.dtype, scale: float, causal: bool, device: str) -> None:
    check((2, 2), 64, dtype, causal, device, scale=scale)


@pytest.mark.parametrize("size", [100.0, 5000.0])
@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        (torch.bfloat16, 64),
        (torch.float32, 16),
        pytest.param(torch.float16, 64, marks=pytest.mark.slow),
        pytest.param(torch.float32, 64, marks=pytest.mark.slow),
    ],
)
def test_gradients_of_large_scores(size: float, dtype: torch.dtype, width: int, device: str) -> None:
    """Settled rows and rows torn between two equal keys: the weights of backward are those of forward."""
    generator = torch.Generator().manual_seed(3)
    direction = F.normalize(torch.randn(width, generator=generator), dim=0)
    query = (size**0.5 * direction).expand(24, 2, width) * torch.linspace(0.9, 1.1, 24)[:, None, None]
    key = (size**0.5 * direction).expand(100, 2, width) * torch.rand(100, 1, 1, generator=generator)
    key = torch.cat([key, key[key[:, 0, 0].abs().argmax()].unsqueeze(0)])
    upstream = torch.randn(24, 2, width, generator=generator).to(device, dtype)
    narrow = [x.to(device, dtype) for x in (query, key, torch.randn(101, 2, width, generator=generator))]
    cu_q, cu_k = cumulative([24], device), cumulative([101], device)

    def explicit(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.einsum("hqk,khd->qhd", torch.einsum("qhd,khd->hqk", query, key).softmax(-1), value)

    def ours(*x: Tensor) -> Tensor:
        return varlen_attention(*x, cu_q, cu_k, scale=1.0, implementation="triton")

    mine = with_gradients(ours, [x.clone().requires_grad_() for x in narrow], upstream)
    plainly = with_gradients(explicit, [x.clone().requires_grad_() for x in narrow], upstream)
    exact = with_gradients(explicit, [x.double().requires_grad_() for x in narrow], upstream.double())
    for one, other, truth in zip(mine, plainly, exact, strict=True):
        unit = torch.finfo(dtype).eps * truth.abs().max()
        assert (one - truth).abs().max() <= 3 * (other - truth).abs().max() + unit


@pytest.mark.parametrize("causal", [False, True])
def test_scores_far_below_zero(causal: bool, device: str) -> None:
    """Numbers after the last key would have the weight exp(512), and must have none."""
    leaves, upstream, cu_q, cu_k = inputs((2, 2), 64, torch.bfloat16, device, ([5, 6], [7, 8]))
    with torch.no_grad():
        leaves[0].copy_(8 + leaves[0] / 8)
        leaves[1].copy_(leaves[1] / 8 - 8)

    def ours(*x: Tensor) -> Tensor:
        return varlen_attention(*x, cu_q, cu_k, causal=causal, scale=0.125, implementation="triton")

    mine = with_gradients(ours, leaves, upstream)
    plainly = with_gradients(lambda *x: eager(*x, ([5, 6], [7, 8]), causal, 0.125), leaves, upstream)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = with_gradients(lambda *x: eager(*x, ([5, 6], [7, 8]), causal, 0.125), wide, upstream)
    for one, other, truth in zip(mine, plainly, exact, strict=True):
        unit = torch.finfo(one.dtype).eps * truth.abs().max()
        assert (one - truth).abs().max() <= 3 * (other - truth).abs().max() + unit


def test_a_query_without_keys_changes_no_other_gradient(device: str) -> None:
    """Whatever it holds and whatever comes from above; and what new memory held reaches no result."""
    (query, key, value), upstream, cu_q, cu_k = inputs((2, 1), 64, torch.float16, device)
    blind = torch.zeros(len(query), dtype=torch.bool, device=device)
    blind[:17] = blind[107] = True
    with torch.no_grad():
        query[blind] = math.nan
    upstream[blind] = math.inf
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        out, statistics = FORWARD(query, key, value, cu_q, cu_k, True, 0.125)
        grads = BACKWARD(upstream, query, key, value, out, statistics, cu_q, cu_k, True, 0.125, True, True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not out[blind].any() and not statistics[:, blind].any() and not grads[0][blind].any()
    for x in (out, statistics, *grads):
        assert x.isfinite().all()
    seeing = [query[~blind].detach(), key.detach(), value.detach()]
    lengths = ([20, 0, 70, 0, 9], LENGTHS[1])
    leaves = [x.double().requires_grad_() for x in seeing]
    exact = with_gradients(lambda *x: eager(*x, lengths, True, 0.125), leaves, upstream[~blind].double())
    for one, truth in zip((out[~blind], grads[0][~blind], *grads[1:]), exact, strict=True):
        assert (one - truth).abs().max() < 4e-3 * truth.abs().max()


def test_a_query_without_keys_has_no_gradient_beside_infinite_or_nan_keys(device: str) -> None:
    """It shares its tile with queries that see them."""
    leaves, upstream, cu_q, cu_k = inputs((2, 1), 64, torch.float16, device, ([9], [4]))
    query, key, value = (x.detach() for x in leaves)
    key[2] = math.inf
    out, statistics = FORWARD(query, key, value, cu_q, cu_k, True, 0.125)
    grads = BACKWARD(upstream, query, key, value, out, statistics, cu_q, cu_k, True, 0.125, True, True)
    assert not out[:5].any() and not grads[0][:5].any()
    assert not out[-1].isfinite().all() and not grads[0][-1].isfinite().all()


@pytest.mark.parametrize(
    ("which", "bad", "causal"),
    [
        (0, math.nan, False),
        (1, math.nan, False),
        (2, math.nan, False),
        (0, math.inf, False),
        (1, -math.inf, False),
        (2, math.inf, False),
        (1, -math.inf, True),
    ],
)
def test_infinities_and_nan_go_where_the_reference_sends_them(
    which: int, bad: float, causal: bool, device: str
) -> None:
    leaves, upstream, cu_q, _ = inputs((2, 2), 64, torch.bfloat16, device, ([5, 6, 12], [5, 6, 12]))
    with torch.no_grad():
        for x in leaves:
            x.abs_()
        leaves[which][7, 1, 3] = bad
    mine, theirs = (
        with_gradients(
            lambda *x, name=name: varlen_attention(*x, cu_q, causal=causal, implementation=name), leaves, upstream
        )
        for name in ("triton", "reference")
    )
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one.isnan(), other.isnan()) and torch.equal(one.isposinf(), other.isposinf())
        assert torch.equal(one.isneginf(), other.isneginf())


def test_statistics(device: str) -> None:
    """Maximum and 1 / sum of a query's scores in base 2, apart."""
    (query, key, value), _, cu_q, cu_k = inputs((2, 2), 64, torch.bfloat16, device, ([4], [3]))
    _, statistics = FORWARD(query, key, value, cu_q, cu_k, False, 0.5)
    scores = 0.5 / math.log(2) * torch.einsum("qhd,khd->qhk", query.double(), key.double())
    maximum = scores.amax(2)
    exact = torch.stack([maximum, 1 / torch.exp2(scores - maximum[:, :, None]).sum(2)])
    assert statistics.dtype == torch.float32
    torch.testing.assert_close(statistics.double(), exact, rtol=4e-6, atol=4e-6)


def test_same_bits_in_any_order_of_programs(device: str, executor: Any) -> None:
    leaves, upstream, cu_q, cu_k = inputs((2, 1), 64, torch.float16, device)
    first, again = (
        with_gradients(
            lambda *x: varlen_attention(*x, cu_q, cu_k, causal=True, implementation="triton"), leaves, upstream
        )
        for _ in range(2)
    )
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_a_gradient_that_is_not_needed_is_not_computed(device: str, executor: Any) -> None:
    leaves, upstream, cu_q, cu_k = inputs((2, 1), 64, torch.float16, device)
    leaves = [x.detach() for x in leaves]
    out, statistics = FORWARD(*leaves, cu_q, cu_k, True, 0.125)
    every = BACKWARD(upstream, *leaves, out, statistics, cu_q, cu_k, True, 0.125, True, True)
    for need_query, need_key, kernel in ((True, False, "query_kernel"), (False, True, "key_kernel")):
        before = 0 if executor is None else len(executor)
        some = BACKWARD(upstream, *leaves, out, statistics, cu_q, cu_k, True, 0.125, need_query, need_key)
        for one, other, needed in zip(some, every, (need_query, need_key, need_key), strict=True):
            assert torch.equal(one, other) if needed else one.numel() == 0
        if executor is not None:
            assert [launch.name for launch in executor[before:]] == ["rows_kernel", kernel]


def test_empty_inputs_are_legal(device: str) -> None:
    for rows, rows_k, heads, width in ((0, 0, 2, 8), (0, 5, 2, 8), (5, 5, 0, 8), (5, 5, 2, 0)):
        query = torch.zeros(rows, heads, width, device=device)
        key = torch.ones(rows_k, max(heads, 1), width, device=device)
        cu_q, cu_k = cumulative([rows], device), cumulative([rows_k], device)
        out, statistics = FORWARD(query, key, key, cu_q, cu_k, False, 1.0)
        assert out.shape == query.shape and statistics.shape == (2, rows, heads) and not statistics.any()
        grads = BACKWARD(out, query, key, key, out, statistics, cu_q, cu_k, False, 1.0, True, True)
        assert [x.shape for x in grads] == [query.shape, key.shape, key.shape] and not any(x.any() for x in grads)


# Sequences that overlap write the same rows: a race between programs, of which nothing is asked but where it writes.
@pytest.mark.parametrize("executor", [{"race" if INTERPRETED else "global_race": False}], indirect=True)
@pytest.mark.parametrize(
    "boundaries",
    [
        [0, -5, 7, 10**9],
        [3, 9, 2**31 - 1, -(2**31)],
        [-(2**31), 2**31 - 1, 0, 0],
        [9, 9, 9, 9],
        [0, 2000, -2000, 50],  # the first tile is taken for one before the second sequence
    ],
)
def test_wrong_boundaries_stay_inside_the_tensors(executor: Any, boundaries: list[int], device: str) -> None:
    """On a GPU nobody looks at their values; the executors look at every address."""
    (query, key, value), upstream, _, _ = inputs((2, 1), 64, torch.float16, device, ([50], [40]))
    query, key, value = query.detach(), key.detach(), value.detach()
    wrong = torch.tensor(boundaries, dtype=torch.int32, device=device)
    right = cumulative([20, 10, 20], device)
    for cu_q, cu_k in ((wrong, wrong), (right, wrong)):
        out, statistics = FORWARD(query, key, value, cu_q, cu_k, True, 0.125)
        out, statistics = out.nan_to_num(), statistics.nan_to_num()
        BACKWARD(upstream, query, key, value, out, statistics, cu_q, cu_k, True, 0.125, True, True)
    out, statistics = FORWARD(query, key, value, wrong[:1], wrong[:1], True, 0.125)
    assert not out.any() and not statistics.any()
    with pytest.raises(ValueError, match=r"cu_seqlens_k must have shape \(4,\), got \(2,\)"):
        FORWARD(query, key, value, right, right[:2], True, 0.125)


def test_compiles_as_one_graph(device: str) -> None:
    leaves, upstream, cu_q, _ = inputs((2, 2), 64, torch.bfloat16, device, ([9, 20], [9, 20]))

    def run(query: Tensor, key: Tensor, value: Tensor, cu: Tensor) -> Tensor:
        return varlen_attention(query, key, value, cu, implementation="triton") * 2

    torch._dynamo.reset()
    one = torch.compile(run, fullgraph=True, backend="aot_eager")
    ours = with_gradients(lambda *x: one(*x, cu_q), leaves, upstream)
    for mine, plainly in zip(ours, with_gradients(lambda *x: run(*x, cu_q), leaves, upstream), strict=True):
        assert torch.equal(mine, plainly)


def test_opcheck(device: str) -> None:
    (query, key, value), upstream, cu_q, cu_k = inputs((2, 2), 64, torch.bfloat16, device, ([5, 6], [3, 4]))
    query, key, value = query.detach(), key.detach(), value.detach()
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(FORWARD.default, (query, key, value, cu_q, cu_k, False, 0.5), test_utils=tests)
    out, statistics = FORWARD(query, key, value, cu_q, cu_k, False, 0.5)
    for need in ((True, True), (True, False), (False, True)):
        given = (upstream, query, key, value, out, statistics, cu_q, cu_k, False, 0.5, *need)
        torch.library.opcheck(BACKWARD.default, given, test_utils=tests)


def test_each_unfit_call_gives_its_reason(device: str) -> None:
    x = torch.zeros(3, 1, 264, device=device)
    with pytest.raises(RuntimeError, match="'triton'.*head dimensions up to 256, not 264"):
        varlen_attention(x, x, x, cumulative([3], device), implementation="triton")
    x = torch.zeros(3, 1, 136, device=device)
    with pytest.raises(RuntimeError, match="'triton'.*head dimensions of float32 up to 128, not 136"):
        varlen_attention(x, x, x, cumulative([3], device), implementation="triton")
    x = torch.zeros(3, 1, 8, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match="'triton'.*no float64 enters its tensor cores"):
        varlen_attention(x, x, x, cumulative([3], device), implementation="triton")


def test_head_dimensions_are_one_block_or_two() -> None:
    expected = {
        1: (16, 0),
        16: (16, 0),
        24: (32, 0),
        40: (32, 16),
        48: (32, 16),
        64: (64, 0),
        72: (64, 16),
        80: (64, 16),
    }
    expected |= {
        88: (64, 32),
        96: (64, 32),
        112: (128, 0),
        128: (128, 0),
        160: (128, 32),
        192: (128, 64),
        256: (256, 0),
    }
    assert {size: head_blocks(size, torch.bfloat16) for size in expected} == expected
    assert all(size <= sum(head_blocks(size, torch.bfloat16)) < 1.5 * size for size in range(33, 257))
    assert head_blocks(80, torch.float32) == (64, 32) and head_blocks(40, torch.float32) == (64, 0)


# As in the kernels. Triton 3.6 fails to compile the search where one sequence is a constant.
@triton.jit(do_not_specialize=["sequences", "rows"])
def _own_tiles(cu_seqlens, found, sequences, rows, BLOCK: tl.constexpr):
    sequence, begin, length, first = own_tile(tl.program_id(0), cu_seqlens, sequences, rows, BLOCK)
    at = found + tl.program_id(0) * 4
    tl.store(at, sequence)
    tl.store(at + 1, begin)
    tl.store(at + 2, length)
    tl.store(at + 3, first)


@pytest.mark.parametrize("sequences", [1, 5, 257, pytest.param(1500, marks=pytest.mark.slow)])
def test_every_row_lies_in_one_tile(sequences: int, device: str) -> None:
    """One round of the search and several, a last one that is cut short."""
    torch.manual_seed(sequences)
    lengths = (torch.randint(0, 20, (sequences,)) * (torch.rand(sequences) < 0.6)).tolist()
    rows, block = sum(lengths), 32
    found = torch.empty(rows // block + sequences, 4, dtype=torch.int32, device=device)
    _own_tiles[(len(found),)](cumulative(lengths, device), found, sequences, rows, BLOCK=block, num_warps=4)
    begins = list(itertools.accumulate(lengths, initial=0))
    covered = []
    for sequence, begin, length, first in found.tolist():
        assert begin == begins[sequence] and length == lengths[sequence] and first >= 0
        covered.extend(range(begin + first, begin + min(first + block, length)))
    assert covered == list(range(rows))


@triton.jit
def _distance(x, to, row, stride, head, head_stride, VEC: tl.constexpr):
    there = head_of(x, row, stride, head, head_stride, VEC)
    tl.store(to, (there.to(tl.int64) - x.to(tl.int64)) // 2)


def test_addresses_beyond_32_bits(device: str) -> None:
    """2^20 rows of 3 x 16 heads of 128 numbers, and heads that lie far apart; nothing of it is allocated."""
    x, to = torch.zeros(1, dtype=torch.float16, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    for row, stride, head, head_stride in ((2**20 - 1, 6144 // 8, 15, 16), (5, 16, 31, 2**31 // 8 - 1), (0, 0, 0, 0)):
        _distance[(1,)](x, to, row, stride, head, head_stride, VEC=8, num_warps=1)
        assert to.item() == (row * stride + head * head_stride) * 8
    assert vector_of(torch.zeros(2, 2, 8).half(), torch.zeros(2, 2, 12).half()) == 1
    assert vector_of(torch.zeros(2, 2, 8).half()) == 8 and vector_of(torch.zeros(2, 2, 12)) == 4
