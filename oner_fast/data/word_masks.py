"""Whole-word masking of captions, for MLM.

Every decision is an integer comparison on Philox draws keyed by (seed, step, sample), never by rank or device. One
process and many, the CPU and a GPU, a run and its resumption therefore mask the same words. Masks of patches are drawn
by `oner_fast.ops.patch_masks`.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from oner_fast.data.batch import TokenizedText
from oner_fast.philox import MASK_TEXT, mask_stream, philox4x32, split_seed

_MASKED_BELOW = (8 << 32) // 10  # 80 % of masked words become [MASK] ...
_RANDOM_BELOW = (9 << 32) // 10  # ... 10 % random ids, and the rest stay


class Vocabulary(Protocol):
    """The part of a tokenizer that word masking reads; ids below `first_word_id` are special."""

    @property
    def mask_id(self) -> int: ...

    @property
    def first_word_id(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...


@dataclass
class MaskedText:
    """A masked batch of captions.

    `input_ids` (T,) int64 are the packed ids, some of them replaced. `target` (T,) bool marks the tokens to predict;
    their ids are those of the text before masking.
    """

    input_ids: Tensor
    target: Tensor


def mask_words(
    text: TokenizedText,
    seed: int,
    step: int,
    samples: Tensor,
    stream: int,
    vocabulary: Vocabulary,
    ratio: float = 0.15,
) -> MaskedText:
    """Mask whole words of every caption, as BERT does.

    In a caption of n words, floor(ratio * n + u / 2^32) words are chosen, where u is one 32-bit draw for the caption.
    The mean share is therefore `ratio`, even for captions of one word. A chosen word becomes [MASK] (80 %), random ids
    that are not special (10 %), or stays (10 %). All tokens of a word share that choice.

    Args:
        text: the packed captions.
        seed: the seed of the training, in [0, 2^64).
        step: the step, in [0, 2^32).
        samples: (B,) int64, the places in the global batch.
        stream: the index of the masking pass, 0 to 11.
        vocabulary: the tokenizer's mask id, first id of a word, and size.
        ratio: the share of words to choose, in [0, 1].

    Raises:
        ValueError: the ratio or the stream is out of range, or the samples do not match the captions.
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio must be in [0, 1], not {ratio}")
    if samples.shape != (len(text),):
        raise ValueError(f"samples must be ({len(text)},), one a caption, not {tuple(samples.shape)}")
    tokens, device = text.input_ids.numel(), text.input_ids.device
    if tokens == 0:
        return MaskedText(text.input_ids.clone(), torch.zeros(0, dtype=torch.bool, device=device))
    starts = text.cu_seqlens[:-1].long()
    captions = torch.arange(len(text), device=device)
    caption = captions.repeat_interleave(text.lengths.long(), output_size=tokens)
    place = torch.arange(tokens, device=device)
    in_caption = place - starts[caption]

    # The four words of a token's draw: order of its word, 80/10/10, random id, and (first token) rounding of the count.
    counter = (in_caption, samples.to(device)[caption], step, mask_stream(MASK_TEXT, stream))
    order, choice, replacement, rounding = philox4x32(counter, split_seed(seed))

    previous = text.word_ids.roll(1)
    is_start = (text.word_ids != previous) | (in_caption == 0)
    words_before = torch.nn.functional.pad(is_start.cumsum(0), (1, 0))
    words = words_before[text.cu_seqlens[1:].long()] - words_before[starts]  # (B,)
    wanted = (round(ratio * (1 << 32)) * words + rounding[starts.clamp(max=tokens - 1)]) >> 32

    # Sort a caption's first tokens of words by their draw, ahead of its other tokens: the rank follows from the place.
    by_caption = (caption << 33) | ((~is_start).long() << 32) | order
    permutation = by_caption.sort(stable=True).indices
    rank = torch.empty_like(place).scatter_(0, permutation, place) - starts[caption]
    chosen = is_start & (rank < wanted[caption])

    word_start = torch.where(is_start, place, 0).cummax(0).values
    target, choice = chosen[word_start], choice[word_start]
    words_in_vocabulary = vocabulary.vocab_size - vocabulary.first_word_id
    random_id = vocabulary.first_word_id + ((replacement * words_in_vocabulary) >> 32)
    replaced = torch.where(choice < _RANDOM_BELOW, random_id, text.input_ids)
    replaced = torch.where(choice < _MASKED_BELOW, vocabulary.mask_id, replaced)
    return MaskedText(torch.where(target, replaced, text.input_ids), target)
