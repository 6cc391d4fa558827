"""The Triton kernels of masked_gather, against the definition in float64 and, where sums have no choice, bit by bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oner_fast.kernels import kept as kept_lists
from oner_fast.ops import masked_gather

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def poisoned() -> None:
    """Every torch.empty holds NaN (-1 or so for integers), so that what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True)


def make(
    samples: int, cells: int, width: int, kept: int, prefix: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tokens, kept with repeats, positions, prefix."""
    sizes = ((samples, cells, width), (cells, width), (prefix, width))
    tokens, positions, front = (torch.randn(size).to(device, dtype).requires_grad_() for size in sizes)
    return tokens, torch.randint(max(cells, 1), (samples, kept), device=device), positions, front


def ragged(samples: int, cells: int, longest: int, device: str) -> tuple[Tensor, Tensor]:
    """A flat kept and its cu_seqlens, the first and (of three or more) the last sample empty."""
    lengths = torch.randint(0, longest + 1, (samples,))
    lengths[:1] = 0
    if samples > 2:
        lengths[-1] = 0
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    return torch.randint(max(cells, 1), (int(starts[-1]),)).to(device), starts.to(device)


def outcome(
    implementation: str,
    tokens: Tensor,
    kept: Tensor,
    positions: Tensor | None,
    prefix: Tensor | None,
    cu_seqlens: Tensor | None = None,
    upstream: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The result, and the gradients of what asks for one."""
    result = masked_gather(tokens, kept, positions, prefix, cu_seqlens=cu_seqlens, implementation=implementation)
    rows = result[0] if isinstance(result, tuple) else result
    inputs = [x for x in (tokens, positions, prefix) if x is not None and x.requires_grad]
    if not inputs:
        return (rows,)
    if upstream is None:
        upstream = torch.linspace(-1, 1, rows.numel(), device=rows.device).view_as(rows).to(rows.dtype)
    upstream = upstream.to(rows.dtype)
    return (rows.detach(), *torch.autograd.grad(rows, inputs, upstream, allow_unused=True, materialize_grads=True))


def worst(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth).abs().max()) if x.numel() else 0.0


