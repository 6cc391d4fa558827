"""Work of one GPU in a step of OneR: the lengths of its sequences and the rows of its matrix products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from oner_fast.data.batch import PairBatch
from oner_fast.models.oner import OneRConfig, PassName
from oner_fast.train.oner.inputs import StudentInput, student_passes
from oner_fast.train.oner.settings import OneRConfiguration


@dataclass(frozen=True)
class Sequences:
    """Sequences of some passes, which one packed batch holds.

    Args:
        lengths: tokens of each sequence.
        key_lengths: tokens that each attends to.
        wanted: outputs of each that the last block computes.
    """

    lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    wanted: tuple[float, ...]

    @property
    def tokens(self) -> int:
        """Rows of the packed batch."""
        return sum(self.lengths)

    @property
    def kept(self) -> float:
        """Rows that the last block computes."""
        return sum(self.wanted)


@dataclass(frozen=True)
class Workload:
    """One GPU's part of a step.

    Args:
        config: the recipe.
        pairs: pairs of this GPU.
        words: tokens of all captions.
        passes: the student's passes.
        student, teacher: their sequences; the teacher's are empty where there is none.
        student_patches, teacher_patches: patches that are embedded.
        masked_patches: patches that are hidden and predicted, in all passes.
        masked_words: words that are hidden and predicted, in all passes.
        cells: patches of one image.
    """

    config: OneRConfiguration
    pairs: int
    words: int
    passes: tuple[PassName, ...]
    student: Sequences
    teacher: Sequences
    student_patches: int
    teacher_patches: int
    masked_patches: int
    masked_words: float
    cells: int

    @property
    def model(self) -> OneRConfig:
        """The tower's sizes."""
        return self.config.model


def spread(pairs: int, mean: int) -> list[int]:
    """Return the lengths of `pairs` captions, spread evenly from half the mean to one and a half of it."""
    low, high = mean - mean // 2, mean + mean // 2
    return [low + round(index * (high - low) / max(pairs - 1, 1)) for index in range(pairs)]


def expected(config: OneRConfiguration, ranks: int, caption_tokens: int) -> Workload:
    """Return the part of one of `ranks` GPUs, with as many masked words as are expected.

    Raises:
        ValueError: the batch cannot be divided, or captions are longer than the model's.
    """
    optim = config.optim
    if optim.batch_size % ranks:
        raise ValueError(f"{ranks} GPUs do not divide the batch of {optim.batch_size} pairs: give another --ranks")
    pairs = optim.batch_size // ranks
    words = spread(pairs, caption_tokens)
    if caption_tokens < 1 or max(words) > config.model.max_text_tokens:
        raise ValueError(
            f"captions of {max(words)} tokens do not fit max_text_tokens {config.model.max_text_tokens}: "
            "give another --caption-tokens"
        )
    ratio = config.objectives.mask_word_ratio if config.objectives.mlm else 0.0
    masked = [ratio * length for length in words]
    return _workload(config, words, {"text": masked, "image_text": masked})


def drawn(config: OneRConfiguration, batch: PairBatch, masked: StudentInput) -> Workload:
    """Return the workload of one batch with its own masks."""
    bounds = batch.text.cu_seqlens.tolist()
    counts: dict[PassName, list[float]] = {}
    for name, targets in masked.words.items():
        rows = targets.rows.tolist()
        counts[name] = [
            float(sum(low <= row < high for row in rows)) for low, high in zip(bounds, bounds[1:], strict=False)
        ]
    return _workload(config, batch.text.lengths.tolist(), counts)


def _workload(
    config: OneRConfiguration, words: Sequence[int], masked_words: dict[PassName, list[float]]
) -> Workload:  # fmt: skip
    model, objectives, pairs = config.model, config.objectives, len(words)
    cells = (model.image_size // model.patch_size) ** 2
    kept = cells - int(objectives.force_patch_dropout * cells)
    hidden = int(objectives.mask_patch_ratio * kept) if objectives.mim else 0
    names = student_passes(objectives, model.shared_trunk)
    image, text = [1 + kept] * pairs, [1 + length for length in words]
    joint = [kept + length for length in text]
    none = [0.0] * pairs
    of_text, of_joint = (masked_words.get(name, none) if objectives.mlm else none for name in ("text", "image_text"))
    shapes: dict[PassName, tuple[Sequence[int], Sequence[int], Sequence[float]]] = {
        "image": (image, image, [1.0 + hidden] * pairs),
        "text": (text, text, [1 + count for count in of_text]),
        "image_text": (joint, joint, [1 + hidden + count for count in of_joint]),
        "image_given_text": (image, text, [1.0] * pairs),
        "text_given_image": (text, image, [1.0] * pairs),
    }

    def joined(place: int) -> Iterator[float]:
        return (value for name in names for value in shapes[name][place])

    student = Sequences(
        tuple(int(one) for one in joined(0)), tuple(int(one) for one in joined(1)), tuple(joined(2))
    )  # fmt: skip
    streams = ("image_text" in names) + bool({"image", "image_given_text"} & set(names))
    with_teacher = objectives.contrastive and objectives.momentum_teacher
    seen = tuple([1 + cells] * pairs + text) if with_teacher else ()
    predicted = sum(of_text) * ("text" in names) + sum(of_joint) * ("image_text" in names)
    return Workload(
        config=config,
        pairs=pairs,
        words=sum(words),
        passes=names,
        student=student,
        teacher=Sequences(seen, seen, (1.0,) * len(seen)),
        student_patches=streams * pairs * (kept - hidden),
        teacher_patches=pairs * cells if with_teacher else 0,
        masked_patches=streams * pairs * hidden,
        masked_words=predicted,
        cells=cells,
    )
