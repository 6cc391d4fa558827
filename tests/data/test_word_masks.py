"""Whole-word masks of captions."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oner_fast.data.batch import TokenizedText
from oner_fast.data.word_masks import mask_words


@dataclass
class Words:
    mask_id: int = 2
    first_word_id: int = 3
    vocab_size: int = 1003


def text_of(words: list[list[int]]) -> TokenizedText:
    """Captions given as the numbers of tokens of their words; ids from 500 up in order."""
    lengths = [sum(caption) for caption in words]
    word_ids = [w for caption in words for w, tokens in enumerate(caption) for _ in range(tokens)]
    return TokenizedText(
        torch.arange(sum(lengths)) % 500 + 500,
        torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        torch.tensor(word_ids, dtype=torch.int32),
    )


def masked_words(text: TokenizedText, target: torch.Tensor, caption: int) -> list[bool]:
    """For each word of a caption whether it is a target; fails where a word is a target in part."""
    part = slice(*text.cu_seqlens[caption : caption + 2].tolist())
    of_word: dict[int, set[bool]] = {}
    for word, hit in zip(text.word_ids[part].tolist(), target[part].tolist(), strict=True):
        of_word.setdefault(word, set()).add(hit)
    assert all(len(hits) == 1 for hits in of_word.values())
    return [hits.pop() for hits in of_word.values()]


def test_a_ratio_above_one_and_wrong_samples_are_refused():
    text = text_of([[1], [2]])
    with pytest.raises(ValueError, match="ratio must be in"):
        mask_words(text, 0, 0, torch.arange(2), 0, Words(), ratio=1.5)
    with pytest.raises(ValueError, match="samples must be"):
        mask_words(text, 0, 0, torch.arange(3), 0, Words())
    with pytest.raises(ValueError, match="masking pass"):
        mask_words(text, 0, 0, torch.arange(2), 12, Words())


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=12), min_size=1, max_size=20),
    ratio=st.sampled_from([0.0, 0.15, 0.4, 0.5, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_whole_words_are_masked_in_the_wanted_number(words, ratio, seed):
    text = text_of(words)
    masked = mask_words(text, seed, 3, torch.arange(len(words)), 0, Words(), ratio)
    for caption, lengths in enumerate(words):
        count, exact = sum(masked_words(text, masked.target, caption)), ratio * len(lengths)
        assert int(exact + 1e-6) <= count <= int(np.ceil(exact - 1e-6))
    kept = ~masked.target
    assert torch.equal(masked.input_ids[kept], text.input_ids[kept])


def test_the_mean_share_is_the_ratio_even_for_one_word_captions():
    for lengths in ([1], [2, 1], [1, 3, 1]):
        text = text_of([lengths] * 40000)
        masked = mask_words(text, 9, 4, torch.arange(40000), 1, Words())
        rate = np.mean([masked_words(text, masked.target, k) for k in range(0, 40000, 10)], axis=0)
        assert np.abs(rate - 0.15).max() < 0.02  # each place alike


def test_tokens_of_a_word_share_the_80_10_10_choice():
    text = text_of([[2, 2, 2, 2]] * 20000)
    masked = mask_words(text, 1, 0, torch.arange(20000), 0, Words(), 0.5)
    ids, original = masked.input_ids.view(-1, 2), text.input_ids.view(-1, 2)
    ids, original = ids[masked.target.view(-1, 2)[:, 0]], original[masked.target.view(-1, 2)[:, 0]]
    is_mask, is_kept = ids == 2, ids == original
    assert (is_mask[:, 0] == is_mask[:, 1]).all()
    is_random = ~is_mask[:, 0] & ~is_kept.all(1)
    assert abs(is_mask[:, 0].double().mean() - 0.8) < 0.01
    assert abs(is_kept.all(1).double().mean() - 0.1) < 0.01
    assert abs(is_random.double().mean() - 0.1) < 0.01
    drawn = ids[is_random]
    assert drawn.min() >= 3 and drawn.max() < 1003
    assert (drawn[:, 0] != drawn[:, 1]).double().mean() > 0.99  # each token's id is its own
    assert abs(drawn.double().mean() - 503) < 15


def test_passes_differ_and_parts_of_a_batch_agree_with_the_whole():
    text = text_of([[1, 2], [3], [1, 1, 1], [2, 1]] * 50)
    samples = torch.arange(200)
    whole = mask_words(text, 6, 7, samples, 0, Words(), 0.5)
    parts = [mask_words(part, 6, 7, samples[k * 50 :][:50], 0, Words(), 0.5) for k, part in enumerate(text.split(4))]
    assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)
    assert torch.equal(torch.cat([part.target for part in parts]), whole.target)
    assert not torch.equal(mask_words(text, 6, 7, samples, 1, Words(), 0.5).target, whole.target)
    again = mask_words(text, 6, 7, samples, 0, Words(), 0.5)
    assert torch.equal(again.input_ids, whole.input_ids)


def test_an_empty_batch_gives_an_empty_mask():
    empty = TokenizedText(torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int32), torch.zeros(0).int())
    masked = mask_words(empty, 0, 0, torch.arange(0), 0, Words())
    assert masked.input_ids.numel() == 0 and masked.target.dtype == torch.bool