def wide(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_()


@pytest.mark.parametrize(
    ("dtype", "is_ragged"),
    [
        (torch.float32, False),
        (torch.float16, False),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
        (torch.float64, True),
    ],
)
def test_error_is_near_that_of_plain_pytorch(dtype: torch.dtype, is_ragged: bool, device: str) -> None:
    """At most twice (gradients three times) plain PyTorch's error against float64, and one unit in the last place."""
    tokens, kept, positions, prefix = make(5, 9, 272, 14, 2, dtype, device)
    cu_seqlens = None
    if is_ragged:
        kept, cu_seqlens = ragged(5, 9, 14, device)
    rows = (5, 16, 272) if cu_seqlens is None else (kept.shape[0] + 10, 272)
    upstream = torch.randn(rows, device=device).to(dtype)
    ours, theirs = (outcome(n, tokens, kept, positions, prefix, cu_seqlens, upstream) for n in ("triton", "reference"))
    exact = outcome("reference", wide(tokens), kept, wide(positions), wide(prefix), cu_seqlens, upstream)
    assert torch.equal(ours[0], theirs[0])
    unit = torch.finfo(dtype).eps
    for mine, other, truth in zip(ours[1:], theirs[1:], exact[1:], strict=True):
        assert mine.dtype == dtype and mine.shape == truth.shape
        assert worst(mine, truth) <= 3 * worst(other, truth) + unit * float(truth.abs().max())
        # Sums are float32 and rounded once: half a unit, whatever their length.
        assert bool(((mine.double() - truth).abs() <= unit * truth.abs() + 20 * 2.0**-23).all())


@pytest.mark.parametrize("wanted", ["tokens", "positions", "prefix"])
def test_a_gradient_that_is_not_needed_is_not_computed(wanted: str, device: str) -> None:
    tokens, kept, positions, prefix = make(3, 7, 16, 5, 2, torch.float32, device)
    names = ("tokens", "positions", "prefix")
    parts = [x if name == wanted else x.detach() for name, x in zip(names, (tokens, positions, prefix), strict=True)]
    ours, theirs = (outcome(name, parts[0], kept, parts[1], parts[2]) for name in ("triton", "reference"))
    torch.testing.assert_close(ours, theirs)
    need = [name == wanted for name in names]
    raw = torch.ops.oner_fast_triton.masked_gather_backward(torch.ones_like(ours[0]), kept, None, 3, 7, 2, *need)
    assert [x.numel() > 0 for x in raw] == need


def test_without_positions_and_prefix(device: str) -> None:
    tokens, kept, _, _ = make(3, 7, 16, 5, 0, torch.bfloat16, device)
    for ours, theirs in zip(
        *(outcome(name, tokens, kept, None, None) for name in ("triton", "reference")), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    (tokens.grad,) = torch.autograd.grad(masked_gather(tokens, kept, implementation="triton").sum(), tokens)
    counts = torch.zeros(3, 7, device=device).scatter_add_(1, kept, torch.ones(3, 5, device=device))
    assert torch.equal(tokens.grad, counts.unsqueeze(2).expand(-1, -1, 16).bfloat16())  # upstream of stride 0


def test_sums_over_many_samples_come_in_groups(device: str) -> None:
    """130 samples: two groups, whose partial sums are added after; the last tile of a group is not full."""
    tokens, kept, positions, prefix = make(130, 3, 20, 4, 2, torch.float32, device)
    ours, theirs = (outcome(name, tokens, kept, positions, prefix) for name in ("triton", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    parts = (tokens.detach(), kept, positions.detach(), prefix)
    assert torch.equal(outcome("triton", *parts)[1], ours[3])


_seen: dict[str, tuple[Tensor, ...]] = {}


@pytest.mark.parametrize("executor", [{}, {"shuffle": 1}], indirect=True)
def test_same_bits_in_any_order_of_programs(executor: Any, device: str) -> None:
    torch.manual_seed(3)
    found = outcome("triton", *make(130, 3, 20, 4, 2, torch.float32, device))
    first = _seen.setdefault("first", found)
    assert all(torch.equal(mine, other) for mine, other in zip(found, first, strict=True))


def test_strides_and_misaligned_memory(device: str) -> None:
    tokens, kept, positions, prefix = (x.detach() for x in make(3, 8, 16, 5, 1, torch.bfloat16, device))
    (expected,) = outcome("reference", tokens, kept, positions, prefix)

    def strange(x: Tensor) -> list[Tensor]:
        behind = x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
        wider = x.new_empty(*x.shape[:-1], x.shape[-1] + 3)[..., 2:-1].copy_(x)
        turned = x.transpose(0, -1).contiguous().transpose(0, -1)
        return [behind, wider, turned]

    for t, p, f in zip(strange(tokens), strange(positions), strange(prefix), strict=True):
        assert torch.equal(outcome("triton", t, kept.t().contiguous().t(), p, f)[0], expected)
    shared = tokens[:1].expand(3, -1, -1)
    assert torch.equal(
        outcome("triton", shared, kept, None, None)[0], outcome("reference", shared, kept, None, None)[0]
    )
    upstream = torch.randn(16, 6, 3, device=device).permute(2, 1, 0)  # no stride is 1 where a row's numbers lie
    grown = [x.detach().requires_grad_() for x in (tokens, positions, prefix)]
    ours, theirs = (outcome(n, grown[0], kept, *grown[1:], None, upstream) for n in ("triton", "cpp"))
    assert all(torch.equal(mine, other) for mine, other in zip(ours[:2], theirs[:2], strict=True))


@settings(max_examples=15 if INTERPRETED else 6)  # where kernels are compiled, each new width is
@given(
    samples=st.integers(0, 4), cells=st.integers(0, 6), width=st.sampled_from([0, 1, 7, 16]), kept=st.integers(0, 9),
    prefix=st.integers(0, 3), is_ragged=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(
    device: str, samples: int, cells: int, width: int, kept: int, prefix: int, is_ragged: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    kept = kept if cells else 0
    tokens, indices, positions, front = make(samples, cells, width, kept, prefix, torch.float32, device)
    cu_seqlens = None
    if is_ragged:
        indices, cu_seqlens = ragged(samples, cells, kept, device)
    ours, theirs = (outcome(n, tokens, indices, positions, front, cu_seqlens) for n in ("triton", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_infinities_and_nans_stay_in_their_rows(device: str) -> None:
    tokens, kept, positions, prefix = (x.detach() for x in make(2, 4, 16, 3, 1, torch.float16, device))
    tokens[0, 2, 3], tokens[1, 1, :], positions[3, 5], prefix[0, 0] = torch.inf, torch.nan, -torch.inf, torch.nan
    ours, theirs = (outcome(name, tokens, kept, positions, prefix)[0] for name in ("triton", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    grown = tokens.clone().requires_grad_()
    upstream = torch.ones_like(ours)
    upstream[0, 1], upstream[1, 2, 4] = torch.nan, torch.inf
    ours, theirs = (outcome(name, grown, kept, None, prefix, None, upstream)[1] for name in ("triton", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [-1, 4, 2**40, -(2**62)])
def test_bad_indices_touch_nothing(bad: int, device: str) -> None:
    """On a GPU values are not checked: a row of NaN comes, no gradient goes anywhere, and no memory but the tensors' is
    touched, which the emulation sees."""
    tokens, kept, positions, prefix = (x.detach() for x in make(2, 4, 16, 3, 1, torch.float32, device))
    right = kept.clone()
    kept[1, 1] = bad
    result = torch.ops.oner_fast_triton.masked_gather(tokens, kept, positions, prefix, None)
    (expected,) = outcome("reference", tokens, right, positions, prefix)
    expected[1, 2] = torch.nan
    assert torch.equal(result.nan_to_num(9.0), expected.nan_to_num(9.0))
    grad = torch.randn_like(result)
    found = torch.ops.oner_fast_triton.masked_gather_backward(grad, kept, None, 2, 4, 1, True, True, True)
    grad[1, 2] = 0
    expected = torch.ops.oner_fast_triton.masked_gather_backward(grad, right, None, 2, 4, 1, True, True, True)
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("executor", [{"race" if INTERPRETED else "global_race": False}], indirect=True)
@pytest.mark.parametrize(
    "starts",
    [
        [0, 900, 4, -7, 6],
        [5, 4, 3, 2, 1],
        [-9, -9, -9, -9, -9],
        [0, 2**31 - 1, 0, 0, 6],
        [0, 6, 1, 6, 2],
        [0, 900, 900, 900, 6],
        [3, 6, 0, 6, 6],  # the third sample writes the first one's list, in numbers of its own
    ],
)
def test_bad_boundaries_touch_nothing(executor: Any, starts: list[int], device: str) -> None:
    """Samples that overlap write each other's lists: the sums are anything, but they end and stay inside."""
    tokens, _, positions, prefix = (x.detach() for x in make(4, 4, 16, 6, 1, torch.float32, device))
    kept = torch.tensor([0, 1, 2, 3, 3, 3], device=device)
    cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=device)
    result = torch.ops.oner_fast_triton.masked_gather(tokens, kept, positions, prefix, cu_seqlens)
    found = torch.ops.oner_fast_triton.masked_gather_backward(
        torch.randn_like(result), kept, cu_seqlens, 4, 4, 1, True, True, True
    )
    assert result.shape == (10, 16) and found[0].shape == (4, 4, 16)


def test_rows_beyond_two_to_the_31_numbers(executor: Any, device: str, tmp_path: Path) -> None:
    """Five rows of 12 GiB of float16 (a sparse file) are touched, so that offsets need 64 bits."""
    if executor is None:
        pytest.skip("needs the emulation: the interpreter shadows every byte, and a GPU would have to hold them")
    size, far = 3 * 2**31, 2**31 + 64
    file = tmp_path / "numbers"
    file.touch()
    numbers = torch.from_file(str(file), shared=True, size=size, dtype=torch.float16)
    tokens = numbers.as_strided((2, 2, 16), (far, 2**30, 1))
    tokens.copy_(torch.randn(2, 2, 16))
    kept = torch.tensor([[1, 0], [1, 1]])
    (ours,) = outcome("triton", tokens, kept, None, None)
    assert torch.equal(ours, outcome("reference", tokens.contiguous(), kept, None, None)[0])
    upstream = numbers.as_strided((2, 2, 16), (far, 2**30, 1))
    found = torch.ops.oner_fast_triton.masked_gather_backward(upstream, kept, None, 2, 2, 0, True, False, False)
    expected = torch.ops.oner_fast_triton.masked_gather_backward(
        upstream.contiguous(), kept, None, 2, 2, 0, True, False, False
    )
    assert torch.equal(found[0], expected[0])
    file.unlink()


@pytest.fixture
def few_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of more than 4 cells are long, and have 8 bins, so that small ones show what large ones do."""
    for name, value in (("SHORT", 4), ("BINS", 8), ("CHUNK", 128)):
        monkeypatch.setattr(kept_lists, name, value)


LONG = [  # samples, cells, entries, whether ragged: bins are pairs, then several pairs, then of several samples
    (1, 8, 300, False),
    (1, 35, 270, False),
    (3, 13, 40, True),
    (2, 9, 130, False),
]


@pytest.mark.usefixtures("few_bins")
@pytest.mark.parametrize(("samples", "cells", "count", "is_ragged"), LONG)
def test_rows_of_a_long_sample_are_sorted(samples: int, cells: int, count: int, is_ragged: bool, device: str) -> None:
    """Members of a cell that is kept hundreds of times are summed in pieces; invalid values are nobody's."""
    tokens, kept, _, _ = make(samples, cells, 16, count, 0, torch.float32, device)
    cu_seqlens = None
    if is_ragged:
        kept, cu_seqlens = ragged(samples, cells, 3 * count, device)
    kept[..., ::2], kept[..., 1::5] = 7, cells - 1
    ours, theirs = (outcome(n, tokens, kept, None, None, cu_seqlens) for n in ("triton", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    bad = kept.clone()
    bad[..., 2::6], bad[..., 5::6] = torch.tensor([[-1, cells], [2**40, -(2**62)]], device=device)[samples % 2]
    grad = torch.randn_like(ours[0])
    sizes = (cu_seqlens, samples, cells, 0, True, False, False)
    found = torch.ops.oner_fast_triton.masked_gather_backward(grad, bad, *sizes)[0]
    grad[..., 2::3, :] = 0
    expected = torch.ops.oner_fast_triton.masked_gather_backward(grad, kept, *sizes)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("few_bins")
@pytest.mark.parametrize("starts", [[0, 400, 4, 300], [-9, 5, -1, 300], [300, 200, 3, 0], [7, 9, 2**31 - 1, 300]])
def test_bad_boundaries_of_long_samples_touch_nothing(starts: list[int], device: str) -> None:
    kept = torch.arange(300, device=device).remainder(11)
    cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=device)
    found = torch.ops.oner_fast_triton.masked_gather_backward(
        torch.randn(300, 16, device=device), kept, cu_seqlens, 3, 13, 0, True, False, False
    )
    assert found[0].shape == (3, 13, 16)


def instructions(executor: Any, *arguments: Any) -> int:
    """Count the warp instructions of all kernels of one backward."""
    before = len(executor)
    torch.ops.oner_fast_triton.masked_gather_backward(*arguments)
    return sum(launch.stats.warp_instructions for launch in executor[before:])


@pytest.mark.parametrize("executor", [{} if INTERPRETED else {"race": False, "global_race": False}], indirect=True)
def test_the_instructions_are_linear_in_the_rows(executor: Any, device: str) -> None:
    """Selecting four times as many rows of a table four times as long takes at most 4.4 times the instructions."""
    if executor is None:
        pytest.skip("the counters are those of the emulated GPU")
    counts = []
    for rows in (4000, 16000):
        kept = torch.randint(rows, (1, 2 * rows), generator=torch.Generator().manual_seed(rows))
        kept[:, ::9] = 0  # [CLS]
        grad = torch.ones(1, 2 * rows, 32).bfloat16()
        counts.append(instructions(executor, grad, kept, None, 1, rows, 0, True, False, False))
    assert counts[1] <= 4.4 * counts[0]


@pytest.mark.parametrize("executor", [{} if INTERPRETED else {"race": False, "global_race": False}], indirect=True)
@pytest.mark.parametrize(("sums", "most"), [(True, 30.0), (False, 23.0)])
def test_instructions_of_a_vector(executor: Any, sums: bool, most: float, device: str) -> None:
    """Count the warp instructions of all kernels for each 16 bytes of a lane that the tokens' gradient has."""
    if executor is None:
        pytest.skip("the counters are those of the emulated GPU")
    samples, cells, width = 32, 196, 768
    kept = torch.stack([torch.randperm(cells)[: cells // 2] for _ in range(samples)])
    grad = torch.ones(samples, cells // 2, width, dtype=torch.bfloat16)
    vectors = samples * cells * width * 2 / (16 * 32)
    assert instructions(executor, grad, kept, None, samples, cells, 0, True, sums, False) <= most * vectors


@pytest.mark.parametrize("is_ragged", [False, True])
def test_compiles_as_one_graph(is_ragged: bool, device: str) -> None:
    tokens, kept, positions, prefix = make(3, 7, 16, 5, 2, torch.float32, device)
    cu_seqlens = None
    if is_ragged:
        kept, cu_seqlens = ragged(3, 7, 5, device)

    def run(tokens: Tensor, positions: Tensor, prefix: Tensor) -> Tensor:
        out = masked_gather(tokens, kept, positions, prefix, cu_seqlens=cu_seqlens, implementation="triton")  # type: ignore[call-overload]
        return (out[0] if isinstance(out, tuple) else out) * 2

    torch._dynamo.reset()
    inputs = (tokens, positions, prefix)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    plain = run(*inputs)
    assert torch.equal(compiled, plain)
    upstream = torch.randn_like(plain)
    for mine, other in zip(*(torch.autograd.grad(x, inputs, upstream) for x in (compiled, plain)), strict=True):
        assert torch.equal(mine, other)


def test_bytes_are_the_ideal(executor: Any, device: str) -> None:
    """Within a tenth: inputs once, outputs once (the file's docstring counts them); accesses of 16 bytes."""
    if executor is None:
        pytest.skip("the counters are those of the emulated GPU")
    samples, cells, width, count = 4, 196, 272, 98
    tokens, _, positions, prefix = make(samples, cells, width, count, 1, torch.bfloat16, device)
    kept = torch.stack([torch.randperm(cells)[:count] for _ in range(samples)])
    outcome("triton", tokens, kept, positions, prefix)
    moved = [launch.stats.unique_read_bytes + launch.stats.unique_write_bytes for launch in executor]
    assert [launch.name for launch in executor] == ["forward_kernel", "order_kernel", "backward_kernel"]
    row = 2 * width
    forward = samples * count * (2 * row + 8) + cells * row + (samples + 1) * row
    backward = samples * (count + 1 + cells) * row + (cells + 1) * row
    assert moved[0] <= 1.01 * forward and moved[1] + moved[2] <= 1.05 * backward
    for launch in (executor[0], executor[2]):
        wide_ones = [a for place, kind, a in launch.stats.places if kind.startswith("global") and ".v4." in place]
        assert sum(a.bytes for a in wide_ones) >= 0.95 * samples * count * row
        assert all(a.bytes >= 32 * a.sectors for a in wide_ones)
