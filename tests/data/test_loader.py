import hashlib
import logging
import os
from dataclasses import replace

import pytest
import torch

from oner_fast.data import loader as loader_module
from oner_fast.data.dataset import PairDataset
from oner_fast.data.images import RANDOMS, ImageTransform, decode, eval_transform
from oner_fast.data.loader import PairLoader
from oner_fast.data.permutation import Permutation
from oner_fast.data.substitution import CANDIDATES, substitutes
from oner_fast.data.tokenizer import Tokenizer
from oner_fast.philox import AUGMENT, random_u32

SIZE, BATCH, SEED = 16, 8, 5


@pytest.fixture(scope="module")
def folder(tars, tmp_path_factory):
    return tars.folder(tmp_path_factory.mktemp("loader") / "d", samples=42, shards=3)


@pytest.fixture(scope="module")
def dataset(folder):
    return PairDataset(folder)


@pytest.fixture(scope="module")
def tokenizer(dataset):
    return Tokenizer.train(dataset.captions(), 200)


@pytest.fixture
def make(dataset, tokenizer):
    def make(data=dataset, **options):
        return PairLoader(data, tokenizer, **{"batch_size": BATCH, "seed": SEED, "image_size": SIZE, **options})

    return make


def digest(batches) -> str:
    """Fingerprint of the pairs of one step, in order, for any number of parts."""
    state = hashlib.sha256()
    for values in (
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.samples for batch in batches]),
        torch.cat([batch.text.input_ids for batch in batches]),
        torch.cat([batch.text.lengths for batch in batches]),
        torch.cat([batch.text.word_ids for batch in batches]),
    ):
        state.update(values.numpy().tobytes())
    state.update(repr([(batch.step, batch.epoch) for batch in batches[:1]]).encode())
    state.update("\n".join(caption for batch in batches for caption in batch.captions).encode())
    return state.hexdigest()


def steps_of(loaders, count):
    return [digest([next(loader) for loader in loaders]) for _ in range(count)]


@pytest.fixture(scope="module")
def expected(dataset, tokenizer):
    """Fingerprints of steps 0 to 11, more than two epochs."""
    return steps_of([PairLoader(dataset, tokenizer, batch_size=BATCH, seed=SEED, image_size=SIZE)], 12)


def test_a_second_view_follows_from_its_own_draws(make, dataset):
    """The first view and all else stay; the second is another crop, the same in any worker and after a restart."""
    plain, loader = next(make(start_step=7)), make(start_step=7, second_view=True)
    batch = next(loader)
    assert plain.second is None and digest([plain]) == digest([batch])
    randoms = random_u32(SEED, AUGMENT, 7, torch.arange(BATCH), 2 * RANDOMS)[:, RANDOMS:].numpy()
    order, transform = Permutation(42, SEED, 1), ImageTransform(SIZE)
    for row in range(BATCH):
        pair = dataset.read(order[2 * BATCH + row])
        assert torch.equal(batch.second[row], transform(decode(pair.image), randoms[row]))
    assert not torch.equal(batch.second, batch.images)
    with make(start_step=6, second_view=True, workers=2) as workers:
        next(workers)
        again = next(workers)
    assert torch.equal(again.second, batch.second) and digest([again]) == digest([batch])
    parts = [next(make(start_step=7, second_view=True, rank=rank, world_size=2)).second for rank in range(2)]
    assert torch.equal(torch.cat(parts), batch.second)
    assert torch.equal(torch.cat([part.second for part in batch.split(4)]), batch.second)


def test_pairs_may_be_the_same_by_their_images(tars, tmp_path, tokenizer):
    """Five captions of an image are five pairs of one id, in any worker; with RandAugment as without."""
    image = tars.draw(3)
    pairs = [(f"{k}.{end}", data) for k in range(5) for end, data in (("png", image), ("txt", f"view {k}".encode()))]
    path = tars.write(tmp_path / "five.tar", [*pairs, *tars.pairs(range(20, 23))])

    def batch(**options):
        return next(PairLoader(PairDataset(path), tokenizer, batch_size=8, seed=SEED, image_size=SIZE, **options))

    by_image, by_caption = batch(same_by="image"), batch()
    same = torch.tensor([caption.startswith("view") for caption in by_image.captions])
    assert same.sum() == 5 and len(by_image.caption_ids[same].unique()) == 1
    assert len(by_image.caption_ids.unique()) == 4 and int(by_image.caption_ids.min()) >= 0
    assert len(by_caption.caption_ids.unique()) == 8 and digest([by_image]) == digest([by_caption])
    augmented = batch(same_by="image", transform=ImageTransform(SIZE, operations=2))
    assert torch.equal(augmented.caption_ids, by_image.caption_ids) and digest([augmented]) != digest([by_image])
    assert torch.equal(torch.cat([part.caption_ids for part in augmented.split(2)]), by_image.caption_ids)


