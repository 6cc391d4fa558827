"""Batches of images alone: captions are not read and may be missing; the images equal those of the pairs."""

import pytest
import torch

from oner_fast.data.dataset import CorruptSample, PairDataset
from oner_fast.data.loader import PairLoader
from oner_fast.data.streaming import StreamedPairs
from oner_fast.data.tokenizer import Tokenizer

COMMON = {"batch_size": 8, "seed": 3, "image_size": 16}


@pytest.fixture(scope="module")
def both(tars, tmp_path_factory):
    """The same twenty images with and without captions."""
    folder = tmp_path_factory.mktemp("alone")
    pairs = tars.pairs(range(20))
    alone = [member for member in pairs if member[0].endswith("png")]
    return tars.write(folder / "pairs.tar", pairs), tars.write(folder / "alone.tar", alone)


def test_a_missing_caption_is_not_damage(both, caplog):
    dataset = PairDataset(both[1])
    assert len(dataset) == 20 and dataset.damage == [] and not caplog.records
    assert dataset.picture(7) == PairDataset(both[0]).read(7).image
    with pytest.raises(CorruptSample, match="no caption"):
        dataset.read(7)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_images_equal_those_of_the_pairs(both, workers):
    tokenizer = Tokenizer.train(PairDataset(both[0]).captions(), 100)
    with (
        PairLoader(PairDataset(both[0]), tokenizer, **COMMON) as pairs,
        PairLoader(PairDataset(both[1]), None, captions=False, workers=workers, **COMMON) as alone,
    ):
        for _ in range(3):
            first, second = next(pairs), next(alone)
            assert torch.equal(first.images, second.images) and torch.equal(first.samples, second.samples)
            assert second.captions == [""] * 8 and len(second.text) == 8 and second.text.input_ids.numel() == 0
            parts = second.split(4)
            assert [len(part) for part in parts] == [2] * 4 and torch.equal(parts[1].images, second.images[2:4])


def test_captions_as_strings_without_a_tokenizer(both):
    batch = next(PairLoader(PairDataset(both[0]), None, **COMMON))
    assert all(batch.captions) and batch.text.input_ids.numel() == 0


def test_a_missing_image_is_still_replaced(tars, tmp_path):
    members = [("a.json", b"{}"), *(member for member in tars.pairs(range(8)) if member[0].endswith("png"))]
    loader = PairLoader(PairDataset(tars.write(tmp_path / "a.tar", members)), None, captions=False, **COMMON)
    next(loader), next(loader)
    assert loader.corrupt and "it has no image" in next(iter(loader.corrupt_names))


def test_a_tokenizer_needs_captions(both):
    with pytest.raises(ValueError, match="tokenizer=None"):
        PairLoader(PairDataset(both[0]), Tokenizer.train(["a"], 30), captions=False, **COMMON)


def test_streams_without_captions(both):
    stream = StreamedPairs(f"pipe:cat {both[1]}", None, captions=False, shuffle=0, **COMMON)
    pairs = StreamedPairs(f"pipe:cat {both[0]}", None, shuffle=0, **COMMON)
    first, second = next(stream), next(pairs)
    assert torch.equal(first.images, second.images) and first.captions == [""] * 8 and all(second.captions)
