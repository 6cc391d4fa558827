"""Map each token of a packed variable-length batch to its embedded row.

The tower embeds into one table of rows, in which row 0 is [CLS]; a packed batch is a selection of rows. The functions
here compute on integers alone, on the device of `cu_seqlens`, and never read a value back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from oner_fast import ops


class Packed(NamedTuple):
    """A packed batch.

    `rows` (T,) int64 index the table of embedded rows, and `lengths` (S,) int64 are those of the sequences, in order.
    """

    rows: Tensor
    lengths: Tensor


def select_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Select the rows (T,) int64, repeats allowed, of `table` (N, D): (T, D).

    The table counts as one sample of `oner_fast.ops.masked_gather`. Where a row repeats hundreds of times, as [CLS] and
    positions do, its gradient is many times faster than that of `index_select`.
    """
    return ops.masked_gather(table.unsqueeze(0), rows.unsqueeze(0)).squeeze(0)


def pack_images(count: int, tokens: int, first_row: int, device: torch.device) -> Packed:
    """Pack `count` sequences of [CLS] and `tokens` patches, whose rows begin at `first_row`, image after image."""
    patches = torch.arange(count * tokens, device=device).view(count, tokens) + first_row
    rows = torch.cat([patches.new_zeros(count, 1), patches], dim=1).flatten()
    return Packed(rows, torch.full((count,), 1 + tokens, device=device))


def pack_texts(cu_seqlens: Tensor, words: int, first_row: int) -> Packed:
    """Pack sequences of [CLS] and the words of a caption; `words` = cu_seqlens[-1], known to the host from a shape."""
    return pack_pairs(cu_seqlens, words, 0, 0, first_row)


def pack_pairs(cu_seqlens: Tensor, words: int, tokens: int, first_patch: int, first_word: int) -> Packed:
    """Pack sequences of [CLS], `tokens` patches, then the words of the caption."""
    device, count = cu_seqlens.device, cu_seqlens.shape[0] - 1
    head = 1 + tokens
    begins = cu_seqlens[:-1].long()
    starts = begins + torch.arange(count, device=device) * head
    rows = torch.zeros(count * head + words, dtype=torch.int64, device=device)
    if tokens:
        places = starts.unsqueeze(1) + 1 + torch.arange(tokens, device=device)
        rows[places.flatten()] = torch.arange(count * tokens, device=device) + first_patch
    word = torch.arange(words, device=device)
    rows[word + (sample_of_word(cu_seqlens, words) + 1) * head] = word + first_word
    return Packed(rows, cu_seqlens.diff().long() + head)


def sample_of_word(cu_seqlens: Tensor, words: int) -> Tensor:
    """Caption of each packed word: (T,) int64."""
    index = torch.arange(words, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), index, right=True)


def place_in_caption(cu_seqlens: Tensor, words: int) -> Tensor:
    """Position of each packed word within its caption, from 0: (T,) int64."""
    begins = cu_seqlens[:-1].long().index_select(0, sample_of_word(cu_seqlens, words))
    return torch.arange(words, device=cu_seqlens.device) - begins


def cumulative(lengths: Tensor) -> Tensor:
    """Boundaries cu_seqlens (S + 1,) int32 of `lengths` (S,)."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)


def rows_of_sequences(cu_seqlens: Tensor, order: Tensor, total: int) -> Tensor:
    """Packed rows (T,) int64 of the sequences taken in `order` (S,), a permutation."""
    begins, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    permuted = cumulative(lengths.index_select(0, order))
    sequence = sample_of_word(permuted, total)
    within = torch.arange(total, device=order.device) - permuted[:-1].long().index_select(0, sequence)
    return begins.index_select(0, order.index_select(0, sequence)) + within
