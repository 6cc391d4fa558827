"""The teacher's targets of a training's batches: from the cache where they are, beside the student's work on a GPU."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from oner_fast.data.batch import PairBatch
from oner_fast.models.teacher import Teacher
from oner_fast.train.teacher_cache import FeatureCache


class _Pending(NamedTuple):
    """Tokens on the way, and what a cache still has to be given: the step, its first place and its pictures."""

    tokens: Tensor
    ready: torch.cuda.Event | None
    store: tuple[int, int, Tensor] | None


class TeacherFeatures:
    """``submit(batch)`` begins, ``take()`` gives the tokens (B, 1 + N, E) of the batch submitted first and not taken.

    On a GPU the teacher runs on a stream of its own: submit the next batch before the student's step of this one, and
    both run at once. On the CPU ``submit`` computes. With a cache a step's tokens have the same bits whether they were
    stored before or are computed now; a run that fills it waits for the copy of each step.
    """

    def __init__(self, teacher: Teacher, cache: FeatureCache | None = None) -> None:
        self.teacher, self.cache = teacher, cache
        self.computed, self.served = 0, 0
        """Batches that the teacher computed, and that the cache gave."""
        self._device = next(teacher.parameters()).device
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._pending: deque[_Pending] = deque()

    def __len__(self) -> int:
        """Batches submitted and not yet taken."""
        return len(self._pending)

    def submit(self, batch: PairBatch) -> None:
        """Begin with a batch, whose pictures lie on the CPU (pinned, for copies that overlap) or on the teacher's
        device."""
        place = int(batch.samples[0]) if self.cache is not None else 0
        stored = None if self.cache is None else self.cache.get(batch.step, batch.images.cpu(), place)
        store = None
        if stored is None:
            self.computed += 1
            store = None if self.cache is None else (batch.step, place, batch.images)
        else:
            self.served += 1
        if self._stream is None:
            tokens = self.teacher.tokens(batch.images) if stored is None else stored.to(self.teacher.dtype)
            self._pending.append(_Pending(tokens, None, store))
            return
        if batch.images.is_cuda:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            batch.images.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            if stored is None:
                tokens = self.teacher.tokens(batch.images.to(self._device, non_blocking=True))
            else:
                tokens = stored.pin_memory().to(self._device, non_blocking=True).to(self.teacher.dtype)
            ready = torch.cuda.Event()
            ready.record(self._stream)
        self._pending.append(_Pending(tokens, ready, store))

    def take(self) -> Tensor:
        """Tokens (B, 1 + N, E) in the teacher's dtype, ordered before what the current stream does next.

        Raises:
            ValueError: nothing was submitted.
        """
        if not self._pending:
            raise ValueError("take() needs a batch that was submitted and not yet taken, and there is none")
        pending = self._pending.popleft()
        tokens = pending.tokens
        if pending.ready is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(pending.ready)
            # Freed by this stream's work, though allocated on the other.
            tokens.record_stream(current)
        if pending.store is not None and self.cache is not None:
            step, place, images = pending.store
            kept = self.cache.put(step, images.cpu(), tokens, place)
            tokens = kept.to(device=self._device, dtype=self.teacher.dtype)
        return tokens