def test_batches_follow_from_their_definition(make, dataset, tokenizer):
    loader, transform = make(start_step=7), ImageTransform(SIZE)
    assert loader.steps_per_epoch == 5 and loader.epoch == 1
    batch = next(loader)
    order = Permutation(42, SEED, 1)
    randoms = random_u32(SEED, AUGMENT, 7, torch.arange(BATCH), 5).numpy()
    assert batch.images.shape == (BATCH, 3, SIZE, SIZE) and batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous()
    for row in range(BATCH):
        pair = dataset.read(order[2 * BATCH + row])
        assert batch.captions[row] == pair.caption
        assert torch.equal(batch.images[row], transform(decode(pair.image), randoms[row]))
    assert torch.equal(batch.text.input_ids, tokenizer(batch.captions).input_ids)
    assert (batch.step, batch.epoch, batch.corrupt, batch.samples.tolist()) == (7, 1, 0, list(range(BATCH)))


def test_an_epoch_repeats_no_sample(make):
    loader = make()
    for _ in range(3):
        captions = [caption for _ in range(loader.steps_per_epoch) for caption in next(loader).captions]
        assert len(set(captions)) == len(captions) == 40


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_number_of_workers_changes_no_batch(make, expected, workers):
    with make(workers=workers) as loader:
        assert steps_of([loader], 12) == expected


