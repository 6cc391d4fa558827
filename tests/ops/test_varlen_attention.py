from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from oner_fast.ops import reference, varlen_attention
from oner_fast.ops.implementations import implementations

EVERY = [name for name, one in implementations("varlen_attention").items() if not one.reasons_against("cpu")]
CAUSAL = [
    name for name, one in implementations("varlen_attention").items() if not one.reasons_against("cpu", causal=True)
]
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
def test_own_keys(implementation: str, lengths_q: list[int], heads: int, groups: int) -> None:
    check(implementation, lengths_q, None, heads, groups)


@pytest.mark.parametrize("implementation", EVERY)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=6), groups=st.integers(1, 2)
)
def test_other_keys(implementation: str, pairs: list[tuple[int, int]], groups: int) -> None:
    check(implementation, [q for q, _ in pairs], [k for _, k in pairs], 2, groups, scale=0.7)


@pytest.mark.parametrize("implementation", CAUSAL)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=5), groups=st.integers(1, 2)
)
def test_causal_is_aligned_bottom_right(implementation: str, pairs: list[tuple[int, int]], groups: int) -> None:
    check(implementation, [q for q, _ in pairs], [k for _, k in pairs], 1, groups, causal=True)


@pytest.mark.parametrize("implementation", EVERY)
def test_equal_lengths_apart_from_each_other(implementation: str) -> None:
    """Sequences of one length are computed together; their rows must come back to their places."""
    check(implementation, [3, 2, 3, 2, 1, 3], None, 2, 1)
    check(implementation, [3, 2, 3, 2], [1, 4, 1, 2], 2, 1)


@pytest.mark.parametrize("implementation", EVERY)
def test_one_sequence_and_none(implementation: str) -> None:
    check(implementation, [7], None, 1, 1)
    nothing = torch.zeros(0, 2, 4)
    result = varlen_attention(nothing, nothing, nothing, cumulative([]), implementation=implementation)
    assert result.shape == (0, 2, 4)


@pytest.mark.parametrize("implementation", CAUSAL)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_a_blind_query_gives_zero_and_takes_no_gradient(implementation: str, dtype: torch.dtype) -> None:
    """Of four queries over two keys, aligned bottom-right, the first two see nothing."""
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


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_low_precision_inputs_have_float32_statistics(implementation: str, dtype: torch.dtype) -> None:
    """The result is the exact one rounded to ``dtype``, and so are the gradients, within a unit in the last place."""
    sizes = [9, 17, 1, 17]
    narrow = [numbers(sum(sizes), 2, 16, dtype=dtype) for _ in range(3)]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    ours = varlen_attention(*narrow, cumulative(sizes), implementation=implementation)
    exact = plain(*wide, sizes, sizes)
    assert ours.dtype == dtype
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(ours.double(), exact, rtol=max(unit, 1e-5), atol=2e-6)
    upstream = torch.randn_like(exact).to(dtype)
    mine = torch.autograd.grad(ours, narrow, upstream)
    theirs = torch.autograd.grad(exact, wide, upstream.double())
    for one, other in zip(mine, theirs, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=max(unit, 1e-4), atol=1e-5)


@pytest.mark.parametrize("implementation", EVERY)
def test_extreme_scores(implementation: str) -> None:
    """Scores of thousands, where exp overflows: the softmax is one at the largest."""
    query = torch.tensor([[[1000.0]], [[-1000.0]]], dtype=torch.float32)
    key, value = torch.tensor([[[5.0]], [[-5.0]]]), torch.tensor([[[1.0]], [[2.0]]])
    result = varlen_attention(query, key, value, cumulative([2]), scale=1.0, implementation=implementation)
    assert result.flatten().tolist() == [1.0, 2.0]


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
def test_maxima_are_hints_only(implementation: str) -> None:
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


def test_sdpa_leaves_causal_masks_to_others() -> None:
    query = torch.randn(3, 1, 4)
    with pytest.raises(RuntimeError, match="'sdpa'.*cannot serve this call: causal masks"):
        varlen_attention(query, query, query, cumulative([3]), causal=True, implementation="sdpa")
    served = varlen_attention(query, query, query, cumulative([3]), causal=True)
    defined = reference.varlen_attention(query, query, query, cumulative([3]), causal=True)
    torch.testing.assert_close(served, defined)


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
    (TypeError, "cu_seqlens_q must be int32, got torch.int64", {"cu_seqlens_q": CU.long()}),
    (ValueError, r"cu_seqlens_q must have shape \(B \+ 1,\), got \(\)", {"cu_seqlens_q": CU[0]}),
    (ValueError, "cu_seqlens_q must begin with 0, got 1", {"cu_seqlens_q": CU + 1}),
    (ValueError, "cu_seqlens_q must never decrease", {"cu_seqlens_q": CU[[0, 2, 1]]}),
    (ValueError, "cu_seqlens_q must end with.*, 6, got 5", {"cu_seqlens_q": cumulative([1, 4])}),
    (ValueError, r"cu_seqlens_k must have shape \(B \+ 1,\) = \(3,\), got \(2,\)", {"cu_seqlens_k": CU_K[:2]}),
    (ValueError, "cu_seqlens_k must end with.*, 5, got 6", {"cu_seqlens_k": CU}),
    (ValueError, r"cu_seqlens_q \(which serves key too\) must end with.*, 5, got 6", {"cu_seqlens_k": None}),
    (ValueError, "key is on meta but query is on cpu", {"key": KV.to("meta")}),
    (ValueError, "no implementation 'fast'", {"implementation": "fast"}),
]


@pytest.mark.parametrize(("error", "message", "arguments"), WRONG)
@pytest.mark.parametrize("implementation", EVERY)
def test_bad_arguments_are_named(
    implementation: str, error: type[Exception], message: str, arguments: dict[str, Any]
) -> None:
    given = {"query": Q, "key": KV, "value": KV, "cu_seqlens_q": CU, "cu_seqlens_k": CU_K}
    with pytest.raises(error, match=message):
        varlen_attention(**{**given, "implementation": implementation, **arguments})
