"""The flash kernels over padded batches, and with dropout, against the definition in float64 and plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oner_fast.ops import attention_dropout, padded_attention, varlen_attention

FORWARD, BACKWARD = torch.ops.oner_fast_triton.padded_attention, torch.ops.oner_fast_triton.padded_attention_backward
SEED = 2**63 + 12345


def inputs(
    heads: tuple[int, int], rows: int, keys: int, head_dim: int, dtype: torch.dtype, device: str, batch: int = 3
) -> tuple[list[Tensor], Tensor]:
    """query, key, value, with their heads beside each other; and the gradient from above."""
    torch.manual_seed(head_dim)
    shapes = [(rows, heads[0]), (keys, heads[1]), (keys, heads[1]), (rows, heads[0])]
    *leaves, upstream = (torch.randn(batch, *shape, head_dim, device=device).to(dtype) for shape in shapes)
    return [x.transpose(1, 2).requires_grad_() for x in leaves], upstream.transpose(1, 2)


def with_gradients(attend: Callable[..., Tensor], leaves: list[Tensor], upstream: Tensor) -> list[Tensor]:
    result = attend(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves, upstream.to(result.dtype), materialize_grads=True)]


def eager(
    query: Tensor, key: Tensor, value: Tensor, real: Tensor, causal: bool, kept: Tensor | None, scale: float | None
) -> Tensor:  # fmt: skip
    """Plain PyTorch in the dtype of the inputs."""
    groups, rows, keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    seen = real[:, None, None, :].expand(-1, 1, rows, -1)
    if causal:
        seen = seen & torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril(keys - rows)
    blind = ~seen.any(-1, keepdim=True)
    scores = ((query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT).masked_fill(
        ~(seen | blind), -math.inf
    )
    weights = scores.softmax(-1)
    if kept is not None:
        weights = (weights * attention_dropout.made_up(1 << 14)).masked_fill(~kept, 0.0)
    return (weights @ value).masked_fill(blind, 0.0)


def check(
    heads: tuple[int, int], sizes: tuple[int, int], head_dim: int, dtype: torch.dtype, device: str, *,
    causal: bool = False, masked: bool = False, dropout: bool = False, whole: bool = False,
    scale: float | None = None, change: Callable[[Tensor], Tensor] = lambda x: x,
) -> None:  # fmt: skip
    """At most twice (gradients three times) the error of plain PyTorch, plus a unit in the last place.

    `whole`: nothing is padding, and nothing is said about it.
    """
    rows, keys = sizes
    leaves, upstream = inputs(heads, rows, keys, head_dim, dtype, device)
    lengths = torch.tensor([keys] * 3 if whole else [keys, keys // 3, 0], device=device)
    real = torch.arange(keys, device=device) < lengths.unsqueeze(1)
    if masked:
        real[0] = torch.rand(keys, device=device) < 0.6
    options: dict[str, Any] = {"scale": scale}
    if not whole:
        options |= {"key_mask": real} if masked else {"key_lengths": lengths}
    kept = None
    if dropout:
        options |= {"dropout_p": 0.25, "dropout_seed": SEED}
        numbers, places = torch.arange(3, device=device), torch.arange(rows, device=device)
        seed = torch.tensor(SEED - (1 << 64), device=device)
        kept = attention_dropout.kept(seed, 1 << 14, numbers, heads[0], places, keys)
        place = (real.cumsum(1) - 1).clamp(min=0)
        kept = kept.gather(3, place[:, None, None, :].expand_as(kept))

    def ours(*x: Tensor) -> Tensor:
        return padded_attention(*(change(one) for one in x), causal=causal, implementation="triton", **options)

    mine = with_gradients(ours, leaves, change(upstream))
    plainly = with_gradients(lambda *x: eager(*x, real, causal, kept, scale), leaves, upstream)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = with_gradients(lambda *x: eager(*x, real, causal, kept, scale), wide, upstream)
    for index, (one, other, truth) in enumerate(zip(mine, plainly, exact, strict=True)):
        assert one.dtype == dtype and one.shape == truth.shape
        unit = torch.finfo(dtype).eps * truth.abs().max()
        error, allowed = (one - truth).abs(), (other - truth).abs()
        factor = 2 if index == 0 else 3
        assert error.max() <= factor * allowed.max() + unit, f"tensor {index}"
        assert error.square().mean().sqrt() <= factor * allowed.square().mean().sqrt() + unit, f"tensor {index}"


@pytest.mark.parametrize(
    ("heads", "sizes", "head_dim", "dtype", "options"),
    [
        ((2, 1), (70, 90), 64, torch.float16, {"causal": True}),
        ((2, 2), (37, 150), 64, torch.bfloat16, {}),
        ((2, 1), (90, 70), 64, torch.float16, {"causal": True, "masked": True, "dropout": True}),
        ((1, 1), (40, 40), 88, torch.bfloat16, {"dropout": True}),
        ((2, 1), (70, 90), 64, torch.float16, {"causal": True, "whole": True}),
        ((2, 1), (70, 90), 64, torch.float16, {"causal": True, "scale": 0.0}),
        pytest.param((2, 2), (37, 50), 64, torch.bfloat16, {"scale": -0.3}, marks=pytest.mark.slow_emulated),
        pytest.param((2, 2), (20, 33), 16, torch.float32, {"masked": True}, marks=pytest.mark.slow_emulated),
    ],
)
def test_error_against_float64(
    heads: tuple[int, int], sizes: tuple[int, int], head_dim: int, dtype: torch.dtype, options: dict[str, Any],
    device: str,
) -> None:  # fmt: skip
    check(heads, sizes, head_dim, dtype, device, **options)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [16, 40, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dropout", [False, True])
def test_every_head_dimension(head_dim: int, dtype: torch.dtype, dropout: bool, device: str) -> None:
    if dtype == torch.float32 and head_dim > 128:
        pytest.skip("float32 is served up to 128")
    check((2, 1), (150, 133), head_dim, dtype, device, causal=True, dropout=dropout)


@pytest.mark.parametrize(
    "change",
    [
        Tensor.contiguous,  # heads before rows
        lambda x: torch.stack([x, torch.full_like(x, math.nan)], 1)[:, 0],  # samples far apart
        pytest.param(lambda x: F.pad(x, (1, 0))[..., 1:], marks=pytest.mark.slow_emulated),  # nothing is aligned
        pytest.param(lambda x: x.mT.contiguous().mT, marks=pytest.mark.slow_emulated),  # numbers apart
    ],
)
def test_any_strides(change: Callable[[Tensor], Tensor], device: str) -> None:
    check((2, 1), (70, 90), 64, torch.float16, device, causal=True, change=change)


def test_what_padding_holds_changes_nothing(device: str) -> None:
    """Nor does what new memory held: every row of the results is written, and padding takes gradients of 0."""
    leaves, upstream = inputs((2, 2), 37, 150, 64, torch.bfloat16, device)
    lengths = torch.tensor([150, 20, 0], device=device)

    def ours(*x: Tensor) -> Tensor:
        return padded_attention(*x, key_lengths=lengths, implementation="triton")

    torch.use_deterministic_algorithms(True)
    expected = with_gradients(ours, leaves, upstream)
    unreal = torch.arange(150, device=device) >= lengths.unsqueeze(1)
    with torch.no_grad():
        for x, bad in ((leaves[1], math.nan), (leaves[2], math.inf)):
            x.transpose(1, 2)[unreal] = bad
    found = with_gradients(ours, leaves, upstream)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) and one.isfinite().all()
    assert not found[0][2].any() and not found[1][2].any()
    assert not any(x.transpose(1, 2)[unreal].any() for x in found[2:])


def test_a_query_that_sees_no_key_gives_zero_whatever_it_holds(device: str) -> None:
    """With 90 queries and 70 keys, the first 20 see none."""
    leaves, upstream = inputs((2, 1), 90, 70, 64, torch.float16, device)
    query, key, value = (x.detach() for x in leaves)
    lengths = torch.tensor([70, 23, 0], device=device)
    query[:, :, :20], upstream[:, :, :20] = math.nan, math.inf
    query[2], upstream[2] = math.nan, math.inf
    torch.use_deterministic_algorithms(True)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    found = with_gradients(
        lambda *x: padded_attention(*x, key_lengths=lengths, causal=True, implementation="triton"), leaves, upstream
    )
    for one in found:
        assert one.isfinite().all()
    for one in found[:2]:
        assert not one[:, :, :20].any() and not one[2].any() and one[0, :, 20:].any()


@pytest.mark.parametrize("packed", [False, True])
def test_the_weights_that_are_dropped(packed: bool, device: str) -> None:
    """Forward shows them where value j is the unit vector j, and the gradient of value where that of query i is."""
    heads, rows, keys, width = 2, 50, 60, 64
    kept = attention_dropout.kept(
        torch.tensor(SEED - (1 << 64), device=device), 1 << 14, torch.arange(2, device=device), heads,
        torch.arange(rows, device=device), keys,
    )  # fmt: skip
    query, key = (torch.zeros(2, heads, n, width, dtype=torch.float16, device=device) for n in (rows, keys))
    value, upstream = (torch.zeros_like(x) + torch.eye(x.shape[2], width, device=device) for x in (key, query))
    value = value.half().requires_grad_()
    options = {"dropout_p": 0.25, "dropout_seed": SEED, "implementation": "triton"}
    if packed:
        ends = [torch.tensor([0, n, 2 * n], device=device) for n in (rows, keys)]
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
        out = varlen_attention(*flat, *ends, **options).unflatten(0, (2, rows)).transpose(1, 2)
    else:
        out = padded_attention(query, key, value, **options)
    assert torch.equal(out[..., :keys] != 0, kept) and not out[..., keys:].any()
    (to_value,) = torch.autograd.grad(out, value, upstream.half())
    assert torch.equal(to_value[..., :rows] != 0, kept.mT)
    weight = 1 / keys / 0.75
    assert (out[..., :keys][kept] - weight).abs().max() < 1e-3 * weight + 2e-5


def test_a_gradient_that_is_not_needed_is_not_computed(device: str, executor: Any) -> None:
    leaves, upstream = inputs((2, 1), 70, 90, 64, torch.float16, device)
    query, key, value, grad = (x.detach().transpose(1, 2) for x in (*leaves, upstream))
    seen = torch.tensor([90, 30, 0], dtype=torch.int32, device=device)
    out, statistics = FORWARD(query, key, value, seen, 0.125)
    every = BACKWARD(grad, query, key, value, out, statistics, seen, 0.125, True, True)
    for need_query, need_key, kernel in ((True, False, "query_kernel"), (False, True, "key_kernel")):
        before = 0 if executor is None else len(executor)
        some = BACKWARD(grad, query, key, value, out, statistics, seen, 0.125, need_query, need_key)
        for one, other, needed in zip(some, every, (need_query, need_key, need_key), strict=True):
            assert torch.equal(one, other) if needed else one.numel() == 0
        if executor is not None:
            assert [launch.name for launch in executor[before:]] == ["rows_kernel", kernel]


def test_empty_inputs_are_legal(device: str) -> None:
    torch.use_deterministic_algorithms(True)  # new memory is NaN
    for batch, rows, keys, heads in ((0, 3, 4, 2), (2, 0, 5, 2), (2, 5, 0, 2), (2, 5, 5, 0)):
        query = torch.zeros(batch, rows, heads, 8, device=device)
        key = torch.ones(batch, keys, max(heads, 1), 8, device=device)
        out, statistics = FORWARD(query, key, key, None, 1.0)
        assert out.shape == query.shape and statistics.shape == (2, batch, rows, heads) and not statistics.any()
        grads = BACKWARD(out, query, key, key, out, statistics, None, 1.0, True, True)
        assert [x.shape for x in grads] == [query.shape, key.shape, key.shape] and not any(x.any() for x in grads)


@pytest.mark.parametrize("executor", [{"shuffle": 1}, {"shuffle": 2}], indirect=True, ids=["one", "another"])
def test_programs_may_run_in_any_order(executor: Any, device: str) -> None:
    check((2, 1), (70, 90), 64, torch.float16, device, causal=True)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow_emulated)])
def test_large_scores_and_numbers_that_are_not_finite(dtype: torch.dtype, device: str) -> None:
    """A softmax of one key, however large its score; a NaN in one sample stays there."""
    query = torch.zeros(2, 1, 5, 64, dtype=dtype, device=device)
    key, value = (
        torch.zeros(2, 1, 7, 64, dtype=dtype, device=device),
        torch.zeros_like(query)[:, :, :1].repeat(1, 1, 7, 1),
    )
    query[..., 0], key[:, :, 3, 0] = 100.0, 100.0
    value[:, :, 3] = 2.0
    key[1, 0, 6, 0] = math.nan
    leaves = [x.requires_grad_() for x in (query, key, value)]
    lengths = torch.tensor([7, 7], device=device)
    out, *found = with_gradients(
        lambda *x: padded_attention(*x, key_lengths=lengths, scale=100.0, implementation="triton"),
        leaves, torch.ones_like(query),
    )  # fmt: skip
    assert (out[0] == 2).all() and out[1].isnan().all()
    assert all(x[0].isfinite().all() for x in found)
    assert (found[2][0, 0, 3] == 5).all() and not found[2][0, 0, :3].any() and not found[0][0].any()


def test_wrong_counts_stay_inside_the_tensors(device: str) -> None:
    """On a GPU nobody looks at their values; the executors look at every address."""
    leaves, upstream = inputs((2, 1), 70, 90, 64, torch.float16, device)
    query, key, value, grad = (x.detach().transpose(1, 2) for x in (*leaves, upstream))
    large, small = 2**31 - 1, -(2**31)
    for seen in (
        torch.tensor([large, small, 91], dtype=torch.int32, device=device),
        torch.tensor([[large, small, 100, -1, 0, 5, 90] * 10] * 3, dtype=torch.int32, device=device),
    ):
        out, statistics = FORWARD(query, key, value, seen, 0.125)
        out, statistics = out.nan_to_num(), statistics.nan_to_num()
        BACKWARD(grad, query, key, value, out, statistics, seen, 0.125, True, True)


def test_compiles_as_one_graph(device: str) -> None:
    leaves, upstream = inputs((2, 2), 37, 150, 64, torch.bfloat16, device)
    lengths = torch.tensor([150, 20, 0], device=device)

    def run(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
        return padded_attention(query, key, value, key_lengths=lengths, implementation="triton") * 2

    torch._dynamo.reset()
    one = torch.compile(run, fullgraph=True, backend="aot_eager")
    ours = with_gradients(lambda *x: one(*x, lengths), leaves, upstream)
    for mine, plainly in zip(ours, with_gradients(lambda *x: run(*x, lengths), leaves, upstream), strict=True):
        assert torch.equal(mine, plainly)


def test_opcheck(device: str) -> None:
    leaves, upstream = inputs((2, 2), 37, 150, 64, torch.bfloat16, device)
    query, key, value, grad = (x.detach().transpose(1, 2) for x in (*leaves, upstream))
    seen, tests = torch.tensor([150, 20, 0], dtype=torch.int32, device=device), ("test_schema", "test_faketensor")
    torch.library.opcheck(FORWARD.default, (query, key, value, seen, 0.5), test_utils=tests)
    out, statistics = FORWARD(query, key, value, seen, 0.5)
    given = (grad, query, key, value, out, statistics, seen, 0.5, True, True)
    torch.library.opcheck(BACKWARD.default, given, test_utils=tests)
