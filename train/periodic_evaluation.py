"""Evaluate a model on held-out pairs while it trains, and keep the best one as a model of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from oner_fast.data.dataset import PairDataset
from oner_fast.data.identity import shared_tars
from oner_fast.data.images import eval_transform
from oner_fast.data.splits import exists, open_split, splits_of
from oner_fast.evaluation.run import evaluate_split
from oner_fast.evaluation.sharing import shared
from oner_fast.evaluation.zero_shot import TEMPLATES
from oner_fast.train.config.common import Data, Run
from oner_fast.train.engine.best import SCORE
from oner_fast.train.engine.distributed import World

_KS = (1, 5, 10)


class TrainedEncoder:
    """A model in training, in the form that evaluation reads.

    Args:
        image_size: side of its images, in pixels.
        device: where it computes.
        images: embeds uint8 images (B, 3, S, S): (B, E).
        texts: embeds B captions: (B, E).
    """

    def __init__(
        self,
        image_size: int,
        device: torch.device,
        images: Callable[[Tensor], Tensor],
        texts: Callable[[list[str]], Tensor],
    ) -> None:
        self.preprocess: Callable[[Image.Image], Tensor] = eval_transform(image_size)
        self.device, self._images, self._texts = device, images, texts

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed (B, 3, S, S) uint8: (B, E) float32, L2-normalised."""
        return F.normalize(self._images(images.to(self.device)).float(), dim=-1)

    def encode_text(self, texts: list[str]) -> Tensor:
        """Embed B captions: (B, E) float32, L2-normalised."""
        return F.normalize(self._texts(texts).float(), dim=-1)

    def encode_patches(self, images: Tensor) -> Tensor:
        """Retrieval and classification need no patches."""
        raise NotImplementedError("a model in training embeds no patches")


class PeriodicEvaluation:
    """Evaluate on the validation split; every rank makes one and calls it, and the ranks share the work.

    Args:
        data: names the validation split.
        run: the number of pairs.
        world: the ranks.
        module: the model, which is in evaluation mode meanwhile.
        encoder: the same model.

    Raises:
        ValueError: there is no validation split, or a tar of it is trained on.
    """

    def __init__(self, data: Data, run: Run, world: World, module: nn.Module, encoder: TrainedEncoder) -> None:
        self.dataset, self.name = _validation(data), data.val_split
        self.limit = run.eval_pairs or None
        self.world, self.module, self.encoder = world, module, encoder

    def __call__(self) -> dict[str, float]:
        """Return the metrics `eval/...`: R@k in both directions, their mean, zero-shot accuracy, gap, damaged images.

        Neither the parameters nor the random state change.
        """
        training = self.module.training
        self.module.eval()
        try:
            with shared(self.world, quiet=True):
                found = evaluate_split(
                    self.encoder, self.dataset, self.name, None, templates=TEMPLATES, limit=self.limit
                )[self.name]
        finally:
            self.module.train(training)
        return _metrics(found)


def _metrics(found: dict[str, Any]) -> dict[str, float]:
    recalls = {
        f"eval/{way}/R@{k}": float(found[way][f"R@{k}"]) for way in ("image_to_text", "text_to_image") for k in _KS
    }
    # The mean over k and both directions is our choice.
    metrics = recalls | {SCORE: sum(recalls.values()) / len(recalls)}
    metrics |= {f"eval/zero_shot/{top}": float(found["zero_shot"][top]) for top in ("top1", "top5")}
    return metrics | {"eval/modality_gap": float(found["modality_gap"]), "eval/damaged": float(found["damaged"])}


def _validation(data: Data) -> PairDataset:
    source, unnamed = (data.val_data, "val") if data.val_data else (data.train_data, "train")
    if not exists(source) or data.val_split not in splits_of(source, unnamed):
        raise ValueError(
            f"--eval-every needs validation pairs, and {source} has no split {data.val_split!r}; give --val-data"
        )
    dataset = open_split(source, data.val_split, unnamed)
    if exists(data.train_data):
        training = open_split(data.train_data, data.train_split, data.train_split)
        if found := shared_tars(dataset.indexes, training.indexes):
            raise ValueError(
                f"{found[0].path} is trained on ({found[0].how} as {found[0].other}), so that it is no validation data "
                "for --eval-every; give --val-data"
            )
    return dataset