@pytest.mark.parametrize("world_size, workers", [(2, 0), (4, 0), (2, 1)])
def test_the_number_of_ranks_changes_no_batch(make, expected, world_size, workers):
    loaders = [make(rank=rank, world_size=world_size, workers=workers) for rank in range(world_size)]
    assert steps_of(loaders, 6 if workers else 12) == expected[: 6 if workers else 12]
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("start", range(1, 12))
def test_loading_can_start_at_any_step(make, expected, start):
    assert steps_of([make(start_step=start)], 1) == expected[start : start + 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_continues_from_a_state(make, expected, workers):
    first = make(workers=workers)
    steps_of([first], 7)
    state = first.state_dict()
    assert state == {"seed": SEED, "step": 7, "epoch": 1, "position": 16, "samples": 42}
    first.close()
    second = make(workers=workers)
    next(second)
    second.load_state_dict(state)
    assert steps_of([second], 5) == expected[7:]
    second.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_ahead_gets_each_batch_one_step_early(make, expected, workers):
    loader, seen = make(workers=workers), []
    loader.ahead = lambda batch: seen.append(digest([batch]))
    for step in range(3):
        assert digest([next(loader)]) == expected[step]
        assert seen == expected[: step + 2] and loader.state_dict()["step"] == step + 1
    state = loader.state_dict()
    loader.close()
    seen.clear()
    loader.load_state_dict(state)
    assert digest([next(loader)]) == expected[3] == seen[0]


class Prepared:
    """Stand for a training's inputs, with the process that made them."""

    def __init__(self, batch):
        self.rows, self.process = batch.samples + batch.step, os.getpid()


@pytest.mark.parametrize("workers", [0, 1])
def test_inputs_are_made_where_the_batch_is_loaded(make, expected, workers):
    with make(prepare=Prepared, workers=workers) as loader:
        batches = [next(loader) for _ in range(2)]
    assert [digest([batch]) for batch in batches] == expected[:2]
    for batch in batches:
        assert torch.equal(batch.inputs.rows, batch.samples + batch.step)
        assert (batch.inputs.process == os.getpid()) == (workers == 0)


def test_a_state_of_another_order_is_refused(make):
    state = make(start_step=7).state_dict()
    with pytest.raises(ValueError, match="seed 6"):
        make(seed=6).load_state_dict(state)
    other = make(batch_size=4, start_step=3)
    with pytest.raises(ValueError, match="batch size or the dataset has changed"):
        other.load_state_dict(state)
    assert other.step == 3


def test_the_seed_changes_everything(make, expected):
    assert not set(steps_of([make(seed=6)], 12)) & set(expected)


def test_an_interrupted_step_is_made_again(make, expected, monkeypatch):
    loader = make()
    steps_of([loader], 2)
    with monkeypatch.context() as patch:

        def interrupt(*_):
            raise KeyboardInterrupt

        patch.setattr(loader_module, "decode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(loader)
    assert loader.step == 2 and steps_of([loader], 2) == expected[2:4]


def test_loading_leaves_training_randomness_and_threads_alone(make):
    torch.manual_seed(1)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    with make(workers=2) as loader:
        next(loader)
        assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads


def test_another_transform_can_be_given(make, dataset):
    batch = next(make(transform=eval_transform(SIZE)))
    first = dataset.read(Permutation(42, SEED, 0)[0])
    assert torch.equal(batch.images[0], eval_transform(SIZE)(decode(first.image)))


@pytest.fixture
def broken(tars, tmp_path):
    """The same pairs, but sample 3's image is truncated, 17's caption is empty and 30's image is no image."""
    members = tars.pairs(range(42))
    for place, (name, data) in enumerate(members):
        if name == "000000003.png":
            members[place] = (name, data[:60])
        elif name == "000000017.txt":
            members[place] = (name, b"")
        elif name == "000000030.png":
            members[place] = (name, b"not found")
    return PairDataset(tars.write(tmp_path / "broken.tar", members))


def test_a_corrupt_sample_does_not_move_others(make, broken, caplog):
    whole, hurt = make(), make(broken)
    order = {epoch: Permutation(42, SEED, epoch) for epoch in range(3)}
    met, counted = set(), 0
    with caplog.at_level(logging.WARNING, "oner_fast.data"):
        for step in range(15):
            good, bad = next(whole), next(hurt)
            assert len(bad) == BATCH
            counted += bad.corrupt
            for row in range(BATCH):
                slot = step % 5 * BATCH + row
                sample = order[step // 5][slot]
                if sample in (3, 17, 30):
                    met.add(sample)
                    candidates = substitutes(SEED, step // 5, slot, 42)
                    chosen = next(i for i in candidates if i not in (3, 17, 30))
                    assert bad.captions[row] == broken.read(chosen).caption
                else:
                    assert bad.captions[row] == good.captions[row]
                    assert torch.equal(bad.images[row], good.images[row])
    assert met == {3, 17, 30} and hurt.corrupt == counted >= 7 and whole.corrupt == 0
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3 == len(hurt.corrupt_names)  # each named once
    for said in ("broken.tar:000000003: not a readable image", "000000017: its caption is empty", "000000030: not"):
        assert sum(said in message for message in messages) == 1


def test_substitutes_do_not_depend_on_workers_or_ranks(make, broken):
    alone = steps_of([make(broken)], 10)
    with make(broken, workers=2) as loader:
        assert steps_of([loader], 10) == alone
        assert loader.corrupt > 0
    assert steps_of([make(broken, rank=rank, world_size=4) for rank in range(4)], 10) == alone
    assert steps_of([make(broken, start_step=6)], 4) == alone[6:]


def test_corruption_is_counted_across_workers(make, broken, caplog):
    alone = make(broken)
    for _ in range(10):
        next(alone)
    caplog.clear()
    with make(broken, workers=2) as loader:
        for _ in range(10):
            next(loader)
        assert loader.corrupt == alone.corrupt and loader.corrupt_names == alone.corrupt_names
    assert len(caplog.records) == len(alone.corrupt_names)


def test_only_corrupt_samples_are_an_error(make, tars, tmp_path):
    members = [(f"{i}.{kind}", b"x") for i in range(9) for kind in ("png", "txt")]
    loader = make(PairDataset(tars.write(tmp_path / "a.tar", members)))
    with pytest.raises(RuntimeError, match=f"all {CANDIDATES} substitutes are corrupt; the last is a.tar"):
        next(loader)


def test_candidates_are_drawn_from_all_samples():
    drawn = [list(substitutes(1, epoch, slot, 10)) for epoch in range(2) for slot in range(5)]
    assert all(set(candidates) == set(range(10)) for candidates in drawn)
    assert len({tuple(candidates) for candidates in drawn}) == 10
    assert drawn[0] == list(substitutes(1, 0, 0, 10))


@pytest.mark.parametrize(
    "options, said",
    [
        ({"batch_size": 43}, "exceeds the dataset's 42"),
        ({"batch_size": 9, "world_size": 2}, "multiple of world_size = 2"),
        ({"batch_size": 0}, "positive multiple"),
        ({"rank": 2, "world_size": 2}, "rank must be in"),
        ({"workers": -1}, "workers must be"),
        ({"start_step": -1}, "start_step must be"),
        ({"transform": ImageTransform(8)}, "makes 8 px, but image_size is 16"),
    ],
)
def test_bad_options_are_refused(make, options, said):
    with pytest.raises(ValueError, match=said):
        make(**options)


def test_part_of_a_batch_can_be_replaced(make):
    batch = next(make())
    assert replace(batch, corrupt=3).corrupt == 3
