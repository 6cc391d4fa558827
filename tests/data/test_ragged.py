from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oner_fast.data import ragged

native = pytest.mark.skipif(ragged._native_pack is None, reason="oner_fast._native is not built")
BOTH = [ragged.pack_python, pytest.param(ragged.pack_native, marks=native)]
Pack = Callable[[Any], ragged.Packed]


@pytest.mark.parametrize("pack", BOTH)
def test_pack(pack: Pack) -> None:
    flat, cu_seqlens = pack([[5, 2**40], [], [-1], [0, -(2**63), 2**63 - 1]])
    assert flat.dtype == torch.int64 and cu_seqlens.dtype == torch.int32
    assert flat.tolist() == [5, 2**40, -1, 0, -(2**63), 2**63 - 1]
    assert cu_seqlens.tolist() == [0, 2, 2, 3, 6]
    flat += 0  # the tensors own their memory and can be written


@pytest.mark.parametrize("pack", BOTH)
@pytest.mark.parametrize("lists", [[], [[]], [[], []]])
def test_empty_lists(pack: Pack, lists: list[list[int]]) -> None:
    flat, cu_seqlens = pack(lists)
    assert flat.shape == (0,) and flat.dtype == torch.int64
    assert cu_seqlens.tolist() == [0] * (len(lists) + 1)


@native
@given(st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=12), max_size=12))
def test_compiled_and_python_packing_agree(lists: list[list[int]]) -> None:
    ours, theirs = ragged.pack_native(lists), ragged.pack_python(lists)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("pack", BOTH)
@pytest.mark.parametrize(
    ("lists", "error", "message"),
    [
        ([[1], (2,)], TypeError, r"lists\[1\] must be a list of int, got tuple"),
        ([[1], [2, 3.0]], TypeError, r"lists\[1\]\[1\] must be an int, got float"),
        ([[1, "a"]], TypeError, r"lists\[0\]\[1\] must be an int, got str"),
        ([[], [2**63]], ValueError, r"lists\[1\]\[0\] does not fit int64"),
        ([[-(2**63) - 1]], ValueError, r"lists\[0\]\[0\] does not fit int64"),
    ],
)
def test_bad_input_is_named(pack: Pack, lists: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pack(lists)


def test_the_compiled_module_is_used_where_it_is_built() -> None:
    assert ragged.pack is (ragged.pack_python if ragged._native_pack is None else ragged.pack_native)


def test_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged, "_native_pack", None)
    with pytest.raises(RuntimeError, match="oner_fast._native is not built"):
        ragged.pack_native([[1]])
