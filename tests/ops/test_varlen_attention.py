from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from oner_fast import _extension
from oner_fast.ops import varlen_attention
from oner_fast.ops.implementations import implementations

EVERY = [name for name, one in implementations("varlen_attention").items() if not one.reasons_against("cpu")]
CAUSAL = [
    name for name, one in implementations("varlen_attention").items() if not one.reasons_against("cpu", causal=True)
]
compiled = pytest.mark.skipif(not _extension.status().loaded, reason=_extension.status().reason or "built")
REFUSED = (ValueError, RuntimeError)  # what a check in C++ raises: the first up to torch 2.13, the second in 2.15
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32)


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths_q: list[int],
    lengths_k: list[int],
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """One query of one head at a time."""
    _, heads, width = query.shape
    scale = width**-0.5 if scale is None else scale
    out = []
    begin_q = begin_k = 0
    for lq, lk in zip(lengths_q, lengths_k, strict=True):
        for i in range(begin_q, begin_q + lq):
            seen = max(lk - lq + (i - begin_q) + 1, 0) if causal else lk
            for h in range(heads):
                head = h * key.shape[1] // heads
                keys, values = key[begin_k : begin_k + seen, head], value[begin_k : begin_k + seen, head]
                weights = (scale * keys @ query[i, h]).softmax(0)
                out.append(weights @ values if seen else query[i, h] * 0)
        begin_q, begin_k = begin_q + lq, begin_k + lk
    return torch.stack(out).view_as(query) if out else query * 0


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def check(
    implementation: str, lengths_q: list[int], lengths_k: list[int] | None, heads: int, groups: int, **options: Any
) -> None:
    """Against the loop, forward and backward, in float64."""
    others = lengths_q if lengths_k is None else lengths_k
    query = numbers(sum(lengths_q), heads * groups, 4)
    key, value = numbers(sum(others), heads, 4), numbers(sum(others), heads, 4)
    cu_k = None if lengths_k is None else cumulative(lengths_k)
    ours = varlen_attention(query, key, value, cumulative(lengths_q), cu_k, implementation=implementation, **options)
    exact = plain(query, key, value, lengths_q, others, **options)
    assert ours.shape == query.shape and ours.dtype == torch.float64
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-13)
    upstream = torch.randn_like(exact)
    mine = torch.autograd.grad(ours, (query, key, value), upstream, materialize_grads=True)
    theirs = torch.autograd.grad(exact, (query, key, value), upstream, materialize_grads=True)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


lengths = st.lists(st.integers(0, 5), min_size=1, max_size=6)


@pytest.mark.parametrize("implementation", EVERY)
@given(lengths_q=lengths, heads=st.integers(1, 3), groups=st.integers(1, 2))
def test_keys_of_the_same_sequences(implementation: str, lengths_q: list[int], heads: int, groups: int) -> None:
    check(implementation, lengths_q, None, heads, groups)


@pytest.mark.parametrize("implementation", EVERY)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=6), groups=st.integers(1, 2)
)
def test_keys_of_other_sequences(implementation: str, pairs: list[tuple[int, int]], groups: int) -> None:
    check(implementation, [q for q, _ in pairs], [k for _, k in pairs], 2, groups, scale=0.7)


@pytest.mark.parametrize("implementation", CAUSAL)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=5), groups=st.integers(1, 2)
)
def test_causal_is_aligned_bottom_right(implementation: str, pairs: list[tuple[int, int]], groups: int) -> None:
    check(implementation, [q for q, _ in pairs], [k for _, k in pairs], 1, groups, causal=True)


@pytest.mark.parametrize("implementation", EVERY)
def test_sequences_of_equal_length_need_not_be_adjacent(implementation: str) -> None:
    """Sequences of one length are computed together; their rows must come back to their places."""
    check(implementation, [3, 2, 3, 2, 1, 3], None, 2, 1)
    check(implementation, [3, 2, 3, 2], [1, 4, 1, 2], 2, 1)


