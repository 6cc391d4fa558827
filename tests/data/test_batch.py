import pytest
import torch

from oner_fast.data.batch import PairBatch, TokenizedText
from oner_fast.data.caption_ids import caption_ids


def batch(size: int = 6) -> PairBatch:
    lengths = torch.arange(1, size + 1)
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    total = int(lengths.sum())
    text = TokenizedText(torch.arange(total), cu_seqlens, torch.zeros(total, dtype=torch.int32))
    images = torch.arange(size * 12, dtype=torch.uint8).view(size, 3, 2, 2)
    return PairBatch(images, text, torch.arange(size) + 10, [str(i) for i in range(size)], 3, 1, 2, ["a", "b"])


def test_text_is_cut_by_captions():
    text = batch().text
    assert text.lengths.tolist() == [1, 2, 3, 4, 5, 6]
    part = text.slice(2, 4)
    assert part.input_ids.tolist() == list(range(3, 10)) and part.cu_seqlens.tolist() == [0, 3, 7]
    assert part.cu_seqlens.dtype == torch.int32
    assert text.take(5).input_ids.tolist() == list(range(15, 21))
    assert len(text.slice(3, 3)) == 0
    with pytest.raises(ValueError, match="not within"):
        text.slice(4, 9)


def test_a_batch_splits_into_contiguous_parts():
    whole = batch()
    parts = whole.split(3)
    assert [len(part) for part in parts] == [2, 2, 2]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.samples for part in parts]), whole.samples)
    assert torch.equal(torch.cat([part.text.input_ids for part in parts]), whole.text.input_ids)
    assert sum((part.captions for part in parts), []) == whole.captions
    assert torch.equal(torch.cat([part.caption_ids for part in parts]), caption_ids(whole.captions))
    assert [part.corrupt for part in parts] == [2, 0, 0] and parts[0].corrupt_names == ["a", "b"]
    assert {(part.step, part.epoch) for part in parts} == {(3, 1)}
    with pytest.raises(ValueError, match="6 pairs do not divide into 4"):
        whole.split(4)


def test_moves_between_devices():
    moved = batch().to("meta")
    assert {moved.images.device.type, moved.text.cu_seqlens.device.type, moved.samples.device.type} == {"meta"}
    assert moved.caption_ids.device.type == "meta"
    assert moved.captions == batch().captions and moved.corrupt == 2
