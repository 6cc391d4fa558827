"""Tensors of a batch in one buffer: the same values and strides, one copy, and what was shared stays shared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from oner_fast.data import one_buffer
from oner_fast.data.batch import PairBatch, no_text, prepared
from oner_fast.data.one_buffer import moved, packed, with_tensors


class Pair(NamedTuple):
    left: Tensor
    right: Tensor | None


@dataclass(frozen=True)
class Nest:
    name: str
    pair: Pair
    many: dict[str, list[Tensor]]
    more: Any = None


def nest() -> Nest:
    images = torch.arange(60, dtype=torch.uint8).view(5, 3, 4)
    numbers = torch.arange(10, dtype=torch.int64)
    strided = torch.randn(6, 4).t()[1:]
    flags, nothing = torch.tensor([True, False, True]), torch.zeros(0, dtype=torch.int32)
    return Nest("x", Pair(images[1:3], None), {"a": [images[3:], numbers[2:7]], "b": [strided, flags, nothing]})


def tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with_tensors(value, note)
    return found


def test_packing_keeps_values_shapes_and_strides() -> None:
    before = nest()
    buffer, after = packed(before)
    assert after.name == "x" and after.pair.right is None and len(tensors(after)) == 6
    for one, other in zip(tensors(before), tensors(after), strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride() and one.dtype == other.dtype
        assert other.untyped_storage().data_ptr() == buffer.data_ptr()


def test_views_of_the_same_memory_take_it_once() -> None:
    images = torch.zeros(8, 1000, dtype=torch.uint8)
    buffer, parts = packed([images, images[:4], images[4:], images])
    assert buffer.numel() < 8_500 and parts[0] is parts[3]
    parts[0][5] = 7
    assert (parts[2][1] == 7).all()


def test_large_memory_may_stay_where_it_is() -> None:
    images, few = torch.zeros(5000, dtype=torch.uint8), [torch.arange(3), torch.ones(2)]
    buffer, (same, *small) = packed([images, *few], at_most=4096)
    assert same is images and buffer.numel() <= 1024
    assert all(each.untyped_storage().data_ptr() == buffer.data_ptr() for each in small)
    assert all(torch.equal(one, other) for one, other in zip(few, small, strict=True))


def test_inputs_take_one_more_piece_of_memory_through_a_worker() -> None:
    """Each piece is a file descriptor there."""
    batch = PairBatch(torch.zeros(2, 3, 1024, 512, dtype=torch.uint8), no_text(2), torch.arange(2), ["a", "b"], 3, 1)
    batch = prepared(batch, lambda given: {"rows": [given.samples + i for i in range(20)], "seen": given.images})
    found = {each.untyped_storage().data_ptr() for each in tensors(batch) if each.numel()}
    assert len(found) == 2 and batch.inputs["rows"][7].tolist() == [7, 8]


def test_a_part_without_tensors_stays_the_same_object() -> None:
    value = Nest("y", Pair(torch.ones(1), None), {}, more=("a", [1, 2]))
    _, after = packed(value)
    assert after.more is value.more and after is not value


def test_one_copy_moves_the_whole() -> None:
    class Copies(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func._schema.name in ("aten::_to_copy", "aten::copy_")
            return func(*args, **(kwargs or {}))

    buffer, value = packed(nest())
    with Copies() as copies:
        there, after = moved(buffer, value, "meta")
    assert copies.count == 1 and there.device.type == "meta"
    for one, other in zip(tensors(value), tensors(after), strict=True):
        assert other.device.type == "meta" and (one.shape, one.stride()) == (other.shape, other.stride())


def pairs() -> PairBatch:
    return PairBatch(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), no_text(2), torch.arange(2), ["a", "b"], 3, 1)


def test_a_batch_stays_where_it_is() -> None:
    batch = replace(pairs(), inputs=Pair(torch.ones(2), None))
    assert batch.to("cpu") is batch and batch.to(torch.device("cpu"), non_blocking=True) is batch


def test_a_batch_takes_its_inputs_along() -> None:
    batch = pairs()
    batch = replace(batch, inputs={"seen": batch.images, "masked": torch.ones(2, 4, dtype=torch.bool)})
    there = batch.to("meta")
    assert there.inputs["masked"].device.type == "meta" and there.inputs["seen"] is there.images
    assert there.buffer is not None and there.captions == ["a", "b"]


def test_pinning_takes_one_page_locked_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU has no such memory: the request is noted in its place."""
    empty, asked = torch.empty, []

    def noting(*size: Any, **options: Any) -> Tensor:
        if options.pop("pin_memory", False):
            asked.append(size)
        made: Tensor = empty(*size, **options)
        return made

    monkeypatch.setattr(one_buffer.torch, "empty", noting)
    batch = pairs().pin_memory()
    assert len(asked) == 1 and batch.buffer is not None
    assert batch.images.untyped_storage().data_ptr() == batch.buffer.data_ptr()
