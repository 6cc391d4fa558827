"""Zero gradients where every sequence is empty or no token is kept: not missing, not NaN, not fresh memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from oner_fast.ops import gather_patches, masked_gather, varlen_attention
from oner_fast.ops.implementations import implementations

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def able(op: str) -> list[str]:
    return [name for name, one in implementations(op).items() if not one.reasons_against("cpu")]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Any:
    """Fill fresh memory with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("implementation", able("varlen_attention"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    [([0, 0], [0, 0]), ([0], [0]), ([], []), ([3, 0], [0, 0]), ([0, 0], [4, 1]), ([2, 0, 0], [0, 3, 0])],
)
def test_attention_without_a_pair_of_query_and_key(
    implementation: str, dtype: torch.dtype, causal: bool, lengths_q: list[int], lengths_k: list[int]
) -> None:
    query, key, value = (
        torch.randn(sum(lengths), heads, 8).to(dtype).requires_grad_()
        for lengths, heads in ((lengths_q, 4), (lengths_k, 2), (lengths_k, 2))
    )
    cu_q, cu_k = boundaries(lengths_q), boundaries(lengths_k)
    out = varlen_attention(query, key, value, cu_q, cu_k, causal=causal, implementation=implementation)
    assert out.shape == query.shape and out.dtype == dtype and not out.count_nonzero()
    gradients = torch.autograd.grad(out, (query, key, value), torch.ones_like(out))
    for gradient, x in zip(gradients, (query, key, value), strict=True):
        assert gradient.shape == x.shape and gradient.dtype == dtype
        assert gradient.eq(0).all()


@pytest.mark.parametrize("implementation", able("masked_gather"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("samples", [0, 3])
def test_no_token_is_kept(implementation: str, dtype: torch.dtype, prefix: int, ragged: bool, samples: int) -> None:
    tokens, positions = torch.randn(samples, 5, 8).to(dtype).requires_grad_(), torch.randn(5, 8).to(dtype)
    positions.requires_grad_()
    front = torch.randn(prefix, 8).to(dtype).requires_grad_() if prefix else None
    kept = torch.zeros((0,) if ragged else (samples, 0), dtype=torch.int64)
    out = masked_gather(
        tokens, kept, positions, front, cu_seqlens=boundaries([0] * samples) if ragged else None,
        implementation=implementation,
    )  # fmt: skip
    rows = out[0] if isinstance(out, tuple) else out
    leaves = [tokens, positions, *([] if front is None else [front])]
    gradients = torch.autograd.grad(rows, leaves, torch.ones_like(rows))
    assert all(one.shape == x.shape and one.dtype == dtype for one, x in zip(gradients, leaves, strict=True))
    assert gradients[0].eq(0).all() and gradients[1].eq(0).all()
    assert front is None or gradients[2].eq(samples).all()


@pytest.mark.parametrize("implementation", able("gather_patches"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ragged", [False, True])
def test_no_patch_is_kept(implementation: str, dtype: torch.dtype, ragged: bool) -> None:
    images = torch.rand(2, 3, 8, 8).to(dtype).requires_grad_()
    kept = torch.zeros((0,) if ragged else (2, 0), dtype=torch.int64)
    cu_seqlens = boundaries([0, 0]) if ragged else None
    out = gather_patches(images, kept, 4, std=(0.5, 0.5, 0.5), cu_seqlens=cu_seqlens, implementation=implementation)
    rows = out[0] if isinstance(out, tuple) else out
    gradient = torch.autograd.grad(rows, images, torch.ones_like(rows))[0]
    assert gradient.shape == images.shape and gradient.dtype == dtype and gradient.eq(0).all()
