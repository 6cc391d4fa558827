"""Count the floating-point operations that a step of OneR needs, from which MFU is computed."""

from __future__ import annotations

from oner_fast.data.batch import PairBatch
from oner_fast.models import forward_flops as flops
from oner_fast.models.oner import PassName
from oner_fast.train.engine.throughput import FORWARD_AND_BACKWARD
from oner_fast.train.oner.inputs import student_passes
from oner_fast.train.oner.settings import OneRConfiguration


def step_flops(config: OneRConfiguration, batch: PairBatch) -> float:
    """Count the operations of a step on `batch`, this rank's part: student forward and backward, teacher, contrast.

    Recomputation (accumulation's first forward, checkpointing) is not counted, and nothing is ever padded.
    """
    model, objectives = config.model, config.objectives
    pairs, words = len(batch), batch.text.lengths.tolist()
    cells = (model.image_size // model.patch_size) ** 2
    kept = cells - int(objectives.force_patch_dropout * cells)
    hidden = int(objectives.mask_patch_ratio * kept) if objectives.mim else 0
    names = student_passes(objectives, model.shared_trunk)
    image, text = [1 + kept] * pairs, [1 + length for length in words]
    shapes: dict[PassName, tuple[list[int], list[int]]] = {
        "image": (image, image),
        "text": (text, text),
        "image_text": ([kept + length for length in text],) * 2,
        "image_given_text": (image, text),
        "text_given_image": (text, image),
    }
    # Outputs that a loss reads: [CLS], masked patches, masked words (as many as are expected).
    of_words = [objectives.mask_word_ratio * length if objectives.mlm else 0.0 for length in words]
    read: dict[PassName, list[float]] = {
        "image": [1.0 + hidden] * pairs,
        "text": [1 + masked for masked in of_words],
        "image_text": [1 + hidden + masked for masked in of_words],
        "image_given_text": [1.0] * pairs,
        "text_given_image": [1.0] * pairs,
    }
    wanted = [count for name in names for count in read[name]]
    lengths = [length for name in names for length in shapes[name][0]]
    key_lengths = [length for name in names for length in shapes[name][1]]
    images = ("image_text" in names) + bool({"image", "image_given_text"} & set(names))
    student = flops.trunk_flops(model, lengths, key_lengths, wanted) + flops.embedding_flops(
        model, images * pairs * (kept - hidden)
    )
    teacher = 0.0
    if objectives.contrastive:
        predictor = objectives.predictor_hidden if objectives.predicts else 0
        student += flops.head_flops(model, len(names) * pairs, predictor)
        swapped = objectives.momentum_teacher or not objectives.symmetric
        contrasts = (1 + swapped) * bool(objectives.itc) + sum(
            map(bool, (objectives.xmc, objectives.cic, objectives.cmc))
        )
        student += (
            flops.contrast_flops(config.optim.batch_size, model.embed_dim, contrasts) * pairs / config.optim.batch_size
        )
        if objectives.momentum_teacher:
            seen = [1 + cells] * pairs + [1 + length for length in words]
            teacher = flops.trunk_flops(model, seen, wanted=[1] * len(seen))
            teacher += flops.embedding_flops(model, pairs * cells) + flops.head_flops(model, 2 * pairs)
    if objectives.mlm:
        expected = objectives.mask_word_ratio * sum(words) * (2 if "image_text" in names else 1)
        student += 2 * expected * model.width * (model.width + model.vocab_size)
    if objectives.mim:
        student += flops.embedding_flops(model, images * pairs * hidden)
    return FORWARD_AND_BACKWARD * student + teacher
