import hashlib
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch

from oner_fast.data.characters import Characters
from oner_fast.data.tokenizer import Tokenizer
from oner_fast.data.word_masks import mask_words

CAPTIONS = [
    f"{a} {b} {c}"
    for a in ("arrow", "heart", "Café", "sun-rise", "moonlight", "circle")
    for b in ("up", "down", "bold", "outline", "off")
    for c in ("red", "green", "circled", "rounded", "box")
]

TRAIN = """
import hashlib, sys
from oner_fast.data.tokenizer import Tokenizer
captions = sys.stdin.read().split("\\n")
Tokenizer.train(captions, 120).save(sys.argv[1])
"""


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CAPTIONS, 120)


def test_special_tokens_come_first(tokenizer):
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.mask_id, tokenizer.first_word_id) == (0, 1, 2, 3)
    assert 60 < tokenizer.vocab_size <= 120


def test_words_are_packed_without_special_tokens(tokenizer):
    text = tokenizer(["Arrow UP", "", "sun-rise café 漢", "red"])
    assert text.input_ids.dtype == torch.int64 and text.cu_seqlens.dtype == text.word_ids.dtype == torch.int32
    assert len(text) == 4 and text.cu_seqlens[-1] == text.input_ids.numel() == text.word_ids.numel()
    assert tokenizer.decode(text.take(0).input_ids) == "arrow up"
    assert text.take(1).input_ids.tolist() == [tokenizer.unk_id]
    third = text.take(2)
    assert tokenizer.decode(third.input_ids) == "sun - rise cafe [UNK]"
    assert third.word_ids.max() == 4 and third.word_ids[0] == 0
    assert (text.word_ids[text.cu_seqlens[:-1].long()] == 0).all()
    alone = tokenizer(["red"])
    assert torch.equal(alone.input_ids, text.take(3).input_ids)
    assert tokenizer([]).cu_seqlens.tolist() == [0]


def test_pieces_of_a_word_share_its_number(tokenizer):
    text = tokenizer(["reddown arrow"])
    pieces = [tokenizer.decode([i]) for i in text.input_ids]
    words = text.word_ids.tolist()
    assert words == [0] * (len(pieces) - 1) + [1] and len(pieces) > 2


def test_truncation_and_bad_input(tokenizer):
    assert tokenizer(["arrow up down bold red"], max_tokens=3).lengths.tolist() == [3]
    assert tokenizer(["up " * 500]).lengths.tolist() == [78]
    with pytest.raises(TypeError, match="list of strings"):
        tokenizer("arrow")
    with pytest.raises(ValueError, match="max_tokens"):
        tokenizer(["arrow"], max_tokens=0)


def test_special_tokens_in_captions_are_plain_text(tokenizer):
    assert not set(tokenizer(["[MASK] [PAD]"]).input_ids.tolist()) & {tokenizer.mask_id, tokenizer.pad_id}


