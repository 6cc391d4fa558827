from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from oner_fast.ops import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SPLIT = 32  # samples of a partial sum


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(
    lib: Any, tokens: Tensor, kept: Tensor, positions: Any = None, prefix: Any = None, cu: Any = None, **settings: Any
) -> Tensor:
    batch, cells, width = tokens.shape
    length = 0 if prefix is None else prefix.shape[0]
    shape = (batch, kept.shape[1] + length, width) if cu is None else (kept.shape[0] + batch * length, width)
    out = lib.poison(*shape, dtype=tokens.dtype)
    lib.call("masked_gather", dict(
        tokens=tokens, positions=positions, prefix=prefix, out=out, kept=lib.kept(kept, batch, cells, cu),
        sample_stride=tokens.stride(0), token_stride=tokens.stride(1),
        position_stride=0 if positions is None else positions.stride(0),
        prefix_stride=0 if prefix is None else prefix.stride(0), prefix_rows=length, width=width,
        number=lib.number(tokens),
    ), **settings)  # fmt: skip
    return out


def backward(
    lib: Any, grad: Tensor, kept: Tensor, cu: Any, batch: int, cells: int, length: int, need: str, **settings: Any
) -> dict[str, Tensor]:
    width, dtype, splits = grad.shape[-1], grad.dtype, -(-batch // SPLIT)
    out, scratch = {}, {"choices": torch.full((batch, cells, 2), 77, dtype=torch.int32)}
    if "t" in need:
        out["to_tokens"] = lib.poison(batch, cells, width, dtype=dtype)
    if "p" in need:
        out["to_positions"] = lib.poison(cells, width, dtype=dtype)
        scratch["position_partials"] = lib.poison(splits, cells, width, dtype=wide(dtype))
    if "f" in need:
        out["to_prefix"] = lib.poison(length, width, dtype=dtype)
        scratch["prefix_partials"] = lib.poison(splits, length, width, dtype=wide(dtype))
    lib.call("masked_gather_backward", dict(
        grad=grad, kept=lib.kept(kept, batch, cells, cu), prefix_rows=length, width=width, number=lib.number(grad),
        **out, **scratch,
    ), **settings)  # fmt: skip
    return out


def exact_gradients(grad: Tensor, kept: Tensor, cu: Any, batch: int, cells: int, length: int) -> dict[str, Tensor]:
    width = grad.shape[-1]
    leaves = [
        torch.zeros(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((batch, cells, width), (cells, width), (length, width))
    ]
    out = reference.masked_gather(leaves[0], kept, leaves[1], leaves[2], cu_seqlens=cu)
    packed = out if cu is None else out[0]
    found = torch.autograd.grad(packed, leaves, grad.double())
    return dict(zip(("to_tokens", "to_positions", "to_prefix"), found, strict=True))


def case(dtype: torch.dtype, width: int, ragged: bool, batch: int = 3, cells: int = 7) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(width)
    tokens = torch.randn(batch, cells, width, generator=generator).to(dtype)
    positions = torch.randn(cells, width, generator=generator).to(dtype)
    prefix = torch.randn(2, width, generator=generator).to(dtype)
    if not ragged:
        return tokens, positions, prefix, torch.randint(cells, (batch, 5), generator=generator), None
    counts = torch.randint(0, 7, (batch,), generator=generator)
    counts[0] = 0
    cu = torch.cat([torch.zeros(1), counts.cumsum(0)]).to(torch.int32)
    return tokens, positions, prefix, torch.randint(cells, (int(counts.sum()),), generator=generator), cu


# Every kernel: four types, 16 bytes a thread (widths that go into them) or a number.
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("width", [40, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_agrees_with_the_reference(library: Any, dtype: torch.dtype, width: int, ragged: bool) -> None:
    tokens, positions, prefix, kept, cu = case(dtype, width, ragged)
    lib = library("masked_gather")
    for place, front in ((positions, prefix), (None, prefix), (positions, None), (None, None)):
        ours = forward(lib, tokens, kept, place, front, cu, shuffle=1)
        exact = reference.masked_gather(tokens, kept, place, front, cu_seqlens=cu)
        assert torch.equal(ours, exact if cu is None else exact[0])


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("width", [40, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_agree_with_the_reference(library: Any, dtype: torch.dtype, width: int, ragged: bool) -> None:
    tokens, _, prefix, kept, cu = case(dtype, width, ragged, batch=35)  # two partial sums
    batch, cells = tokens.shape[:2]
    rows = (batch, kept.shape[1] + 2, width) if cu is None else (kept.shape[0] + 2 * batch, width)
    grad = torch.randn(*rows, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = exact_gradients(grad, kept, cu, batch, cells, prefix.shape[0])
    lib = library("masked_gather")
    ours = backward(lib, grad, kept, cu, batch, cells, prefix.shape[0], "tpf", shuffle=1)
    eps = torch.finfo(dtype).eps
    for name, found in ours.items():
        torch.testing.assert_close(found.double(), exact[name], rtol=eps, atol=40 * min(eps, 1.2e-7), msg=name)
    for need in ("t", "p"):  # bit by bit, and in another order of blocks and warps
        for name, found in backward(lib, grad, kept, cu, batch, cells, 2, need, seed=3, shuffle=2).items():
            assert torch.equal(found, ours[name])


def test_strides(library: Any) -> None:
    """Views that are not dense, each in words of 16 bytes and number by number."""
    lib, kept = library("masked_gather"), torch.tensor([[2, 0], [1, 1]])
    for offset in (0, 1):
        room = torch.randn(2, 5, 50)
        tokens, positions = room[:, 1:4, offset : offset + 24], torch.randn(3, 28)[:, offset : offset + 24]
        assert torch.equal(
            forward(lib, tokens, kept, positions), reference.masked_gather(tokens.contiguous(), kept, positions)
        )
    expanded = torch.randn(1, 3, 8).expand(2, 3, 8)
    assert torch.equal(forward(lib, expanded, kept), reference.masked_gather(expanded, kept))


@pytest.mark.parametrize("width", [8, 5])
def test_wrong_indices_touch_nothing_else(library: Any, width: int) -> None:
    lib, bad = library("masked_gather"), [-1, 4, 2**62, -(2**62)]
    tokens, positions, prefix = torch.randn(2, 4, width), torch.randn(4, width), torch.randn(1, width)
    kept = torch.tensor([[0, *bad], [*bad, 3]])
    out = forward(lib, tokens, kept, positions, prefix)
    assert torch.equal(out[0, 1], tokens[0, 0] + positions[0]) and torch.equal(out[1, 5], tokens[1, 3] + positions[3])
    assert out[0, 2:].eq(0).all() and out[1, 1:5].eq(0).all()
    grad = torch.randn(2, 6, width)
    ours = backward(lib, grad, kept, None, 2, 4, 1, "tpf")
    assert torch.equal(ours["to_tokens"][0, 0], grad[0, 1]) and ours["to_tokens"][0, 1:].eq(0).all()
    assert torch.equal(ours["to_positions"][3], grad[1, 5])
    flat, rows = kept.flatten(), torch.randn(12, width)
    for starts in ([0, 99, 10], [-7, 3, 2**31 - 1], [9, 4, -(2**31)], [0, 0, 0]):
        cu = torch.tensor(starts, dtype=torch.int32)
        for front in (prefix, None):
            length = 0 if front is None else 1
            assert not forward(lib, tokens, flat, positions, front, cu).isnan().any()
            found = backward(lib, rows[: 10 + 2 * length], flat, cu, 2, 4, length, "tpf" if length else "tp")
            assert not any(each.isnan().any() for each in found.values())


def test_more_cells_than_a_warp_has_lanes(library: Any) -> None:
    """One warp clears the place of a cell in the table and another counts there."""
    lib, cells = library("masked_gather"), 70
    kept, grad = torch.arange(cells).flip(0)[None], torch.randn(1, cells, 8)
    for shuffle in (1, 2):
        ours = backward(lib, grad, kept, None, 1, cells, 0, "t", shuffle=shuffle)
        assert torch.equal(ours["to_tokens"], grad.flip(1))


def test_empty_inputs_are_legal(library: Any) -> None:
    lib = library("masked_gather")
    none = torch.zeros(2, 0, dtype=torch.int64)
    prefix = torch.randn(1, 4)
    assert torch.equal(forward(lib, torch.randn(2, 3, 4), none, prefix=prefix), prefix.expand(2, 1, 4))
    assert forward(lib, torch.randn(2, 3, 0), torch.zeros(2, 2, dtype=torch.int64)).numel() == 0
    assert forward(lib, torch.randn(0, 3, 4), torch.zeros(0, 2, dtype=torch.int64)).numel() == 0
    grad = torch.randn(2, 1, 4)
    ours = backward(lib, grad, none, None, 2, 3, 1, "tpf")
    assert ours["to_tokens"].eq(0).all() and ours["to_positions"].eq(0).all()
    torch.testing.assert_close(ours["to_prefix"], grad.sum(0))


def test_offsets_beyond_32_bits(library: Any) -> None:
    """The second sample lies 2**31 elements behind the first, in memory of which two pages are touched."""
    room = torch.empty(2**31 + 64, dtype=torch.float16)
    tokens = room.as_strided((2, 2, 8), (2**31, 8, 1))
    tokens.copy_(torch.arange(32).view(2, 2, 8))
    kept = torch.tensor([[1, 0], [1, 0]])
    ours = forward(library("masked_gather"), tokens, kept, stats=False, global_race=False)
    assert torch.equal(ours, tokens.flip(1).clone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_the_ideal(library: Any, dtype: torch.dtype) -> None:
    lib, batch, cells, keep, width = library("masked_gather"), 64, 16, 8, 128
    tokens = torch.randn(batch, cells, width).to(dtype)
    kept = torch.stack([torch.randperm(cells)[:keep] for _ in range(batch)])
    positions, prefix, size = tokens[0].clone(), tokens[0, :1].clone(), tokens.element_size()
    forward(lib, tokens, kept, positions, prefix)
    stats, rows = lib.log[0], batch * (keep + 1) * width * size
    ideal = rows + (batch * keep + cells + 1) * width * size + kept.numel() * 8
    assert stats.unique_read_bytes + stats.unique_write_bytes <= 1.01 * ideal
    # Full sectors: every 32 bytes that an instruction asks for are 32 bytes of its own.
    stores = stats.memory["global_st"]
    assert stores.bytes == 32 * stores.sectors
    backward(lib, torch.randn(batch, keep + 1, width).to(dtype), kept, None, batch, cells, 1, "tpf")
    moved = sum(each.unique_read_bytes + each.unique_write_bytes for each in lib.log)
    ideal = rows + (batch * cells + cells + 1) * width * size
    partial_sums = 2 * 2 * (cells + 1) * width * 4  # two splits, written and read
    table = 3 * batch * cells * 8 + kept.numel() * 8
    assert moved <= 1.02 * (ideal + partial_sums + table)
