"""Batches of image-text pairs whose order and bytes are a pure function of (seed, step)."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from oner_fast.data.batch import PairBatch, Prepare, SameBy, no_text, prepared
from oner_fast.data.caption_ids import image_id
from oner_fast.data.dataset import CorruptSample, PairDataset
from oner_fast.data.images import EvalTransform, ImageTransform, decode
from oner_fast.data.permutation import Permutation
from oner_fast.data.substitution import CANDIDATES, substitutes
from oner_fast.data.tokenizer import Tokenizer
from oner_fast.data.workers import Batches, in_workers
from oner_fast.philox import AUGMENT, random_u32


class PairSource(Dataset[PairBatch]):
    """Make the batch of any step: `source[step]`. Nothing that happened before changes a batch."""

    def __init__(
        self,
        dataset: PairDataset,
        tokenizer: Tokenizer | None,
        *,
        batch_size: int,
        seed: int,
        transform: ImageTransform | EvalTransform,
        rank: int,
        world_size: int,
        max_tokens: int,
        captions: bool,
        second_view: bool = False,
        same_by: SameBy = "caption",
        prepare: Prepare | None = None,
    ) -> None:
        self.dataset = dataset
        self.prepare = prepare
        self.same_by = same_by
        self.captions = captions
        self.views = 2 if second_view else 1
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.seed = seed
        self.transform = transform
        self.max_tokens = max_tokens
        self.steps_per_epoch = len(dataset) // batch_size
        share = batch_size // world_size
        self.places = np.arange(rank * share, (rank + 1) * share)
        self._order = Permutation(len(dataset), seed, 0)
        self._epoch = 0

    def __getitem__(self, step: int) -> PairBatch:
        """Make this rank's part of the batch of `step`, in any process."""
        epoch, within = divmod(step, self.steps_per_epoch)
        slots = within * self.batch_size + self.places
        if epoch != self._epoch:
            self._order, self._epoch = Permutation(len(self.dataset), self.seed, epoch), epoch
        samples = torch.from_numpy(self.places.copy())
        # The draws of a second view follow those of the first, which it leaves as they are.
        randoms = random_u32(self.seed, AUGMENT, step, samples, self.views * self.transform.randoms).numpy()
        size = self.transform.size
        images = torch.empty((self.views, len(slots), 3, size, size), dtype=torch.uint8)
        captions: list[str] = []
        ids: list[int] = []
        corrupt: list[str] = []
        for row, (slot, first) in enumerate(zip(slots.tolist(), self._order.take(slots).tolist(), strict=True)):
            names, (caption, image) = self._fill(images[:, row], randoms[row], epoch, slot, first)
            captions.append(caption)
            ids.append(image)
            corrupt += names
        text = self.tokenizer(captions, self.max_tokens) if self.tokenizer else no_text(len(slots))
        second = images[1] if self.views > 1 else None
        batch = PairBatch(images[0], text, samples, captions, step, epoch, len(corrupt), corrupt, second)
        if self.same_by == "image":
            batch = replace(batch, caption_ids=torch.tensor(ids))
        return prepared(batch, self.prepare)

    def _fill(
        self, place: Tensor, randoms: NDArray[np.int64], epoch: int, slot: int, first: int
    ) -> tuple[list[str], tuple[str, int]]:
        """Read the views of a slot's image into `place`.

        Returns:
            The corrupt samples met on the way; the caption, and the image's id where it is asked for.
        """
        try:
            return [], self._read(place, randoms, first)
        except CorruptSample as error:
            corrupt = [str(error)]
        for candidate in substitutes(self.seed, epoch, slot, len(self.dataset)):
            try:
                return corrupt, self._read(place, randoms, candidate)
            except CorruptSample as error:
                corrupt.append(str(error))
        raise RuntimeError(
            f"slot {slot} of epoch {epoch}: its sample and all {CANDIDATES} substitutes are corrupt; the last is "
            f"{corrupt[-1]}. Is the dataset complete?"
        )

    def _read(self, place: Tensor, randoms: NDArray[np.int64], i: int) -> tuple[str, int]:
        if self.captions:
            pair = self.dataset.read(i, meta=False)
            encoded, caption = pair.image, pair.caption
        else:
            encoded, caption = self.dataset.picture(i), ""
        image = decode(encoded, self.dataset.name(i), self.transform.decode_side)
        for view, target in enumerate(place):
            draws = self.transform.randoms
            target.copy_(self.transform(image, randoms[view * draws : (view + 1) * draws]))
        return caption, image_id(encoded) if self.same_by == "image" else 0


