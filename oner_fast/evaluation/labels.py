"""Labels of a captioned data set: fields of its samples' json (a drawing style, a source), or the captions' concepts.

k-NN and the linear probe learn a label from features of the train split and predict it on a held-out split. A split of
concepts that are never trained on shares no concept with the train split, but it may share another label.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from oner_fast.data.dataset import CorruptSample, PairDataset
from oner_fast.data.sources.concepts import concept
from oner_fast.evaluation.classifier import score_accuracy
from oner_fast.evaluation.embed import Encoder, SplitEmbeddings, embed_pairs, name_left_out, spaced
from oner_fast.evaluation.knn import TEMPERATURE, K, knn_scores
from oner_fast.evaluation.linear_probe import LinearProbe, fit_linear_probe
from oner_fast.evaluation.retrieval import Ties

CONCEPT = "concept"
LABELS = (CONCEPT, "set")  # the default; `oner-fast data` calls a sample's source `set`


def label_of(caption: str, meta: dict[str, Any], name: str) -> str | None:
    """Find a sample's label; None where it has none.

    The label is the field `name` of its json or else, for "concept", the caption's concept.
    """
    value = meta.get(name)
    if isinstance(value, (str, int)) and value != "":
        return str(value)
    return concept(caption) if name == CONCEPT else None


@dataclass(frozen=True)
class Taught:
    """Features of training images with a label.

    `features` are (N, E), `labels` (N,) int64 places in `classes`.
    """

    classes: list[str]
    features: Tensor
    labels: Tensor

    @cached_property
    def probe(self) -> LinearProbe:
        """The linear probe, fitted at its first use."""
        return fit_linear_probe(self.features, self.labels, len(self.classes))

    def knn(self, image: Tensor, labels: Tensor, ties: Ties = "miss") -> dict[str, Any]:
        """Accuracy of the weighted k-NN on (N, E) images with (N,) labels; `ties` as for `score_accuracy`."""
        scores = knn_scores(self.features, self.labels, image, len(self.classes))
        about = {"k": min(K, len(self.features)), "temperature": TEMPERATURE, "train_images": len(self.features)}
        return score_accuracy(scores, labels, ties=ties) | about

    def linear_probe(self, image: Tensor, labels: Tensor, ties: Ties = "miss") -> dict[str, Any]:
        """Accuracy of the linear probe on (N, E) images with (N,) labels; `ties` as for `score_accuracy`."""
        about = {"l2": self.probe.l2, "train_images": len(self.features)}
        return score_accuracy(self.probe.scores(image), labels, ties=ties) | about


def teach(
    loaded: Encoder,
    dataset: PairDataset,
    names: Sequence[str],
    *,
    most: int = 1000,
    limit: int | None = None,
    batch_size: int = 64,
) -> dict[str, Taught]:
    """Embed the training images that have one of the labels.

    Args:
        names: names of the labels; a label with fewer than two classes in the data is left out.
        most: keep this many classes of each label, the most frequent ones.
        limit: take only this many samples of the split, evenly spaced.
        batch_size: images embedded at once.
    """
    if most < 2:
        raise ValueError(f"the number of classes needs to be at least 2, got {most}")
    labels: dict[str, dict[int, str]] = {name: {} for name in names}
    lost = []
    for row in spaced(len(dataset), limit):
        try:
            caption, meta = dataset.caption(row), dataset.meta(row)
        except CorruptSample as error:
            lost.append(str(error))
            continue
        for name in names:
            if (value := label_of(caption, meta, name)) is not None:
                labels[name][row] = value
    name_left_out(lost)
    classes = {name: _most_frequent(found.values(), most) for name, found in labels.items()}
    classes = {name: found for name, found in classes.items() if len(found) > 1}
    wanted = sorted({row for name, found in classes.items() for row, value in labels[name].items() if value in found})
    if not wanted:
        return {}
    image, rows, _, _ = embed_pairs(loaded, dataset, wanted, batch_size=batch_size, label="train")
    taught = {}
    for name, found in classes.items():
        place = {value: number for number, value in enumerate(found)}
        numbers = torch.tensor([place.get(labels[name].get(row, ""), -1) for row in rows])
        taught[name] = Taught(found, image[numbers >= 0], numbers[numbers >= 0])
    return taught


def ask(taught: Taught, name: str, embedded: SplitEmbeddings) -> tuple[Tensor, Tensor]:
    """Select the embedded images whose class occurs in the training images: (N, E) and (N,) labels; N may be 0."""
    place = {value: number for number, value in enumerate(taught.classes)}
    found = [
        place.get(label_of(captions[0], meta, name) or "", -1)
        for captions, meta in zip(embedded.captions, embedded.meta, strict=True)
    ]
    numbers = torch.tensor(found, dtype=torch.int64)
    return embedded.image[numbers >= 0], numbers[numbers >= 0]


def _most_frequent(values: Any, most: int) -> list[str]:
    """Sort values by frequency, the most frequent first, and equal ones alphabetically."""
    counts = Counter(values)
    return sorted(counts, key=lambda value: (-counts[value], value))[:most]
