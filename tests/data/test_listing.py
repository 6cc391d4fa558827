"""A `dataset.json` of any content is refused in one sentence that names it, or read."""

import json

import pytest

from oner_fast.data.dataset import PairDataset
from oner_fast.data.listing import parse_listing, read_listing


def listing(**shard):
    return {"format": 1, "splits": {"train": {"shards": [{"file": "train-0.tar", "samples": 1, **shard}]}}}


@pytest.mark.parametrize(
    "content, why",
    [
        ({}, "lists no splits"),
        ([], "is a list, and an object is needed"),
        ("text", "is a str"),
        ({"splits": []}, "lists no splits"),
        ({"splits": {}}, "lists no splits"),
        ({"splits": {"train": []}}, "no list of shards for split 'train'"),
        ({"splits": {"train": {}}}, "no list of shards for split 'train'"),
        ({"splits": {"train": {"shards": {"a": 1}}}}, "no list of shards for split 'train'"),
        ({"splits": {"train": {"shards": ["a.tar"]}}}, "a shard of split 'train' that is a str"),
        (listing(file="../victim.tar"), "a shard called '../victim.tar'; a shard is a file inside the folder"),
        (listing(file="/etc/passwd"), "a shard called '/etc/passwd'"),
        (listing(file="a/../../b.tar"), "a shard called 'a/../../b.tar'"),
        (listing(file=""), "a shard called ''"),
        (listing(file="a\0.tar"), "a shard called 'a"),
        (listing(file=7), "a shard called 7"),
        (listing(samples=-1), "lists -1 samples in train-0.tar"),
        (listing(samples="7"), "lists '7' samples in train-0.tar"),
        (listing(samples=1.5), "lists 1.5 samples"),
        (listing(samples=True), "lists True samples"),
        (listing(samples=10**30), "lists 1000000000000000000000000000000 samples"),
        (listing() | {"format": 2}, "format 2, and this oner_fast reads up to 1: update oner_fast"),
        (listing() | {"format": "x"}, "format 'x'"),
    ],
)
def test_refused_in_a_sentence(tars, tmp_path, content, why):
    tars.write(tmp_path / "train-0.tar", tars.pair(0))
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="dataset.json") as caught:
        PairDataset(tmp_path)
    assert why in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b'{"splits": "\\ud800"}'])
def test_no_json(tmp_path, data):
    (tmp_path / "dataset.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"dataset.json: "):
        PairDataset(tmp_path)


def test_what_is_recorded_is_read(tmp_path):
    assert read_listing(tmp_path) is None
    data = json.dumps(listing(bytes=5, sha256="ab")).encode()
    (shard,) = parse_listing(b"\xef\xbb\xbf" + data, tmp_path / "dataset.json")["train"]
    assert (shard.path, shard.samples, shard.bytes, shard.sha256) == (tmp_path / "train-0.tar", 1, 5, "ab")
    (shard,) = parse_listing(json.dumps(listing(bytes="x", sha256=1)).encode(), tmp_path / "dataset.json")["train"]
    assert (shard.bytes, shard.sha256) == (None, None)
