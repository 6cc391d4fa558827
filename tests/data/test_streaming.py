import logging

import pytest
import torch

from oner_fast.data.batch import PairBatch
from oner_fast.data.images import decode, eval_transform
from oner_fast.data.streaming import StreamedPairs
from oner_fast.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tars):
    return Tokenizer.train([tars.caption(i) for i in range(40)], 200)


@pytest.fixture
def stream(tokenizer):
    def make(urls, **options):
        return StreamedPairs(urls, tokenizer, **{"batch_size": 8, "seed": 1, "image_size": 16, **options})

    return make


@pytest.fixture
def pipes(tars, tmp_path):
    """Four streams of ten pairs each."""
    files = [tars.write(tmp_path / f"{k}.tar", tars.pairs(range(k * 10, k * 10 + 10))) for k in range(4)]
    return [f"pipe:cat {file}" for file in files]


def numbers(batches) -> list[int]:
    return [int(caption.rsplit(" ", 1)[1]) for batch in batches for caption in batch.captions]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_holds_every_pair_once(stream, pipes, workers):
    with stream(pipes, workers=workers, shuffle=20) as pairs:
        batches = [next(pairs) for _ in range(5 if workers == 0 else 4)]
    drawn = numbers(batches)
    assert len(set(drawn)) == len(drawn)
    if workers == 0:
        assert sorted(drawn) == list(range(40)) and drawn != sorted(drawn)
    assert [batch.step for batch in batches] == list(range(len(batches)))


def test_batches_are_like_the_loaders(stream, pipes, tars):
    pairs = stream(pipes[0], transform=eval_transform(16), shuffle=0, batch_size=4)
    batch = next(pairs)
    assert isinstance(batch, PairBatch) and batch.captions == [tars.caption(i) for i in range(4)]
    assert batch.images.shape == (4, 3, 16, 16) and batch.images.dtype == torch.uint8
    assert torch.equal(batch.images[2], eval_transform(16)(decode(tars.draw(2))))
    assert batch.samples.tolist() == [0, 1, 2, 3] and len(batch.text) == 4
    assert [next(pairs).epoch for _ in range(3)] == [0, 1, 1]  # ten pairs a pass


@pytest.mark.parametrize("streams", [4, 1])
def test_ranks_divide_the_pairs(stream, pipes, streams):
    drawn = []
    for rank in range(2):
        pairs = stream(pipes[:streams], rank=rank, world_size=2, shuffle=0, batch_size=10)
        batches = [next(pairs) for _ in range(4 if streams == 4 else 1)]
        assert all(batch.samples.tolist() == list(range(rank * 5, rank * 5 + 5)) for batch in batches)
        drawn += numbers(batches)
    assert sorted(drawn) == list(range(40 if streams == 4 else 10))


def test_the_log_says_once_that_resume_is_not_exact(stream, pipes, caplog):
    pairs = stream(pipes)
    with caplog.at_level(logging.WARNING, "oner_fast.data"):
        next(pairs)
        pairs.close()
        next(pairs)
    assert ["not exactly reproducible" in record.getMessage() for record in caplog.records] == [True]


def test_a_resumed_run_counts_on(stream, pipes):
    pairs = stream(pipes)
    for _ in range(3):
        next(pairs)
    other = stream(pipes)
    other.load_state_dict(pairs.state_dict())
    batch = next(other)
    assert (batch.step, batch.epoch, other.step) == (3, 1, 4)


def test_unreadable_samples_are_left_out_and_counted(stream, tars, tmp_path, caplog):
    members = tars.pairs(range(12))
    members[3] = (members[3][0], b"no picture")
    members[7] = (members[7][0], b"")
    good, cut = tmp_path / "good.tar", tmp_path / "cut.tar"
    tars.write(good, members)
    tars.write(cut, tars.pairs(range(12, 24)))
    cut.write_bytes(cut.read_bytes()[:9000])
    urls = [f"pipe:cat {good}", f"pipe:cat {cut}", "pipe:false", str(tmp_path / "nowhere.tar")]
    pairs = stream(urls, shuffle=0, batch_size=2)
    drawn = set(numbers(next(pairs) for _ in range(12)))
    assert set(range(12)) - {1, 2} <= drawn and not drawn & {1, 2} and 12 in drawn
    assert pairs.corrupt >= 4
    said = "\n".join(pairs.corrupt_names)
    for part in ("good.tar:000000001: not a readable", "000000002: its caption is empty", "nowhere.tar"):
        assert part in said
    assert len(caplog.records) == len(pairs.corrupt_names) + 1


def test_streams_without_a_pair_are_an_error(stream, tars, tmp_path):
    with pytest.raises(RuntimeError, match="gave no sample: stream: .*nowhere"):
        next(stream(str(tmp_path / "nowhere.tar")))
    bad = tars.write(tmp_path / "bad.tar", [("a.png", b"x"), ("a.txt", b"a")])
    with pytest.raises(RuntimeError, match="no readable pair; .*bad.tar:a: not a readable image"):
        next(stream(f"pipe:cat {bad}"))


def test_bad_options_are_refused(stream):
    with pytest.raises(ValueError, match="at least one stream"):
        stream([])
    with pytest.raises(ValueError, match="world_size"):
        stream("a.tar", world_size=3)


def test_braces_are_expanded(stream):
    assert stream("pipe:cat {00..02}.tar").urls == [f"pipe:cat {k:02d}.tar" for k in range(3)]