def test_training_gives_the_same_bytes_in_any_process(tmp_path):
    digests = set()
    for number, threads in (("1", "1"), ("2", "4")):
        captions = CAPTIONS if number == "1" else CAPTIONS[::-1]
        file = tmp_path / f"{number}.json"
        environment = {**os.environ, "PYTHONHASHSEED": number, "RAYON_NUM_THREADS": threads}
        subprocess.run(
            [sys.executable, "-c", TRAIN, str(file)], input="\n".join(captions).encode(), env=environment, check=True
        )
        digests.add(hashlib.sha256(file.read_bytes()).hexdigest())
    Tokenizer.train(iter(CAPTIONS), 120).save(tmp_path / "here.json")
    digests.add(hashlib.sha256((tmp_path / "here.json").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_a_too_small_vocabulary_is_refused():
    with pytest.raises(
        ValueError, match=r"holds the characters of 0 of .* words; .*--tokenizer-vocab\) must be"
    ) as said:
        Tokenizer.train(CAPTIONS, 10)
    least = int(str(said.value).rsplit(" ", 1)[1])
    assert Tokenizer.train(CAPTIONS, least).vocab_size <= least
    with pytest.raises(ValueError, match="there is no caption to learn a vocabulary from; --tokenizer names"):
        Tokenizer.train(["", " "], 100)


ORDINARY = [f"{a}{b} {c} {b}{a}" for a in ("ba", "ko", "li", "mur", "ven") for b in ("dra", "so", "tik") for c in "xyz"]
VARIED = [f"the {first}{second} of {second}{third}" for first in ("sun", "moon", "star", "rain", "snow", "wind", "fire")
          for second in ("light", "storm", "fall", "house", "field") for third in ("er", "ing", "ed", "s", "less")
          for _ in range(8)]  # fmt: skip


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("vocab_size", [160, 2048])
def test_rare_characters_do_not_take_the_place_of_words(times, vocab_size, caplog):
    rare = [f"sunlight {chr(0x4E00 + i)}" for i in range(6000)] * times
    before = Tokenizer.train(VARIED, vocab_size)(VARIED)
    with caplog.at_level("WARNING", logger="oner_fast.data"):
        tokenizer = Tokenizer.train(VARIED + rare, vocab_size)
    after = tokenizer(VARIED)
    assert after.input_ids.numel() <= 1.05 * before.input_ids.numel()
    assert not (after.input_ids == tokenizer.unk_id).any()
    pieces = json.loads(tokenizer.to_json())["model"]["vocab"]
    single = [piece for piece in pieces if len(piece.removeprefix("##")) == 1]
    assert len(single) <= vocab_size // 4 and len(pieces) <= vocab_size
    assert "pieces of one character are left out" in caplog.text and "words become [UNK]" in caplog.text


def test_the_most_frequent_characters_are_kept():
    captions = ["aa bb"] * 50 + ["cc"] * 20 + [chr(0x4E00 + i) for i in range(40)] * 2
    tokenizer = Tokenizer.train(captions, 24)
    assert tokenizer(["aa bb cc"]).input_ids.tolist().count(tokenizer.unk_id) == 0
    assert Tokenizer.train(captions[::-1], 24).to_json() == tokenizer.to_json()
    counts = Characters.choose({"aa": 50, "bb": 50, "cc": 20, "x": 3, "y": 2}, 24)
    assert counts.kept == ("a", "b", "c", "##a", "##b", "##c")
    assert (dict(counts.left_out), counts.words, counts.words_left_out) == ({"x": 3, "y": 2}, 125, 5)
    assert counts.cover("abc") and not counts.cover("x") and not counts.cover("yb")


def test_every_character_is_kept_where_a_quarter_holds_them():
    words = {"ab": 1, "c": 1}
    assert Characters.choose(words, 12).kept == ("a", "c", "##b")
    assert Characters.choose(words, 11).kept == ()


def test_a_vocabulary_without_too_many_characters_is_that_of_earlier_versions():
    text = Tokenizer.train(ORDINARY, 200).to_json()
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "5b08402fe674bca5500952c0575e5e03adf416972c7f4ddc2679fcc2d0657269"
    )


def test_saved_loaded_and_pickled_agree(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    expected = tokenizer(CAPTIONS)
    for other in (
        Tokenizer.load(tmp_path / "tokenizer.json"),
        Tokenizer.load(tmp_path),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        text = other(CAPTIONS)
        assert torch.equal(text.input_ids, expected.input_ids) and torch.equal(text.word_ids, expected.word_ids)
        assert (other.vocab_size, other.mask_id) == (tokenizer.vocab_size, tokenizer.mask_id)
        other.save(tmp_path / "again.json")
        assert (tmp_path / "again.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


BERT = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused1]", "!", "[", "]", "a", "house", "##s"]


def test_a_vocab_txt_in_berts_format(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(BERT) + "\n")
    tokenizer = Tokenizer.load(tmp_path / "vocab.txt")
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.mask_id, tokenizer.first_word_id) == (0, 2, 5, 7)
    text = tokenizer(["A Houses!", "[MASK]"])
    assert text.input_ids.tolist() == [10, 11, 12, 7, 8, 2, 9]
    assert text.word_ids.tolist() == [0, 1, 1, 2, 0, 1, 2]
    masked = mask_words(text, 0, 0, torch.arange(2), 0, tokenizer, ratio=1.0)
    assert masked.target.all()


def test_a_package_is_searched_and_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "some_model"
    (package / "assets").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "assets" / "vocab.txt").write_text("\n".join(BERT))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert Tokenizer.load("some_model").vocab_size == Tokenizer.load("some-model").vocab_size == len(BERT)
    with pytest.raises(ValueError, match="no tokenizer.json or vocab.txt found for 'pytest'"):
        Tokenizer.load("pytest")
    with pytest.raises(ValueError, match="no such file, folder or package"):
        Tokenizer.load("nowhere/at-all")


@pytest.mark.parametrize(
    "lines, said",
    [
        (["[PAD]", "[UNK]", "a"], r"no \[MASK\]"),
        (["[PAD]", "[UNK]", "a", "[MASK]"], "must stand before the words"),
        (["[PAD]", "[UNK]", "[MASK]"], "no word"),
    ],
)
def test_an_unfit_vocabulary_is_refused(tmp_path, lines, said):
    (tmp_path / "vocab.txt").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=said):
        Tokenizer.load(tmp_path)


def test_another_kind_of_model_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(ValueError, match="holds a BPE model"):
        Tokenizer.load(tmp_path)