@pytest.mark.parametrize("implementation", EVERY)
def test_one_sequence_and_no_sequence(implementation: str) -> None:
    check(implementation, [7], None, 1, 1)
    nothing = torch.zeros(0, 2, 4)
    result = varlen_attention(nothing, nothing, nothing, cumulative([]), implementation=implementation)
    assert result.shape == (0, 2, 4)


@pytest.mark.parametrize("implementation", CAUSAL)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_a_query_that_sees_no_key_gives_zero_and_takes_no_gradient(implementation: str, dtype: torch.dtype) -> None:
    """With four queries and two keys, aligned at their ends, the first two queries see nothing."""
    query, key, value = numbers(4, 1, 4, dtype=dtype), numbers(2, 1, 4, dtype=dtype), numbers(2, 1, 4, dtype=dtype)
    result = varlen_attention(
        query, key, value, cumulative([4]), cumulative([2]), causal=True, implementation=implementation
    )
    assert torch.equal(result[:2], torch.zeros_like(result[:2])) and result[2:].abs().min() > 0
    to_query, to_key, to_value = torch.autograd.grad(result[:2].sum(), (query, key, value), retain_graph=True)
    assert not to_query.any() and not to_key.any() and not to_value.any()
    assert torch.equal(torch.autograd.grad(result.sum(), query)[0][:2], torch.zeros_like(result[:2]))


@pytest.mark.parametrize("implementation", EVERY)
def test_sequences_without_keys_give_zero_and_take_no_gradient(implementation: str) -> None:
    query, key, value = numbers(3, 2, 4), numbers(0, 2, 4), numbers(0, 2, 4)
    result = varlen_attention(query, key, value, cumulative([1, 2]), cumulative([0, 0]), implementation=implementation)
    assert torch.equal(result, torch.zeros_like(query))
    assert not torch.autograd.grad(result.sum(), query)[0].any()


@pytest.mark.parametrize("implementation", EVERY)
def test_sequences_do_not_see_each_other(implementation: str) -> None:
    query, key, value = (torch.randn(9, 2, 4) for _ in range(3))
    result = varlen_attention(query, key, value, cumulative([4, 5]), implementation=implementation)
    key[4:], value[4:], query[4:] = float("nan"), float("nan"), float("nan")
    again = varlen_attention(query, key, value, cumulative([4, 5]), implementation=implementation)
    assert torch.equal(result[:4], again[:4]) and again[4:].isnan().all()


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(implementation: str, causal: bool) -> None:
    if causal and implementation not in CAUSAL:
        pytest.skip(f"{implementation} does not serve causal masks")
    query, key, value = numbers(6, 2, 3), numbers(5, 1, 3), numbers(5, 1, 3)
    cu_q, cu_k = cumulative([2, 3, 0, 1]), cumulative([2, 1, 1, 1])
    assert torch.autograd.gradcheck(
        lambda *x: varlen_attention(*x, cu_q, cu_k, causal=causal, implementation=implementation), (query, key, value)
    )


def eager(
    query: Tensor, key: Tensor, value: Tensor, lengths_q: list[int], lengths_k: list[int], causal: bool, scale: float
) -> Tensor:
    """Plain PyTorch in the dtype of the inputs, a sequence at a time."""
    groups = query.shape[1] // key.shape[1]
    out = []
    for q, k, v in zip(query.split(lengths_q), key.split(lengths_k), value.split(lengths_k), strict=True):
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = (q * scale).transpose(0, 1) @ k.permute(1, 2, 0)
        if causal:
            unseen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(k.shape[0] - q.shape[0]).logical_not()
            scores = scores.masked_fill(unseen, -math.inf)
        out.append((scores.softmax(-1) @ v.transpose(0, 1)).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "causal"), [(0.125, False), (0.125, True), (100 / 64, False)])