class _Steps(Sampler[int]):
    """Yield start, start + 1, ... without end."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        step = self.start
        while True:
            yield step
            step += 1


class PairLoader(Batches):
    """Endless batches from `start_step` on; the batch of a step is a pure function of (seed, step).

    Step s is batch k = s mod steps_per_epoch of epoch s // steps_per_epoch, where steps_per_epoch is len(dataset) //
    batch_size. Its global batch holds the slots [k * batch_size, (k + 1) * batch_size) of that epoch's permutation, and
    rank r gets the r-th contiguous part. The number of workers, the world size and the first step do not change any
    byte. A sample that cannot be read is counted in `corrupt` and named once in the log "oner_fast.data". A substitute,
    which depends on (seed, epoch, slot) alone, takes its place.

    Args:
        tokenizer: None leaves `text` empty.
        batch_size: pairs in a global batch.
        transform: `ImageTransform(image_size)` by default.
        workers: processes that make batches; 0 makes them in this process. Workers ignore Ctrl-C and SIGTERM, which the
            training process handles, and end when it ends for any reason.
        prefetch: batches that each worker makes ahead.
        captions: False reads no captions; then samples may lack them.
        second_view: make `second` too, another crop of each image, whose draws are keyed as those of the first.
        same_by: what `caption_ids` are ids of, the captions or the image files.
        prepare: makes the `inputs` of each batch, in the process that loads it.

    Raises:
        ValueError: the batch does not divide among the ranks or exceeds the dataset, or `image_size` is not the
            transform's.
    """

    def __init__(
        self,
        dataset: PairDataset,
        tokenizer: Tokenizer | None,
        *,
        batch_size: int,
        seed: int,
        image_size: int,
        transform: ImageTransform | EvalTransform | None = None,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        max_tokens: int = 78,
        prefetch: int = 4,
        pin_memory: bool = False,
        captions: bool = True,
        second_view: bool = False,
        same_by: SameBy = "caption",
        prepare: Prepare | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            start_step=start_step,
            workers=workers,
        )
        if tokenizer is not None and not captions:
            raise ValueError("captions=False leaves the tokenizer no captions: give tokenizer=None")
        if batch_size > len(dataset):
            raise ValueError(f"batch_size {batch_size} exceeds the dataset's {len(dataset)} samples")
        transform = transform or ImageTransform(image_size)
        if transform.size != image_size:
            raise ValueError(f"the transform makes {transform.size} px, but image_size is {image_size}")
        self.source = PairSource(
            dataset,
            tokenizer,
            batch_size=batch_size,
            seed=seed,
            transform=transform,
            rank=rank,
            world_size=world_size,
            max_tokens=max_tokens,
            captions=captions,
            second_view=second_view,
            same_by=same_by,
            prepare=prepare,
        )
        self._workers, self._prefetch, self._pin_memory = workers, prefetch, pin_memory

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole batches in an epoch; an epoch leaves out the remaining samples of its permutation."""
        return self.source.steps_per_epoch

    @property
    def epoch(self) -> int:
        """Epoch of the next step."""
        return self.step // self.steps_per_epoch

    def _start(self) -> Iterator[PairBatch]:
        steps = _Steps(self.step)
        if self._workers == 0:
            batches = map(self.source.__getitem__, steps)
            return (batch.pin_memory() for batch in batches) if self._pin_memory else batches
        return in_workers(self.source, steps, self._workers, self._prefetch, self._pin_memory)

    def state_dict(self) -> dict[str, int]:
        """Position in the data: seed, next step, its epoch, its first slot in that epoch, and number of samples."""
        return {
            "seed": self.seed,
            "step": self.step,
            "epoch": self.epoch,
            "position": self.step % self.steps_per_epoch * self.batch_size,
            "samples": len(self.source.dataset),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises ValueError where the state belongs to another order of samples."""
        if state["seed"] != self.seed:
            raise ValueError(f"the state was taken with seed {state['seed']}, this loader has seed {self.seed}")
        self.close()
        before, self.step = self.step, int(state["step"])
        if self.state_dict() != dict(state):
            mine, self.step = self.state_dict(), before
            raise ValueError(
                f"the state is at epoch {state['epoch']}, slot {state['position']} of {state['samples']} samples, "
                f"but step {state['step']} is at epoch {mine['epoch']}, slot {mine['position']} of {mine['samples']} "
                "here: the batch size or the dataset has changed"
            )
