"""Pairs from streamed tars, through webdataset: pipes, web addresses and object stores.

A stream has no random access, so its order is not a function of (seed, step): it depends on the workers and the ranks,
and a resumed run begins a new pass. `loader.PairLoader` over tars on disk resumes exactly.
"""

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from typing import Any

import numpy as np
import torch
import webdataset
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from oner_fast.data.batch import PairBatch, Prepare, SameBy, no_text, prepared
from oner_fast.data.budget import excess
from oner_fast.data.caption_ids import image_id
from oner_fast.data.dataset import CorruptSample, caption_of, fields_of
from oner_fast.data.images import EvalTransform, ImageTransform, decode
from oner_fast.data.permutation import Permutation
from oner_fast.data.tar_index import IMAGE, KINDS
from oner_fast.data.tokenizer import Tokenizer
from oner_fast.data.workers import Batches, in_workers
from oner_fast.philox import AUGMENT, random_u32

logger = logging.getLogger("oner_fast.data")


class _StreamSource(IterableDataset[PairBatch]):
    """Yield a rank's batches from its streams, pass after pass; worker w of W makes the batches w, w + W, ..."""

    def __init__(
        self,
        urls: list[str],
        tokenizer: Tokenizer | None,
        *,
        size: int,
        seed: int,
        transform: ImageTransform | EvalTransform,
        rank: int,
        world_size: int,
        start_step: int,
        start_pass: int,
        max_tokens: int,
        shuffle: int,
        captions: bool,
        second_view: bool,
        same_by: SameBy,
        prepare: Prepare | None,
    ) -> None:
        self.same_by = same_by
        self.prepare = prepare
        self.urls = urls
        self.views = 2 if second_view else 1
        self.tokenizer = tokenizer
        self.size = size
        self.seed = seed
        self.transform = transform
        self.rank = rank
        self.world_size = world_size
        self.start_step = start_step
        self.start_pass = start_pass
        self.max_tokens = max_tokens
        self.captions = captions
        self.shuffle = shuffle
        self.failures: list[str] = []

    def __iter__(self) -> Iterator[PairBatch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        samples = torch.arange(self.rank * self.size, (self.rank + 1) * self.size)
        pairs = self._pairs(worker, workers)
        size, last_good = self.transform.size, self.start_pass
        for step in count(self.start_step + worker, workers):
            randoms = random_u32(self.seed, AUGMENT, step, samples, self.views * self.transform.randoms).numpy()
            images = torch.empty((self.views, self.size, 3, size, size), dtype=torch.uint8)
            captions: list[str] = []
            ids: list[int] = []
            epoch = 0
            while len(captions) < self.size:
                row = len(captions)
                epoch, sample = next(pairs)
                try:
                    caption, image = self._read(sample, images[:, row], randoms[row])
                    captions.append(caption)
                    ids.append(image)
                    last_good = epoch
                except CorruptSample as error:
                    if epoch > last_good + 1:
                        raise RuntimeError(f"a whole pass over the streams gave no readable pair; {error}") from error
                    self.failures.append(str(error))
            failures, self.failures = self.failures, []
            text = self.tokenizer(captions, self.max_tokens) if self.tokenizer else no_text(self.size)
            second = images[1] if self.views > 1 else None
            batch = PairBatch(images[0], text, samples, captions, step, epoch, len(failures), failures, second)
            if self.same_by == "image":
                batch = replace(batch, caption_ids=torch.tensor(ids))
            yield prepared(batch, self.prepare)

    def _pairs(self, worker: int, workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield samples with the number of their pass.

        Each pass takes the streams in another order. Where there are fewer streams than workers, the workers share the
        samples.
        """
        parts, part = self.world_size * workers, self.rank * workers + worker
        for epoch in count(self.start_pass):
            order = Permutation(len(self.urls), self.seed, epoch).take(np.arange(len(self.urls))).tolist()
            urls = [self.urls[k] for k in order]
            deal = len(urls) < parts
            samples: Iterator[dict[str, Any]] = iter(
                webdataset.WebDataset(
                    urls if deal else urls[part::parts],
                    handler=self._failed,
                    shardshuffle=False,
                    nodesplitter=None,
                    workersplitter=None,
                    empty_check=False,
                )
            )
            samples = islice(samples, part, None, parts) if deal else samples
            if self.shuffle > 1:
                mixer = random.Random(f"{self.seed} {epoch} {part}")
                samples = webdataset.shuffle(self.shuffle, initial=self.shuffle, rng=mixer)(samples)
            found = False
            for sample in samples:
                found = True
                yield epoch, sample
            if not found:
                why = f": {self.failures[-1]}" if self.failures else ""
                raise RuntimeError(f"a whole pass over {len(self.urls)} streams gave no sample{why}")

    def _failed(self, error: Exception) -> bool:
        self.failures.append(f"stream: {type(error).__name__}: {error}")
        return True

    def _read(
        self, sample: dict[str, Any], place: Tensor, randoms: "np.ndarray[Any, np.dtype[np.int64]]"
    ) -> tuple[str, int]:
        name = f"{sample['__url__']}:{sample['__key__']}"
        image = next((data for extension, data in sample.items() if KINDS.get(extension) == IMAGE), None)
        if image is None:
            there = ", ".join(sorted(extension for extension in sample if not extension.startswith("__")))
            raise CorruptSample(name, f"it has no image (a key ends at its first dot; its members are {there})")
        if over := excess("image_bytes", len(image)):
            raise CorruptSample(name, over)
        same = image_id(image) if self.same_by == "image" else 0
        if not self.captions:
            self._fill(place, image, name, randoms)
            return "", same
        text, meta = sample.get("txt"), sample.get("json")
        caption = caption_of(name, text, fields_of(name, meta) if text is None and meta is not None else {})
        self._fill(place, image, name, randoms)
        return caption, same

    def _fill(self, place: Tensor, encoded: bytes, name: str, randoms: "np.ndarray[Any, np.dtype[np.int64]]") -> None:
        image = decode(encoded, name, self.transform.decode_side)
        for view, target in enumerate(place):
            draws = self.transform.randoms
            target.copy_(self.transform(image, randoms[view * draws : (view + 1) * draws]))


class StreamedPairs(Batches):
    """Endless batches from streamed tars, in the form of `PairLoader`'s.

    Streams are divided among ranks and workers; where there are too few, their samples are divided instead. Samples
    that cannot be read are counted and left out. A run cannot resume exactly, and the log says so once. A `pipe:`
    command runs in a shell, so name only commands that you trust.

    Args:
        urls: one address or several, with braces expanded: `pipe:COMMAND` (the command writes a tar; an object store is
            read by its own client in this way), `http(s)://...`, or a path.
        shuffle: size of the shuffle buffer, in samples.
        prepare: makes the `inputs` of each batch, in the process that loads it.

    Raises:
        ValueError: as for PairLoader, or there is no address.
        RuntimeError: a pass gives no sample.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
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
        shuffle: int = 1000,
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
        self.urls = [one for url in ([urls] if isinstance(urls, str) else urls) for one in _expand(url)]
        if not self.urls:
            raise ValueError("urls must name at least one stream")
        self.transform = transform or ImageTransform(image_size)
        if self.transform.size != image_size:
            raise ValueError(f"the transform makes {self.transform.size} px, but image_size is {image_size}")
        self.tokenizer = tokenizer
        self.epoch = 0
        self._part = {"rank": rank, "world_size": world_size, "max_tokens": max_tokens, "shuffle": shuffle}
        self._workers, self._prefetch, self._pin_memory = workers, prefetch, pin_memory
        self._captions, self._second_view, self._same_by, self._said = captions, second_view, same_by, False
        self._prepare = prepare

    def _start(self) -> Iterator[PairBatch]:
        if not self._said:
            logger.warning("streamed data: the order is not exactly reproducible, and a resumed run begins a new pass")
            self._said = True
        source = _StreamSource(
            self.urls,
            self.tokenizer,
            size=self.batch_size // self._part["world_size"],
            seed=self.seed,
            transform=self.transform,
            start_step=self.step,
            start_pass=self.epoch,
            captions=self._captions,
            second_view=self._second_view,
            same_by=self._same_by,
            prepare=self._prepare,
            **self._part,
        )
        if self._workers == 0:
            return (batch.pin_memory() for batch in source) if self._pin_memory else iter(source)
        return in_workers(source, None, self._workers, self._prefetch, self._pin_memory)

    def __next__(self) -> PairBatch:
        """Make the batch of the next step."""
        batch = super().__next__()
        self.epoch = batch.epoch
        return batch

    def state_dict(self) -> dict[str, int]:
        """The seed, the next step and the pass; a stream has no position to return to."""
        return {"seed": self.seed, "step": self.step, "epoch": self.epoch, "position": 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue counting from the state's step, with a new pass over the streams."""
        self.close()
        self.step, self.epoch = int(state["step"]), int(state["epoch"]) + 1


def _expand(url: str) -> list[str]:
    import braceexpand  # webdataset installs it

    return [url] if "{" not in url else list(braceexpand.braceexpand(url))