def test_error_against_float64(implementation: str, dtype: torch.dtype, scale: float, causal: bool) -> None:
    """At most twice (gradients three times) that of plain PyTorch in the same dtype, plus a unit in the last place."""
    if implementation == "sdpa" and scale > 1:
        pytest.skip("PyTorch's fused attention is less exact at large scores")
    lengths_q, lengths_k = [9, 70, 1, 130, 33], [20, 70, 1, 150, 600]
    narrow = [numbers(sum(lengths_q), 4, 64, dtype=dtype), *(numbers(sum(lengths_k), 2, 64, dtype=dtype) for _ in "kv")]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    exact = eager(*wide, lengths_q, lengths_k, causal, scale)
    upstream = torch.randn_like(exact).to(dtype)
    results = []
    for result in (
        varlen_attention(
            *narrow, cumulative(lengths_q), cumulative(lengths_k), causal=causal, scale=scale,
            implementation=implementation,
        ),
        eager(*narrow, lengths_q, lengths_k, causal, scale),
        exact,
    ):  # fmt: skip
        assert result is exact or result.dtype == dtype
        leaves = wide if result is exact else narrow
        results.append([result.detach(), *torch.autograd.grad(result, leaves, upstream.to(result.dtype))])
    for index, (ours, plainly, truth) in enumerate(zip(*results, strict=True)):
        unit = torch.finfo(dtype).eps * truth.abs().max()
        error, allowed = (ours - truth).abs(), (plainly - truth).abs()
        factor = 2 if index == 0 else 3
        assert error.max() <= factor * allowed.max() + unit, f"tensor {index}"
        assert error.square().mean().sqrt() <= factor * allowed.square().mean().sqrt() + unit, f"tensor {index}"


