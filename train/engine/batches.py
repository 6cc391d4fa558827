"""The batches of a training: from tars on disk, in an exactly reproducible order, or from streams."""

from __future__ import annotations

import logging
from typing import Any, Protocol

from oner_fast.data.batch import Prepare
from oner_fast.data.checksums import check_shards
from oner_fast.data.dataset import PairDataset, sources_of
from oner_fast.data.identity import shared_tars
from oner_fast.data.images import ImageTransform
from oner_fast.data.loader import PairLoader
from oner_fast.data.splits import exists, is_stream, open_split, splits_of
from oner_fast.data.streaming import StreamedPairs
from oner_fast.data.tokenizer import Tokenizer
from oner_fast.data.workers import Batches
from oner_fast.train.config.common import Data, Optimisation, Run
from oner_fast.train.engine.distributed import World

logger = logging.getLogger("oner_fast.train")


class HasImageSize(Protocol):
    """A model's configuration that states the side of its images, in pixels."""

    @property
    def image_size(self) -> int: ...


class BatchConfiguration(Protocol):
    """The fields of a training's configuration that its batches depend on."""

    @property
    def model(self) -> HasImageSize: ...

    @property
    def data(self) -> Data: ...

    @property
    def optim(self) -> Optimisation: ...

    @property
    def run(self) -> Run: ...


def build_tokenizer(data: Data) -> Tokenizer:
    """Learn the vocabulary from the training captions, or load the one that `data.tokenizer` names.

    Raises:
        ValueError: the captions are streamed, so that there are none to learn from before the training.
    """
    if data.tokenizer != "train":
        return Tokenizer.load(data.tokenizer)
    if is_stream(data.train_data):
        raise ValueError("streamed train_data needs --tokenizer PATH: a vocabulary is learnt from tars on disk only")
    return Tokenizer.train(PairDataset(data.train_data, data.train_split).captions(), data.tokenizer_vocab)


def open_batches(
    config: BatchConfiguration,
    tokenizer: Tokenizer | None,
    world: World,
    *,
    max_tokens: int = 0,
    captions: bool = True,
    second_view: bool = False,
    prepare: Prepare | None = None,
) -> Batches:
    """Open this rank's batches from step 0 on; `load_state_dict` continues elsewhere.

    Args:
        tokenizer: None leaves the captions as strings.
        max_tokens: the longest caption, in tokens.
        captions: False reads images only; samples may then lack a caption.
        second_view: make another crop of each image too.
        prepare: makes the `inputs` of each batch, in the process that loads it.

    Raises:
        ValueError: there is no such data, or fewer samples than a batch needs; or `data.verify_data` is set, and a
            shard differs from its recorded checksum or has none. Each rank reads its share of the shards.
    """
    data, image_size = config.data, config.model.image_size
    common: dict[str, Any] = {
        "batch_size": config.optim.batch_size,
        "seed": config.run.seed,
        "image_size": image_size,
        "transform": ImageTransform(
            image_size,
            (data.aug_scale, 1.0),
            flip=data.aug_flip,
            colour=data.aug_colour,
            operations=data.aug_operations,
            magnitude=data.aug_magnitude,
        ),
        "workers": data.workers,
        "rank": world.rank,
        "world_size": world.size,
        "max_tokens": max_tokens,
        "pin_memory": world.device.type == "cuda",
        "captions": captions,
        "second_view": second_view,
        "same_by": data.same_by,
        "prepare": prepare,
    }
    if is_stream(data.train_data):
        if data.verify_data:
            raise ValueError("streamed train_data has no recorded checksums: leave out --verify-data")
        return StreamedPairs(data.train_data, tokenizer, **common)
    if data.verify_data:
        sources = sources_of(data.train_data)
        checks = (check_shards(source, data.train_split, world.rank, world.size) for source in sources)
        checked = sum(1 for check in checks for _ in check)
        logger.info("the checksums of %d shards are those that were recorded", checked)
    dataset = PairDataset(data.train_data, data.train_split)
    _refuse_training_pairs(data, dataset)
    return PairLoader(dataset, tokenizer, **common)


def _refuse_training_pairs(data: Data, training: PairDataset) -> None:
    """Raise ValueError where the validation split of `val_data` has a tar that is trained on, under any name."""
    if not data.val_data or not exists(data.val_data) or data.val_split not in splits_of(data.val_data, "val"):
        return
    if found := shared_tars(open_split(data.val_data, data.val_split, "val").indexes, training.indexes):
        raise ValueError(
            f"val_data {found[0].path} is trained on ({found[0].how} as {found[0].other}), so that it is no validation "
            "data; give other --val-data, or none"
        )
