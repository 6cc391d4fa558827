"""Masks of the masked objectives: whole-word masking (MLM) and patch masking (MIM). OneR, "MLM and MIM".

Every decision is an integer comparison on Philox draws keyed by (seed, step, sample), never by rank or device, so that
one process and many, the CPU and a GPU, a run and its resumption mask alike. No call waits for the device.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from oner_fast.data.batch import TokenizedText
from oner_fast.data.philox import MASK_PASSES, MASK_PATCH, MASK_TEXT, philox4x32, random_u32, split_seed

_MASKED_BELOW = (8 << 32) // 10  # 80 % of masked words become [MASK] ...
_RANDOM_BELOW = (9 << 32) // 10  # ... 10 % random ids, and the rest stay


class Vocabulary(Protocol):
    """What word masking needs to know of a tokenizer: ids below `first_word_id` are special."""

    @property
    def mask_id(self) -> int: ...

    @property
    def first_word_id(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...


@dataclass
class MaskedText:
    """A masked caption batch: `input_ids` (T,) int64, some replaced, and `target` (T,) bool, which are to be predicted.

    The ids to predict are those of the text that was masked.
    """

    input_ids: Tensor
    target: Tensor


def patch_mask(seed: int, step: int, samples: Tensor, cells: int, masked: int, stream: int = 0) -> Tensor:
    """Uniform patch masks: (B, cells) bool, exactly `masked` True in each row.

    `samples`: (B,) int64, the places in the global batch. `stream` is the index of the pass, 0 to 11. The masked cells
    are the `masked` smallest of the pairs (32-bit draw, cell). Raises ValueError where the counts do not fit.
    """
    if not 0 <= masked <= cells:
        raise ValueError(f"masked must be in [0, cells = {cells}], not {masked}")
    draws = random_u32(seed, _stream(MASK_PATCH, stream), step, samples, cells)
    if masked == 0:
        return torch.zeros_like(draws, dtype=torch.bool)
    keys = draws * cells + torch.arange(cells, device=draws.device)  # distinct, so the threshold is exact
    threshold = keys.sort(dim=1).values[:, masked - 1 : masked]
    return keys <= threshold


def mask_words(
    text: TokenizedText,
    seed: int,
    step: int,
    samples: Tensor,
    stream: int,
    vocabulary: Vocabulary,
    ratio: float = 0.15,
) -> MaskedText:
    """Masks whole words of every caption, BERT's way.

    Of a caption's n words floor(ratio * n + u / 2^32) are chosen, u one 32-bit draw a caption, so that the mean is the
    ratio even for captions of one word. A chosen word becomes [MASK] (80 %), random ids that are not special (10 %), or
    stays (10 %); its tokens share that choice. `samples`: (B,) int64, the places in the global batch; `stream` is the
    index of the pass. Raises ValueError where the ratio is outside [0, 1] or the samples do not match the captions.
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
    counter = (in_caption, samples.to(device)[caption], step, _stream(MASK_TEXT, stream))
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


def _stream(base: int, index: int) -> int:
    if not 0 <= index < MASK_PASSES:
        raise ValueError(f"a masking pass has an index in [0, {MASK_PASSES}), not {index}")
    return base + index
