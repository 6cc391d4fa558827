"""Floating-point operations of a step, product by product; (M x K) times (K x N) is 2 M N K."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from oner_fast.budget.workload import Sequences, Workload
from oner_fast.models.oner import OneRConfig

FORWARD, TRAINED, WITHOUT_INPUT = 1, 3, 2
"""Products of a linear map: forward; with the gradients of input and weight; with that of the weight alone."""
ATTENTION_FORWARD, MODEL_BACKWARD, ATTENTION_BACKWARD, TRITON_BACKWARD = 2, 4, 5, 7
"""Products of attention: scores and values; four gradients; these and the scores again; and Triton's two kernels, each
of which computes the scores and their gradient."""


@dataclass(frozen=True)
class Product:
    """A linear map of `rows` rows: its FLOPs are 2 rows x inputs x outputs, times the products that are made."""

    name: str
    rows: float
    inputs: int
    outputs: int
    products: int

    @property
    def flops(self) -> float:
        """FLOPs of all products."""
        return 2.0 * self.rows * self.inputs * self.outputs * self.products


def products(work: Workload, *, again: bool = True) -> list[Product]:
    """List the linear maps of student and teacher.

    With `again`, the forward that accumulation and checkpointing repeat is included.
    """
    model, objectives = work.model, work.config.objectives
    twice = int(again and work.config.optim.accum_freq > 1)  # the first of two passes
    checkpointed = int(again and model.grad_checkpointing)
    found = list(_trunk("trunk", model, work.student, TRAINED + twice, checkpointed))
    pixels = len(model.image_mean) * model.patch_size**2
    found.append(Product("patches", work.student_patches, pixels, model.width, WITHOUT_INPUT + twice))
    samples = work.pairs * len(work.passes)
    if objectives.contrastive:
        found += _head(model, samples, TRAINED + twice)
    if objectives.predicts:
        hidden = objectives.predictor_hidden
        found += [
            Product("predictor", samples, model.embed_dim, hidden, TRAINED + twice),
            Product("predictor", samples, hidden, model.embed_dim, TRAINED + twice),
        ]
    if objectives.mlm:
        found += [
            Product("masked words", work.masked_words, model.width, model.width, TRAINED + twice),
            Product("masked words", work.masked_words, model.width, model.vocab_size, TRAINED + twice),
        ]
    if objectives.mim:
        found.append(Product("masked patches", work.masked_patches, model.width, pixels, TRAINED + twice))
    if work.teacher.lengths:
        found += _trunk("teacher", model, work.teacher, FORWARD, 0)
        found.append(Product("teacher's patches", work.teacher_patches, pixels, model.width, FORWARD))
        found += _head(model, len(work.teacher.lengths), FORWARD)
    return found


def _trunk(name: str, model: OneRConfig, seen: Sequences, count: int, checkpointed: int) -> Iterator[Product]:
    """List the trunk's maps. A checkpointed block repeats all but its last, whose output no gradient needs."""
    width, hidden = model.width, int(model.width * model.mlp_ratio)
    qkv = ("queries, keys, values", width, 3 * width, count + checkpointed)
    out = ("attention's output", width, width, count + checkpointed)
    mlp = (("MLP up", width, hidden, count + checkpointed), ("MLP down", hidden, width, count))
    for label, inputs, outputs, made in (qkv, out, *mlp):
        yield Product(f"{name}: {label}", seen.tokens * (model.depth - 1), inputs, outputs, made)
    last = f"{name}: last block's"
    yield Product(f"{last} keys, values", seen.tokens, width, 2 * width, count + checkpointed)
    for label, inputs, outputs, made in (("queries", width, width, count + checkpointed), out, *mlp):
        yield Product(f"{last} {label}", seen.kept, inputs, outputs, made)


def _head(model: OneRConfig, samples: int, count: int) -> list[Product]:
    hidden = model.projector_hidden
    sizes = (model.width, hidden, hidden, model.embed_dim) if hidden else (model.width, model.embed_dim)
    return [
        Product("projector", samples, inputs, outputs, count) for inputs, outputs in zip(sizes, sizes[1:], strict=False)
    ]


def attention_flops(work: Workload, backward: int, *, again: bool = True) -> float:
    """Count attention's FLOPs over whole sequences, with `backward` products in the student's backward.

    Tiles are not counted: see `oner_fast.budget.tiles`. `again` is that of `products`.
    """
    extra = again * (int(work.config.optim.accum_freq > 1) + int(work.model.grad_checkpointing))
    student = (ATTENTION_FORWARD * (1 + extra) + backward) * score_flops(work.model, work.student)
    return student + ATTENTION_FORWARD * score_flops(work.model, work.teacher)


def score_flops(model: OneRConfig, seen: Sequences) -> float:
    """Count Q K^T of all layers; in the last, of the kept queries alone."""
    rows = zip(seen.lengths, seen.key_lengths, seen.wanted, strict=True)
    pairs = sum(((model.depth - 1) * query + wanted) * key for query, key, wanted in rows)
    return 2.0 * pairs * model.width


def contrasts(work: Workload) -> int:
    """Count the matrices of logits."""
    objectives = work.config.objectives
    if not objectives.contrastive:
        return 0
    swapped = objectives.momentum_teacher or not objectives.symmetric
    return (1 + swapped) * bool(objectives.itc) + sum(map(bool, (objectives.xmc, objectives.cic, objectives.cmc)))


def contrast_flops(work: Workload, ranks: int) -> float:
    """Count the logits in forward and again in backward, and the gradients: of rows, and of keys without a teacher."""
    columns = work.pairs * ranks
    count = 3 + (not work.config.objectives.momentum_teacher)
    return 2.0 * work.pairs * columns * work.model.embed_dim * count * contrasts(work)
