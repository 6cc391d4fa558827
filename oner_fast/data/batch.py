"""The inputs of a training step: packed captions and a batch of image-text pairs."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from oner_fast.data.caption_ids import caption_ids
from oner_fast.data.one_buffer import moved, packed

SameBy = Literal["caption", "image"]
"""Things that make two pairs of a batch the same: an equal caption, or the same image file."""


@dataclass
class TokenizedText:
    """Captions packed into one run of tokens, without padding and without special tokens.

    Attributes:
        input_ids: (T,) int64 token ids.
        cu_seqlens: (B + 1,) int32, the start of each caption and the end of the last one.
        word_ids: (T,) int32, the number of each token's word within its caption.
        longest: the tokens of the longest caption, or an upper bound, for code that must not wait for a GPU; None where
            nobody has looked (see `measured`).
    """

    input_ids: Tensor
    cu_seqlens: Tensor
    word_ids: Tensor
    longest: int | None = None

    def __len__(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each caption: (B,) int32."""
        return self.cu_seqlens.diff()

    def measured(self) -> "TokenizedText":
        """Return the text with the length of its longest caption. On a GPU this waits, so measure before moving."""
        if self.longest is not None:
            return self
        return replace(self, longest=int(self.lengths.max()) if len(self) else 0)

    def slice(self, start: int, stop: int) -> "TokenizedText":
        """Captions `start` to `stop - 1`, contiguous. On a GPU this waits for the device, so split before moving."""
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"captions {start} to {stop} are not within the {len(self)} of this text")
        first, last = self.cu_seqlens[[start, stop]].tolist()
        cu_seqlens = self.cu_seqlens[start : stop + 1] - first
        return TokenizedText(self.input_ids[first:last], cu_seqlens, self.word_ids[first:last])

    def take(self, i: int) -> "TokenizedText":
        """Caption `i` alone, as a text of one caption."""
        return self.slice(i, i + 1)

    def split(self, parts: int) -> "list[TokenizedText]":
        """Split into contiguous parts with equal numbers of captions. Raises ValueError where they do not divide."""
        size = _part_size(len(self), parts)
        return [self.slice(k * size, (k + 1) * size) for k in range(parts)]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TokenizedText":
        """Copy the text to another device."""
        return TokenizedText(
            self.input_ids.to(device, non_blocking=non_blocking),
            self.cu_seqlens.to(device, non_blocking=non_blocking),
            self.word_ids.to(device, non_blocking=non_blocking),
            self.longest,
        )


def no_text(count: int) -> TokenizedText:
    """`count` captions without tokens, for a batch of images alone."""
    empty = torch.zeros(0, dtype=torch.int64)
    return TokenizedText(empty, torch.zeros(count + 1, dtype=torch.int32), empty.int())


@dataclass
class PairBatch:
    """One rank's part of the batch of one step.

    Attributes:
        images: (B, 3, S, S) uint8, contiguous.
        text: the B captions, packed.
        samples: (B,) int64, the place of each pair in the global batch; place and step key every random draw.
        corrupt: how many samples could not be read and were replaced, substitutes included.
        corrupt_names: the name of each of them, and what is wrong with it.
        second: (B, 3, S, S) uint8, another crop of each image; None where nobody asked for one.
        caption_ids: (B,) int64, of `oner_fast.data.caption_ids`: the ids of the images where the loader was asked for
            those, otherwise of the captions, from which they are made where none are given.
        inputs: what the training made of the batch where it was loaded (see `Prepare`): a nest of dataclasses, tuples
            and dicts of tensors and of plain numbers. None where nobody asked for it.
        buffer: (bytes,) uint8, of which all tensors of the batch are views; None where they have memory of their own.
    """

    images: Tensor
    text: TokenizedText
    samples: Tensor
    captions: list[str]
    step: int
    epoch: int
    corrupt: int = 0
    corrupt_names: list[str] = field(default_factory=list)
    second: Tensor | None = None
    caption_ids: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    inputs: Any = None
    buffer: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.caption_ids) != len(self.captions):
            self.caption_ids = caption_ids(self.captions)

    def __len__(self) -> int:
        return self.images.shape[0]

    def split(self, parts: int) -> "list[PairBatch]":
        """Split into contiguous micro-batches, without `inputs`; the first keeps the count of corrupt samples.

        Raises ValueError where the pairs do not divide into `parts`.
        """
        size = _part_size(len(self), parts)
        chunks = []
        for k, text in enumerate(self.text.split(parts)):
            part = slice(k * size, (k + 1) * size)
            corrupt, names = (self.corrupt, self.corrupt_names) if k == 0 else (0, [])
            chunks.append(
                PairBatch(
                    self.images[part],
                    text,
                    self.samples[part],
                    self.captions[part],
                    self.step,
                    self.epoch,
                    corrupt,
                    list(names),
                    None if self.second is None else self.second[part],
                    self.caption_ids[part],
                )
            )
        return chunks

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PairBatch":
        """Copy the batch's tensors, its inputs included, to another device by one copy; a batch that is there stays.

        With `non_blocking` the host does not wait for a copy from page-locked memory (see `pin_memory`).
        """
        here, there = self.images.device, torch.device(device)
        if here.type == there.type and there.index in (None, here.index):
            return self
        whole = self if self.buffer is not None else self._packed(pin=False)
        assert whole.buffer is not None
        buffer, batch = moved(whole.buffer, replace(whole, buffer=None), device, non_blocking=non_blocking)
        return replace(batch, buffer=buffer)

    def pin_memory(self) -> "PairBatch":
        """Copy the batch's tensors into one page-locked buffer, so that its copy to a GPU overlaps with the step."""
        return self._packed(pin=True)

    def _packed(self, pin: bool) -> "PairBatch":
        buffer, batch = packed(replace(self, buffer=None), pin=pin)
        return replace(batch, buffer=buffer)


Prepare = Callable[[PairBatch], Any]
"""A function that makes a training's inputs of a batch where it is loaded: masks, token ids, numbers that the host must
know. It is called in the loader's workers, so it can be pickled, and it draws from no generator."""


_SMALL = 2**20


def prepared(batch: PairBatch, prepare: Prepare | None) -> PairBatch:
    """Return the batch with its inputs.

    All tensors but the images share one buffer then: a worker hands over each piece of memory by a file descriptor of
    its own, and a process may open only so many.
    """
    if prepare is None:
        return batch
    return packed(replace(batch, inputs=prepare(batch)), at_most=_SMALL)[1]


def _part_size(items: int, parts: int) -> int:
    if parts < 1 or items % parts:
        raise ValueError(f"{items} pairs do not divide into {parts} equal parts")
    return items // parts
