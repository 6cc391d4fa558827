"""The teacher's targets for each batch, from the cache or computed; on a GPU, in parallel with the student."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from oner_fast.data.batch import PairBatch
from oner_fast.models.teacher import Teacher
from oner_fast.train.uta.teacher_cache import FeatureCache


class _Pending(NamedTuple):
    """Tokens in flight, the event after which they are ready, and whether they still have to be cached."""

    batch: PairBatch  # on the teacher's device
    tokens: Tensor
    ready: torch.cuda.Event | None
    to_store: bool


class TeacherFeatures:
    """Get the teacher's tokens (B, 1 + N, E) of a batch: `take(batch)` returns them, `submit(batch)` starts them early.

    A batch is copied to the teacher's device once, for the teacher and the student. On a GPU the copy and the teacher
    run on their own stream: submit the next batch before the student's step of this one (`Batches.ahead` does), and
    both run at once. On the CPU that gains nothing. With a cache, a step's tokens have the
    same bits whether they were stored before or are computed now. A run that fills the cache waits for the copy of
    each step.
    """

    def __init__(self, teacher: Teacher, cache: FeatureCache | None = None) -> None:
        self.teacher, self.cache = teacher, cache
        self.computed, self.cached = 0, 0
        """Number of batches that the teacher computed, and number that came from the cache."""
        self._device = next(teacher.parameters()).device
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        if self._stream is not None:  # the teacher's weights may still be on their way there
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._pending: deque[_Pending] = deque()

    @property
    def overlaps(self) -> bool:
        """Whether a batch submitted early is computed in parallel with other work, as on a GPU."""
        return self._stream is not None

    def submit(self, batch: PairBatch) -> None:
        """Start a batch, which is on the CPU (pinned, for a copy that overlaps) or on the teacher's device."""
        stored = None
        if self.cache is not None:
            stored = self.cache.get(batch.step, batch.images.cpu(), _place(batch))
        if stored is None:
            self.computed += 1
        else:
            self.cached += 1
        there, tokens, ready = self._on_cpu(batch, stored) if self._stream is None else self._beside(batch, stored)
        self._pending.append(_Pending(there, tokens, ready, self.cache is not None and stored is None))

    def take(self, batch: PairBatch) -> tuple[PairBatch, Tensor]:
        """Return the batch on the teacher's device, and its tokens in the teacher's dtype.

        Both are ordered before the next work of the current stream. Earlier submissions of other steps are dropped: a
        restarted loader submits its batches again.
        """
        while self._pending and self._pending[0].batch.step != batch.step:
            self._pending.popleft()
        if not self._pending:
            self.submit(batch)
        pending = self._pending.popleft()
        tokens = pending.tokens
        if pending.ready is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(pending.ready)
            # The memory belongs to the other stream, which must not reuse it too early.
            tokens.record_stream(current)
            if pending.batch.buffer is not None:
                pending.batch.buffer.record_stream(current)
        if pending.to_store and self.cache is not None:
            kept = self.cache.put(batch.step, batch.images.cpu(), tokens, _place(batch))
            tokens = kept.to(device=self._device, dtype=self.teacher.dtype)
        return pending.batch, tokens

    def _on_cpu(self, batch: PairBatch, stored: Tensor | None) -> tuple[PairBatch, Tensor, None]:
        tokens = self.teacher.tokens(batch.images) if stored is None else stored.to(self.teacher.dtype)
        return batch, tokens, None

    def _beside(self, batch: PairBatch, stored: Tensor | None) -> tuple[PairBatch, Tensor, torch.cuda.Event]:
        """Copy the batch and compute or copy its tokens on the teacher's stream.

        Returns:
            The batch, its tokens, and the event after which both are ready.
        """
        assert self._stream is not None
        if batch.images.is_cuda:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            batch.images.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            there = batch.to(self._device, non_blocking=True)
            if stored is None:
                tokens = self.teacher.tokens(there.images)
            else:
                tokens = stored.pin_memory().to(self._device, non_blocking=True).to(self.teacher.dtype)
            ready = torch.cuda.Event()
            ready.record(self._stream)
        return there, tokens, ready


def _place(batch: PairBatch) -> int:
    """Return the index in the global batch at which this rank's part begins."""
    return int(batch.samples[0])