@pytest.mark.parametrize("implementation", EVERY)
def test_extreme_scores_stay_exact(implementation: str) -> None:
    """Scores of thousands, where exp overflows: the softmax is one at the largest."""
    query = torch.tensor([[[1000.0]], [[-1000.0]]], dtype=torch.float32)
    key, value = torch.tensor([[[5.0]], [[-5.0]]]), torch.tensor([[[1.0]], [[2.0]]])
    result = varlen_attention(query, key, value, cumulative([2]), scale=1.0, implementation=implementation)
    assert result.flatten().tolist() == [1.0, 2.0]


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("size", [1e10, 1e19, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scores_of_any_size_that_the_dtype_holds(implementation: str, size: float, dtype: torch.dtype) -> None:
    """Scores from which rounding takes more than an exponential holds: the softmax is one at the largest."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(7, 2, 16, generator=generator).to(dtype) for _ in range(3))
    query = (query * size).requires_grad_()
    result = varlen_attention(query, key, value, cumulative([7]), implementation=implementation)
    largest = torch.einsum("qhd,khd->qhk", query.double(), key.double()).argmax(-1)
    expected = value.gather(0, largest.unsqueeze(-1).expand(-1, -1, 16))
    torch.testing.assert_close(result, expected)
    assert torch.autograd.grad(result.sum(), query)[0].isfinite().all()


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_to_its_dtype(implementation: str, dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(5, 2, 4) for _ in range(3))
    with torch.autocast("cpu", dtype=dtype):
        inside = varlen_attention(query, key, value, cumulative([2, 3]), implementation=implementation)
        mixed = varlen_attention(query.to(dtype), key, value, cumulative([2, 3]), implementation=implementation)
        wide = varlen_attention(
            query.double(), key.double(), value.double(), cumulative([2, 3]), implementation=implementation
        )
    cast = varlen_attention(
        query.to(dtype), key.to(dtype), value.to(dtype), cumulative([2, 3]), implementation=implementation
    )
    assert inside.dtype == mixed.dtype == dtype and wide.dtype == torch.float64
    assert torch.equal(inside, cast) and torch.equal(mixed, cast)


@pytest.mark.parametrize("implementation", EVERY)
def test_non_contiguous_inputs(implementation: str) -> None:
    """As the rows of one fused projection give them."""
    query, key, value = torch.randn(6, 3, 2, 4, dtype=torch.float64).unbind(1)
    assert not query.is_contiguous()
    ours = varlen_attention(query, key, value, cumulative([4, 2]), implementation=implementation)
    torch.testing.assert_close(ours, plain(query, key, value, [4, 2], [4, 2]), rtol=1e-12, atol=1e-13)
    turned = torch.randn(4, 2, 6, dtype=torch.float64).permute(2, 1, 0)
    ours = varlen_attention(turned, turned, turned, cumulative([4, 2]), implementation=implementation)
    torch.testing.assert_close(ours, plain(turned, turned, turned, [4, 2], [4, 2]), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("implementation", EVERY)
def test_maximum_lengths_do_not_change_the_result(implementation: str) -> None:
    query, key, value = (torch.randn(5, 2, 4) for _ in range(3))
    plainly = varlen_attention(query, key, value, cumulative([2, 3]), implementation=implementation)
    hinted = varlen_attention(
        query, key, value, cumulative([2, 3]), max_seqlen_q=64, max_seqlen_k=3, implementation=implementation
    )
    assert torch.equal(plainly, hinted)


@pytest.mark.parametrize("implementation", EVERY)
def test_same_bits_under_deterministic_algorithms(implementation: str) -> None:
    torch.use_deterministic_algorithms(True)
    inputs = tuple(numbers(40, 2, 8, dtype=torch.float32) for _ in range(3))
    seen = []
    for _ in range(2):
        result = varlen_attention(*inputs, cumulative([8, 3, 8, 3, 18]), implementation=implementation)
        seen.append([result.detach(), *torch.autograd.grad(result.square().sum(), inputs)])
    for first, again in zip(*seen, strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize("implementation", CAUSAL)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=4),
    width=st.integers(1, 70),
    groups=st.integers(1, 3),
    causal=st.booleans(),
    scale=st.sampled_from([None, 0.0, -0.3, 2.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    shift=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    implementation: str,
    pairs: list[tuple[int, int]],
    width: int,
    groups: int,
    causal: bool,
    scale: float | None,
    dtype: torch.dtype,
    shift: int,
    seed: int,
) -> None:
    """Odd widths and lengths, rows that lie apart from each other and begin at any address."""
    torch.manual_seed(seed)
    lengths_q, lengths_k = [q for q, _ in pairs], [k for _, k in pairs]

    def apart(rows: int, heads: int) -> Tensor:
        room = torch.randn(rows * heads * (2 * width + 1) + shift, dtype=torch.float64).to(dtype)
        return room[shift:].view(rows, heads, 2 * width + 1)[..., 1 : 1 + width].requires_grad_()

    query, key, value = apart(sum(lengths_q), 2 * groups), apart(sum(lengths_k), 2), apart(sum(lengths_k), 2)
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)
    upstream = torch.randn(query.shape, dtype=torch.float64).to(dtype)
    ours, theirs = (
        [result.detach(), *torch.autograd.grad(result, leaves, upstream.to(result.dtype), materialize_grads=True)]
        for leaves in ([query, key, value], [x.detach().double().requires_grad_() for x in (query, key, value)])
        for result in [
            varlen_attention(
                *leaves, cu_q, cu_k, causal=causal, scale=scale,
                implementation=implementation if leaves[0] is query else "reference",
            )
        ]
    )  # fmt: skip
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == dtype
        size = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance * size)


@compiled
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences(dtype: torch.dtype, causal: bool) -> None:
    """Several blocks of queries and of keys, where the running maximum grows and the gradients are divided."""
    lengths_q, lengths_k = [300, 1100], [1100, 520]
    query = torch.randn(sum(lengths_q), 2, 16, dtype=torch.float64) * torch.linspace(0.1, 3, 1400).view(-1, 1, 1)
    key, value = (torch.randn(sum(lengths_k), 1, 16, dtype=torch.float64) for _ in range(2))
    key = key * torch.linspace(0.1, 3, sum(lengths_k)).view(-1, 1, 1)
    narrow = [x.to(dtype).requires_grad_() for x in (query, key, value)]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)
    upstream = torch.randn_like(query).to(dtype)
    exact = varlen_attention(*wide, cu_q, cu_k, causal=causal, implementation="reference")
    truth = [exact.detach(), *torch.autograd.grad(exact, wide, upstream.double())]
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    seen = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        result = varlen_attention(*narrow, cu_q, cu_k, causal=causal, implementation="cpp")
        seen.append([result.detach(), *torch.autograd.grad(result, narrow, upstream)])
    for ours, exactly in zip(seen[0], truth, strict=True):
        assert (ours - exactly).abs().max() <= tolerance * exactly.abs().max()
    for other in seen[1:]:
        for first, again in zip(seen[0], other, strict=True):
            assert torch.equal(first, again)


@compiled
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_same_bits_with_any_threads(dtype: torch.dtype) -> None:
    lengths = [197, 40, 0, 237, 1, 33]
    inputs = tuple(numbers(sum(lengths), 3, 24, dtype=dtype) for _ in range(3))
    upstream = torch.randn(inputs[0].shape).to(dtype)
    seen = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        result = varlen_attention(*inputs, cumulative(lengths), implementation="cpp")
        seen.append([result.detach(), *torch.autograd.grad(result, inputs, upstream)])
    for other in seen[1:]:
        for first, again in zip(seen[0], other, strict=True):
            assert torch.equal(first, again)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_infinities_and_nan_go_where_the_reference_sends_them(dtype: torch.dtype, bad: float, which: int) -> None:
    inputs = [torch.randn(23, 2, 8).abs().to(dtype) for _ in range(3)]
    inputs[which][7, 1, 3] = bad
    cu = cumulative([5, 6, 12])
    leaves = [x.requires_grad_() for x in inputs]
    upstream = torch.randn(23, 2, 8).to(dtype)
    ours, theirs = (
        [result.detach(), *torch.autograd.grad(result, leaves, upstream)]
        for name in ("cpp", "reference")
        for result in [varlen_attention(*leaves, cu, implementation=name)]
    )
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.isnan(), other.isnan()) and torch.equal(one.isposinf(), other.isposinf())
        assert torch.equal(one.isneginf(), other.isneginf())


@compiled
def test_every_element_is_written() -> None:
    """Results filled with NaN first, as deterministic mode does with new memory, are the same."""
    lengths_q, lengths_k = [0, 3, 40, 2, 5], [4, 0, 40, 7, 5]
    for dtype in (torch.float64, *DTYPES):
        query, key, value = numbers(50, 2, 19, dtype=dtype), *(numbers(56, 1, 19, dtype=dtype) for _ in range(2))
        for causal in (False, True):
            torch.use_deterministic_algorithms(True)
            assert torch.utils.deterministic.fill_uninitialized_memory
            result = varlen_attention(
                query, key, value, cumulative(lengths_q), cumulative(lengths_k), causal=causal, implementation="cpp"
            )
            for x in (result, *torch.autograd.grad(result.sum(), (query, key, value))):
                assert x.isfinite().all()


@compiled
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_saves_the_inputs_the_result_and_one_number_a_row(dtype: torch.dtype) -> None:
    query, key, value = numbers(50, 4, 16, dtype=dtype), *(numbers(50, 2, 16, dtype=dtype) for _ in range(2))
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    cu = cumulative([20, 30])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = varlen_attention(query, key, value, cu, implementation="cpp")
    statistics = 2 * 50 * 4 * (8 if dtype == torch.float64 else 4)
    tensors = 2 * result.numel() + key.numel() + value.numel()
    assert sum(x.numel() * x.element_size() for x in saved) == tensors * dtype.itemsize + statistics + 3 * 4


@compiled
def test_a_gradient_that_is_not_needed_is_not_computed() -> None:
    inputs = tuple(numbers(9, 2, 5) for _ in range(3))
    cu = cumulative([4, 5])
    every = varlen_attention(*inputs, cu, implementation="cpp")
    upstream = torch.randn_like(every)
    expected = torch.autograd.grad(every, inputs, upstream)
    for i in range(3):
        some = varlen_attention(*(x if i == j else x.detach() for j, x in enumerate(inputs)), cu, implementation="cpp")
        assert torch.equal(torch.autograd.grad(some, inputs[i], upstream)[0], expected[i])
    statistics = torch.ones(2, 9, 2, dtype=torch.float64)
    raw = torch.ops.oner_fast.varlen_attention_backward
    detached = [x.detach() for x in inputs]
    to_query, to_key, to_value = raw(upstream, *detached, every.detach(), statistics, cu, None, False, 0.5, True, False)
    assert to_query.shape == every.shape and to_key.numel() == to_value.numel() == 0


@compiled
def test_opcheck() -> None:
    query, key, value = torch.randn(9, 4, 5), torch.randn(7, 2, 5), torch.randn(7, 2, 5)
    cu_q, cu_k = cumulative([4, 5]), cumulative([3, 4])
    op, back = torch.ops.oner_fast.varlen_attention.default, torch.ops.oner_fast.varlen_attention_backward.default
    torch.library.opcheck(op, (query, key, value, cu_q, cu_k, True, 0.5))
    torch.library.opcheck(op, (query, query, query, cu_q, None, False, 0.5))
    out, statistics = op(query, key, value, cu_q, cu_k, True, 0.5)
    for need in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(back, (query, query, key, value, out, statistics, cu_q, cu_k, True, 0.5, *need))


@compiled
def test_statistics() -> None:
    """Maximum and 1 / sum of a query's scores in base 2, apart; zeros for the query that sees no key."""
    query, key = torch.randn(4, 1, 8), torch.randn(3, 1, 8)
    for dtype in (torch.float64, *DTYPES):
        q, k = query.to(dtype), key.to(dtype)
        _, statistics = torch.ops.oner_fast.varlen_attention(q, k, k, cumulative([4]), cumulative([3]), True, 0.5)
        unseen = torch.ones(4, 3, dtype=torch.bool).tril(-1).logical_not()
        scores = (0.5 / math.log(2) * q[:, 0].double() @ k[:, 0].double().T).masked_fill(unseen, -math.inf)[1:]
        maximum = scores.amax(1)
        exact = torch.stack([maximum, 1 / torch.exp2(scores - maximum[:, None]).sum(1)])
        assert statistics.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not statistics[:, 0].any()
        torch.testing.assert_close(statistics[:, 1:, 0].double(), exact, rtol=4e-6, atol=2e-6)


@compiled
@pytest.mark.parametrize("size", [100.0, 5000.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_large_scores(size: float, dtype: torch.dtype) -> None:
    """Settled rows and rows torn between two equal keys: the weights of backward are those of forward."""
    generator = torch.Generator().manual_seed(3)
    direction = F.normalize(torch.randn(64, generator=generator), dim=0)
    query = (size**0.5 * direction).expand(48, 2, 64) * torch.linspace(0.9, 1.1, 48)[:, None, None]
    key = (size**0.5 * direction).expand(300, 2, 64) * torch.rand(300, 1, 1, generator=generator)
    key = torch.cat([key, key[key[:, 0, 0].abs().argmax()].unsqueeze(0)])
    inputs = [x.to(dtype) for x in (query, key, torch.randn(301, 2, 64, generator=generator))]
    upstream = torch.randn(48, 2, 64, generator=generator).to(dtype)
    cu_q, cu_k = cumulative([48]), cumulative([301])

    def explicit(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.einsum("hqk,khd->qhd", torch.einsum("qhd,khd->hqk", query, key).softmax(-1), value)

    def compiled_op(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return varlen_attention(query, key, value, cu_q, cu_k, scale=1.0, implementation="cpp")

    def gradients(attend: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        return torch.autograd.grad(attend(*leaves), leaves, upstream.to(dtype))

    exact = gradients(explicit, torch.float64)
    for mine, theirs, truth in zip(gradients(compiled_op, dtype), gradients(explicit, dtype), exact, strict=True):
        unit = torch.finfo(dtype).eps * truth.abs().max().item()
        error, allowed = (mine.double() - truth).abs().max(), (theirs.double() - truth).abs().max()
        assert error <= 3 * allowed + unit


@compiled
def test_a_query_without_keys_changes_no_other_gradient() -> None:
    """Whatever it holds and whatever comes from above."""
    query, key, value = numbers(7, 2, 5), numbers(4, 2, 5), numbers(4, 2, 5)
    cu_q, cu_k = cumulative([5, 2]), cumulative([3, 1])
    upstream = torch.randn(7, 2, 5, dtype=torch.float64)
    blind = torch.tensor([True, True, False, False, False, True, False])
    with torch.no_grad():
        query[blind] = math.nan
    upstream[blind] = math.inf
    result = varlen_attention(query, key, value, cu_q, cu_k, causal=True, implementation="cpp")
    to_query, to_key, to_value = torch.autograd.grad(result, (query, key, value), upstream)
    assert not result[blind].any() and not to_query[blind].any()
    seeing = query[~blind].detach().requires_grad_()
    alone = varlen_attention(seeing, key, value, cumulative([3, 1]), cu_k, causal=True, implementation="reference")
    expected = torch.autograd.grad(alone, (seeing, key, value), upstream[~blind])
    torch.testing.assert_close(result[~blind], alone)
    torch.testing.assert_close((to_query[~blind], to_key, to_value), expected)


@compiled
def test_raw_op_refuses_a_gradient() -> None:
    query = numbers(4, 1, 2)
    raw = torch.ops.oner_fast.varlen_attention
    with pytest.raises(RuntimeError, match=r"derivative of torch.ops.oner_fast.varlen_attention is not implemented"):
        raw(query, query, query, cumulative([4]), None, False, 1.0)
    with torch.no_grad():
        assert not raw(query, query, query, cumulative([4]), None, False, 1.0)[0].requires_grad


@compiled
def test_the_raw_op_stays_in_its_tensors() -> None:
    """Under torch.compile no value is checked in Python, so the compiled op must never leave its tensors."""
    op = torch.ops.oner_fast.varlen_attention
    x, cu = torch.randn(4, 2, 3), cumulative([4])
    with pytest.raises(REFUSED, match="cu_seqlens_q must begin with 0 and end with 4, got 0 and 9"):
        op(x, x, x, cumulative([9]), None, False, 1.0)
    with pytest.raises(REFUSED, match="cu_seqlens_q must never decrease"):
        op(x, x, x, torch.tensor([0, 6, 4], dtype=torch.int32), None, False, 1.0)
    with pytest.raises(REFUSED, match=r"cu_seqlens_k must have shape \(2,\) like cu_seqlens_q, got \[3\]"):
        op(x, x, x, cu, cumulative([1, 3]), False, 1.0)
    with pytest.raises(REFUSED, match="cu_seqlens_q must be int32"):
        op(x, x, x, cu.long(), None, False, 1.0)
    with pytest.raises(REFUSED, match="must divide the 2 heads"):
        op(x, x[:, :0], x[:, :0], cu, None, False, 1.0)
    with pytest.raises(REFUSED, match=r"value must have shape \[4, 2, 3\], got \[3, 2, 3\]"):
        op(x, x, x[:3], cu, None, False, 1.0)
    back, statistics = torch.ops.oner_fast.varlen_attention_backward, torch.zeros(2, 4, 2)
    with pytest.raises(REFUSED, match=r"statistics must have shape \[2, 4, 2\], got \[4, 2\]"):
        back(x, x, x, x, x, statistics[0], cu, None, False, 1.0, True, True)
    with pytest.raises(REFUSED, match="the gradient must have shape"):
        back(x[:2], x, x, x, x, statistics, cu, None, False, 1.0, True, True)


@compiled
def test_compiles_as_one_graph() -> None:
    inputs = tuple(numbers(9, 2, 4, dtype=torch.float32) for _ in range(3))
    cu = cumulative([4, 5])

    def run(query: Tensor, key: Tensor, value: Tensor, cu: Tensor) -> Tensor:
        return varlen_attention(query, key, value, cu, causal=True, implementation="cpp") * 2

    torch._dynamo.reset()
    ours = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs, cu)
    theirs = run(*inputs, cu)
    upstream = torch.randn_like(theirs)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream)
    )


@pytest.mark.parametrize(("lengths_q", "lengths_k"), [([5], [5]), ([7, 2], [3, 6]), ([0, 3], [4, 0])])
@pytest.mark.parametrize("scale", [None, 0.0, -0.5])
def test_sdpa_aligns_causal_masks_at_the_ends(
    monkeypatch: pytest.MonkeyPatch, lengths_q: list[int], lengths_k: list[int], scale: float | None
) -> None:
    """With a mask, and with the padding that long sequences take in its place."""
    query, key, value = (
        torch.randn(sum(lengths), heads, 4, dtype=torch.float64).requires_grad_()
        for lengths, heads in ((lengths_q, 4), (lengths_k, 2), (lengths_k, 2))
    )
    arguments = (query, key, value, cumulative(lengths_q), cumulative(lengths_k))
    upstream = torch.randn(query.shape, dtype=torch.float64)
    module = sys.modules[varlen_attention.__module__]
    for name, largest in (("reference", 0), ("sdpa", 1 << 20), ("sdpa", 0)):
        monkeypatch.setattr(module, "_LARGEST_MASK", largest)
        result = varlen_attention(*arguments, causal=True, scale=scale, implementation=name)
        found = [result.detach(), *torch.autograd.grad(result, arguments[:3], upstream, materialize_grads=True)]
        if name == "reference":
            expected = found
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


Q, KV = torch.zeros(6, 4, 8), torch.zeros(5, 2, 8)
CU, CU_K = cumulative([2, 4]), cumulative([1, 4])
WRONG: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "query must be a torch.Tensor, got list", {"query": [0.0]}),
    (TypeError, "query must be float32.*got torch.int64", {"query": Q.long()}),
    (ValueError, r"query must have shape \(T, H, Dh\).*got \(6, 32\)", {"query": Q.flatten(1)}),
    (TypeError, "key must have dtype torch.float32.*got torch.float16", {"key": KV.half()}),
    (ValueError, r"key must have shape \(Tk, Hk, Dh\) = \(\*, \*, 8\), got \(5, 2, 4\)", {"key": KV[..., :4]}),
    (TypeError, "value must have dtype torch.float32", {"value": KV.double()}),
    (ValueError, r"value must have shape.*= \(5, 2, 8\), got \(4, 2, 8\)", {"value": KV[:4]}),
    (
        ValueError,
        "must divide the 4 heads of query, got 3",
        {"key": torch.zeros(5, 3, 8), "value": torch.zeros(5, 3, 8)},
    ),
    (ValueError, "must divide the 4 heads of query, got 0", {"key": KV[:, :0], "value": KV[:, :0]}),
    (TypeError, "scale must be a number, got str", {"scale": "1"}),
    (TypeError, "cu_seqlens_q must be a torch.Tensor, got list", {"cu_seqlens_q": [0, 6]}),
    (TypeError, "cu_seqlens_q must be int32 or int64, got torch.int16", {"cu_seqlens_q": CU.short()}),
    (ValueError, r"cu_seqlens_q must have shape \(B \+ 1,\), got \(\)", {"cu_seqlens_q": CU[0]}),
    (ValueError, "cu_seqlens_q must begin with 0, got 1", {"cu_seqlens_q": CU + 1}),
    (ValueError, "cu_seqlens_q must never decrease", {"cu_seqlens_q": CU[[0, 2, 1]]}),
    (ValueError, "cu_seqlens_q must end with.*, 6, got 5", {"cu_seqlens_q": cumulative([1, 4])}),
    (ValueError, r"cu_seqlens_k must have shape \(B \+ 1,\) = \(3,\), got \(2,\)", {"cu_seqlens_k": CU_K[:2]}),
    (ValueError, "cu_seqlens_k must end with.*, 5, got 6", {"cu_seqlens_k": CU}),
    (ValueError, r"cu_seqlens_q \(which bounds key too\) must end with.*, 5, got 6", {"cu_seqlens_k": None}),
    (ValueError, "key is on meta but query is on cpu", {"key": KV.to("meta")}),
    (ValueError, "no implementation 'fast'", {"implementation": "fast"}),
]


@pytest.mark.parametrize(("error", "message", "arguments"), WRONG)
@pytest.mark.parametrize("implementation", EVERY)
def test_errors_name_the_bad_argument(
    implementation: str, error: type[Exception], message: str, arguments: dict[str, Any]
) -> None:
    given = {"query": Q, "key": KV, "value": KV, "cu_seqlens_q": CU, "cu_seqlens_k": CU_K}
    with pytest.raises(error, match=message):
        varlen_attention(**{**given, "implementation": implementation, **arguments})
