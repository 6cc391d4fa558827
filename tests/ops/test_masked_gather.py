from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from oner_fast import _extension
from oner_fast.ops import masked_gather, reference

compiled = pytest.mark.skipif(not _extension.status().loaded, reason=_extension.status().reason or "built")
REFUSED = (ValueError, RuntimeError)  # what a check in C++ raises: the first up to torch 2.13, the second in 2.15
EVERY = ["reference", "portable", pytest.param("cpp", marks=compiled)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(
    samples: int = 3,
    cells: int = 7,
    width: int = 37,
    kept: int = 5,
    prefix: int = 2,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tokens, kept, positions, prefix; the three tensors with numbers require gradients."""
    numbers = [torch.randn(size, dtype=dtype) for size in ((samples, cells, width), (cells, width), (prefix, width))]
    indices = torch.randint(cells, (samples, kept)) if cells else torch.zeros(samples, 0, dtype=torch.int64)
    tokens, positions, front = (x.requires_grad_() for x in numbers)
    return tokens, indices, positions, front


def plain(tokens: Tensor, kept: Tensor, positions: Tensor | None, prefix: Tensor | None, starts: list[int]) -> Tensor:
    """Row by row, in a loop that shares nothing with the library; packed."""
    rows = []
    for b, (first, last) in enumerate(itertools.pairwise(starts)):
        rows += [] if prefix is None else list(prefix)
        for n in kept.flatten()[first:last].tolist():
            rows.append(tokens[b, n] if positions is None else tokens[b, n] + positions[n])
    return torch.stack(rows) if rows else tokens.new_zeros(0, tokens.shape[2])


def gradients(result: Tensor, inputs: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(result, inputs, upstream)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("with_positions", [True, False])
@pytest.mark.parametrize("with_prefix", [True, False])
def test_fixed_samples_agree_with_a_plain_loop(implementation: str, with_positions: bool, with_prefix: bool) -> None:
    tokens, kept, positions, prefix = make()
    place, front = positions if with_positions else None, prefix if with_prefix else None
    result = masked_gather(tokens, kept, place, front, implementation=implementation)
    expected = plain(tokens, kept, place, front, [0, 5, 10, 15]).view(result.shape)
    assert isinstance(result, Tensor)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    upstream = torch.randn_like(result)
    inputs = tuple(x for x in (tokens, place, front) if x is not None)
    for ours, theirs in zip(gradients(result, inputs, upstream), gradients(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("implementation", EVERY)
def test_ragged_samples_agree_with_a_plain_loop(implementation: str) -> None:
    tokens, _, positions, prefix = make(samples=4)
    starts = [0, 3, 3, 4, 12]
    kept, cu_seqlens = torch.randint(7, (12,)), torch.tensor(starts, dtype=torch.int32)
    packed, cu_out = masked_gather(
        tokens, kept, positions, prefix, cu_seqlens=cu_seqlens, implementation=implementation
    )
    assert cu_out.dtype == torch.int32 and cu_out.tolist() == [0, 5, 7, 10, 20]
    expected = plain(tokens, kept, positions, prefix, starts)
    torch.testing.assert_close(packed, expected, rtol=0, atol=0)
    upstream, inputs = torch.randn_like(packed), (tokens, positions, prefix)
    for ours, theirs in zip(gradients(packed, inputs, upstream), gradients(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("implementation", EVERY)
def test_gradcheck(implementation: str) -> None:
    tokens, kept, positions, prefix = make(2, 4, 3, 6, 1)
    assert torch.autograd.gradcheck(
        lambda *x: masked_gather(x[0], kept, x[1], x[2], implementation=implementation), (tokens, positions, prefix)
    )
    flat, cu_seqlens = torch.tensor([3, 0, 3, 3, 1]), torch.tensor([0, 1, 5], dtype=torch.int32)
    assert torch.autograd.gradcheck(
        lambda *x: masked_gather(x[0], flat, x[1], x[2], cu_seqlens=cu_seqlens, implementation=implementation)[0],
        (tokens, positions, prefix),
    )


def _worst(error: Tensor) -> float:
    return float(error.detach().abs().max())


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_near_that_of_plain_pytorch(dtype: torch.dtype) -> None:
    """At most twice (gradients three times) plain PyTorch's error against float64, and one unit in the last place."""
    tokens, kept, positions, prefix = make(5, 9, 130, 20, 1, dtype)
    inputs = (tokens, positions, prefix)
    wide = tuple(x.detach().double().requires_grad_() for x in inputs)
    exact = reference.masked_gather(wide[0], kept, wide[1], wide[2])
    upstream = torch.randn(exact.shape).to(dtype)
    exact_gradients = gradients(exact, wide, upstream.double())
    ours = masked_gather(tokens, kept, positions, prefix, implementation="cpp")
    theirs = reference.masked_gather(tokens, kept, positions, prefix)
    assert isinstance(ours, Tensor) and isinstance(theirs, Tensor)
    unit = torch.finfo(dtype).eps
    assert _worst(ours.double() - exact) <= 2 * _worst(theirs.double() - exact) + unit * _worst(exact)
    for mine, other, truth in zip(
        gradients(ours, inputs, upstream), gradients(theirs, inputs, upstream), exact_gradients, strict=True
    ):
        assert mine.dtype == dtype
        assert _worst(mine.double() - truth) <= 3 * _worst(other.double() - truth) + unit * _worst(truth)
        # The sums are float32 and rounded once: half a unit, whatever their length.
        assert bool(((mine.double() - truth).abs() <= unit * truth.abs() + 20 * 2.0**-23).all())


@compiled
@given(
    samples=st.integers(0, 4), cells=st.integers(0, 6), width=st.integers(0, 70), kept=st.integers(0, 9),
    prefix=st.integers(0, 3), ragged=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
@example(samples=2, cells=3, width=4, kept=2, prefix=0, ragged=True, seed=0)
def test_any_shape(samples: int, cells: int, width: int, kept: int, prefix: int, ragged: bool, seed: int) -> None:
    torch.manual_seed(seed)
    kept = kept if cells else 0
    tokens, indices, positions, front = make(samples, cells, width, kept, prefix)
    cu_seqlens = None
    if ragged:
        lengths = torch.randint(0, kept + 1, (samples,))
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        indices = torch.randint(max(cells, 1), (int(starts[-1]),))
        cu_seqlens = starts.int()
    inputs = (tokens, positions, front)

    def outcome(implementation: str) -> tuple[Any, ...]:
        result = masked_gather(tokens, indices, positions, front, cu_seqlens=cu_seqlens, implementation=implementation)
        values, boundaries = result if isinstance(result, tuple) else (result, None)
        weights = torch.linspace(-1, 1, values.numel(), dtype=values.dtype).view_as(values)
        return values, boundaries, *gradients(values, inputs, weights)

    for ours, theirs in zip(outcome("cpp"), outcome("reference"), strict=True):
        if ours is None:
            assert theirs is None
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_and_misaligned_memory(dtype: torch.dtype) -> None:
    tokens, kept, positions, prefix = (x.detach() for x in make(3, 8, 16, 5, 1, dtype))
    expected = reference.masked_gather(tokens, kept, positions, prefix)

    def strange(x: Tensor) -> list[Tensor]:
        behind = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
        wider = torch.empty(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype)[..., 2:-1].copy_(x)
        turned = x.transpose(0, -1).contiguous().transpose(0, -1)
        return [behind, wider, turned, x.repeat_interleave(2, dim=-1)[..., ::2]]

    for t, p, f in zip(strange(tokens), strange(positions), strange(prefix), strict=True):
        for k in (kept, kept.t().contiguous().t()):
            result = masked_gather(t, k, p, f, implementation="cpp")
            torch.testing.assert_close(result, expected, rtol=0, atol=0)
    shared = tokens[:1].expand(3, -1, -1)
    torch.testing.assert_close(
        masked_gather(shared, kept, implementation="cpp"), reference.masked_gather(shared, kept), rtol=0, atol=0
    )


@compiled
def test_upstream_gradient_of_any_stride() -> None:
    tokens, kept, positions, prefix = make()
    for reduce in (
        lambda x: x.sum(),
        lambda x: x.transpose(1, 2).contiguous().square().sum(),
        lambda x: x[:, ::2].sum(),
    ):
        ours = torch.autograd.grad(reduce(masked_gather(tokens, kept, positions, prefix, implementation="cpp")), tokens)
        theirs = torch.autograd.grad(reduce(reference.masked_gather(tokens, kept, positions, prefix)), tokens)
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_number_survives_a_copy(dtype: torch.dtype) -> None:
    """Adding 0 changes no finite number, infinity or NaN: every bit pattern of the half types."""
    if dtype in (torch.float16, torch.bfloat16):
        numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    else:
        numbers = torch.tensor([0.0, -0.0, 1e-310, 1e-42, 3.4e38, math.inf, -math.inf, math.nan], dtype=dtype)
    tokens = numbers.view(1, 1, -1)
    zeros = torch.zeros(1, numbers.numel(), dtype=dtype)
    kept = torch.zeros(1, 1, dtype=torch.int64)
    result = masked_gather(tokens, kept, zeros, implementation="cpp")
    assert isinstance(result, Tensor)
    torch.testing.assert_close(result.flatten(), numbers, rtol=0, atol=0, equal_nan=True)
    doubled = masked_gather(tokens, kept, numbers.view(1, -1), implementation="cpp")
    assert isinstance(doubled, Tensor)
    torch.testing.assert_close(doubled.flatten(), numbers + numbers, rtol=0, atol=0, equal_nan=True)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_with_any_threads_under_deterministic_algorithms(dtype: torch.dtype) -> None:
    torch.use_deterministic_algorithms(True)
    tokens, kept, positions, prefix = make(6, 5, 200, 40, 1, dtype)
    upstream = torch.randn(6, 41, 200).to(dtype)
    seen = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        result = masked_gather(tokens, kept, positions, prefix, implementation="cpp")
        assert isinstance(result, Tensor)
        seen.append([result.detach(), *gradients(result, (tokens, positions, prefix), upstream)])
    for other in seen[1:]:
        for first, again in zip(seen[0], other, strict=True):
            assert torch.equal(first, again)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_positions", [True, False])
def test_large_results_bypass_the_cache_with_the_same_bits(dtype: torch.dtype, with_positions: bool) -> None:
    """More than 4 MiB, rows at addresses that no vector divides; sample by sample, each is written the other way."""
    tokens, kept, positions, prefix = make(32, 70, 1029, 67, 1, dtype)
    place = positions if with_positions else None
    everything = masked_gather(tokens, kept, place, prefix, implementation="cpp")
    assert everything.numel() * everything.element_size() > 4 << 20
    upstream = torch.randn_like(everything)
    (to_tokens,) = torch.autograd.grad(everything, tokens, upstream)
    for b in range(32):
        part = tokens[b : b + 1]
        alone = masked_gather(part, kept[b : b + 1], place, prefix, implementation="cpp")
        assert torch.equal(everything[b], alone[0])
        assert torch.equal(to_tokens[b], torch.autograd.grad(alone, part, upstream[b : b + 1])[0][0])


@compiled
def test_a_gradient_that_is_not_needed_is_not_computed() -> None:
    tokens, kept, positions, prefix = make()
    for wanted in ((tokens,), (positions,), (prefix,)):
        parts = [x if x is wanted[0] else x.detach() for x in (tokens, positions, prefix)]
        result = masked_gather(parts[0], kept, parts[1], parts[2], implementation="cpp")
        assert isinstance(result, Tensor)
        upstream = torch.randn_like(result)
        theirs = reference.masked_gather(tokens, kept, positions, prefix)
        assert isinstance(theirs, Tensor)
        torch.testing.assert_close(gradients(result, wanted, upstream), gradients(theirs, wanted, upstream))
    to_tokens, to_positions, to_prefix = torch.ops.oner_fast.masked_gather_backward(
        torch.randn(3, 7, 37), kept, None, 3, 7, 2, False, True, False
    )
    assert to_tokens.numel() == to_prefix.numel() == 0 and to_positions.shape == (7, 37)


@compiled
def test_saves_the_indices_alone() -> None:
    tokens, kept, positions, prefix = make()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        masked_gather(tokens, kept, positions, prefix, implementation="cpp")
    assert sum(x.numel() * x.element_size() for x in saved) == kept.numel() * 8
    cu_seqlens = torch.tensor([0, 5, 10, 15], dtype=torch.int32)
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        masked_gather(tokens, kept.flatten(), positions, prefix, cu_seqlens=cu_seqlens, implementation="cpp")
    assert sum(x.numel() * x.element_size() for x in saved) == kept.numel() * 8 + 4 * 4


@compiled
def test_opcheck() -> None:
    tokens, kept, positions, prefix = (x.detach() for x in make(dtype=torch.float32))
    cu_seqlens = torch.tensor([0, 4, 4, 15], dtype=torch.int32)
    op, back = torch.ops.oner_fast.masked_gather.default, torch.ops.oner_fast.masked_gather_backward.default
    torch.library.opcheck(op, (tokens, kept, positions, prefix, None))
    torch.library.opcheck(op, (tokens, kept.flatten(), None, None, cu_seqlens))
    torch.library.opcheck(back, (torch.randn(3, 7, 37), kept, None, 3, 7, 2, True, True, True))
    torch.library.opcheck(back, (torch.randn(21, 37), kept.flatten(), cu_seqlens, 3, 7, 2, True, False, True))


@compiled
def test_raw_op_refuses_a_gradient() -> None:
    tokens, kept, positions, prefix = make(dtype=torch.float32)
    raw = torch.ops.oner_fast.masked_gather
    with pytest.raises(RuntimeError, match=r"derivative of torch.ops.oner_fast.masked_gather is not implemented"):
        raw(tokens, kept, positions, prefix, None)
    with pytest.raises(RuntimeError, match="is not implemented"):  # where an optional tensor alone needs one
        raw(tokens.detach(), kept, positions, None, None)
    assert not raw(tokens.detach(), kept, None, None, None).requires_grad


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("ragged", [False, True])
def test_compiles_as_one_graph(implementation: str, ragged: bool) -> None:
    tokens, kept, positions, prefix = make(dtype=torch.float32)
    cu_seqlens = torch.tensor([0, 4, 4, 15], dtype=torch.int32) if ragged else None
    indices = kept.flatten() if ragged else kept

    def run(tokens: Tensor, positions: Tensor, prefix: Tensor) -> Tensor:
        out = masked_gather(tokens, indices, positions, prefix, cu_seqlens=cu_seqlens, implementation=implementation)
        return (out[0] if isinstance(out, tuple) else out) * 2

    torch._dynamo.reset()
    inputs = (tokens, positions, prefix)
    ours = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    theirs = run(*inputs)
    upstream = torch.randn_like(theirs)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, inputs, upstream), gradients(theirs, inputs, upstream))


def test_autocast_keeps_the_tokens_dtype() -> None:
    tokens, kept, positions, prefix = make(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = masked_gather(tokens, kept, positions, prefix)
    assert isinstance(result, Tensor) and result.dtype == torch.float32


T, K = torch.zeros(2, 4, 8), torch.zeros(2, 3, dtype=torch.int64)
CU = torch.tensor([0, 3, 6], dtype=torch.int32)
WRONG: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "tokens must be a torch.Tensor, got list", {"tokens": [[0.0]]}),
    (TypeError, "tokens must be float32.*int64", {"tokens": T.long()}),
    (ValueError, r"tokens must have shape \(B, N, D\).*got \(4, 8\)", {"tokens": T[0]}),
    (TypeError, "kept must be int64, got torch.int32", {"kept": K.int()}),
    (ValueError, r"kept must have shape \(B, K\).*got \(6,\)", {"kept": K.flatten()}),
    (ValueError, r"kept must have shape.*got \(3, 3\)", {"kept": torch.zeros(3, 3, dtype=torch.int64)}),
    (IndexError, r"kept must hold values in \[0, 4\), found 4", {"kept": K + 4}),
    (IndexError, r"kept must hold values in \[0, 4\), found -1", {"kept": K - 1}),
    (ValueError, r"positions must have shape \(N, D\) = \(4, 8\), got \(3, 8\)", {"positions": torch.zeros(3, 8)}),
    (TypeError, "positions must have dtype torch.float32", {"positions": torch.zeros(4, 8).double()}),
    (ValueError, r"prefix must have shape \(P, D\).*got \(1, 7\)", {"prefix": torch.zeros(1, 7)}),
    (TypeError, "prefix must have dtype torch.float32", {"prefix": torch.zeros(1, 8).half()}),
    (ValueError, r"kept must have shape \(T,\)", {"cu_seqlens": CU}),
    (TypeError, "cu_seqlens must be int32 or int64, got torch.int16", {"kept": K.flatten(), "cu_seqlens": CU.short()}),
    (ValueError, r"cu_seqlens must have shape \(B \+ 1,\) = \(3,\)", {"kept": K.flatten(), "cu_seqlens": CU[:2]}),
    (ValueError, "cu_seqlens must begin with 0, got 1", {"kept": K.flatten(), "cu_seqlens": CU + 1}),
    (ValueError, "cu_seqlens must never decrease", {"kept": K.flatten(), "cu_seqlens": CU[[0, 2, 1]]}),
    (ValueError, "cu_seqlens must end with.*6, got 5", {"kept": K.flatten(), "cu_seqlens": CU - CU // 6}),
    (ValueError, "positions is on meta", {"positions": torch.zeros(4, 8, device="meta")}),
    (
        ValueError,
        "no implementation 'fast'.*known ones: cpp, cuda, triton, portable, reference",
        {"implementation": "fast"},
    ),
]


@pytest.mark.parametrize(("error", "message", "arguments"), WRONG)
def test_errors_name_the_bad_argument(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        masked_gather(**{"tokens": T, "kept": K, **arguments})


@compiled
def test_the_raw_op_stays_in_its_tensors() -> None:
    """Under torch.compile no value is checked in Python, so the compiled op must never leave its tensors."""
    op = torch.ops.oner_fast.masked_gather
    with pytest.raises(IndexError, match=r"kept must hold values in \[0, 4\), found 9"):
        op(T, K + 9, None, None, None)
    with pytest.raises(REFUSED, match="cu_seqlens must begin with 0 and end with 6"):
        op(T, K.flatten(), None, None, CU + 1)
    with pytest.raises(REFUSED, match="cu_seqlens must never decrease"):
        op(T, K.flatten(), None, None, torch.tensor([0, 9, 6], dtype=torch.int32))
    with pytest.raises(REFUSED, match="positions must have 4 rows"):
        op(T, K, torch.zeros(3, 8), None, None)
    with pytest.raises(REFUSED, match="needed 8 rows"):
        torch.ops.oner_fast.masked_gather_backward(torch.zeros(2, 3, 8), K, None, 2, 4, 1, True, True, True)
