"""The work that is measured with and without the line: losses and forward passes of open_clip, timm and transformers.

Weights and inputs are random. Both sides have the same weights, and a subject's loss is the same number on both.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oner_fast.models.optional_packages import optional_package

Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Pair:
    """One computation in two ways.

    Args:
        theirs: computes the loss by the project's own code.
        ours: computes it with the line.
        leaves: the tensors that take a gradient.
        given: the tensors that exist before, whose memory is not counted.
    """

    theirs: Loss
    ours: Loss
    leaves: list[Tensor]
    given: list[Tensor]


@dataclass(frozen=True)
class Subject:
    """Something to measure.

    Args:
        project: the package that it belongs to.
        name: what is computed, for readers.
        line: the line that is added.
        make: makes it in a dtype, float64 for the exact results.
    """

    project: str
    name: str
    line: str
    make: Callable[[torch.dtype], Pair]


def _patched(project: str, run_loss: Loss, **parts: bool) -> Loss:
    """Return the loss under the project's `patch()`."""
    module = importlib.import_module(f"oner_fast.integrations.{project}")

    def run() -> Tensor:
        with module.patch(**parts):
            return run_loss()

    return run


def _open_clip_loss(name: str, pairs: int, width: int) -> Subject:
    def make(dtype: torch.dtype) -> Pair:
        generator = torch.Generator().manual_seed(0)

        def rows(near: Tensor | float = 0.0) -> Tensor:
            x = torch.randn(pairs, width, generator=generator, dtype=torch.float64) + near
            return F.normalize(x, dim=1).bfloat16()  # numbers of every dtype alike

        image = rows()
        text = rows(image.double() * width**0.5 / 8)  # a model has begun to tell the pairs apart
        scale = torch.tensor(10.0 if name == "SigLipLoss" else 50.0)
        given = [x.to(dtype).requires_grad_() for x in (image, text, scale)]
        if name == "SigLipLoss":
            given.append(torch.tensor(-10.0, dtype=dtype, requires_grad=True))
        leaves = list(given)
        if name == "DistillClipLoss":
            given += [rows().to(dtype), rows().to(dtype), torch.tensor(50.0, dtype=dtype)]
        loss = getattr(optional_package("open_clip").loss, name)()

        def run() -> Tensor:
            found: Tensor = torch.stack(loss(*given)).sum() if name == "DistillClipLoss" else loss(*given)
            return found

        return Pair(run, _patched("open_clip", run, loss=True), leaves, given)

    return Subject("open_clip", f"`{name}`, {pairs:,} pairs of {width}", "patch()", make)


def _open_clip_model(name: str, pairs: int) -> Subject:
    def make(dtype: torch.dtype) -> Pair:
        open_clip = optional_package("open_clip")
        torch.manual_seed(0)
        logging.disable(logging.WARNING)  # open_clip warns that the weights are random
        model = open_clip.create_model(name).to(dtype).train()
        logging.disable(logging.NOTSET)
        images = torch.randn(pairs, 3, 224, 224, dtype=torch.float64).to(dtype)
        texts = torch.randint(1, 49407, (pairs, 77))
        texts[:, 40:] = 0  # open_clip's own masks hide no padding
        texts[:, 39] = 49407
        loss = open_clip.loss.ClipLoss()

        def run() -> Tensor:
            found: Tensor = loss(*model(images, texts))
            return found

        return _pair(model, run, _patched("open_clip", run), [images, texts])

    return Subject("open_clip", f"{name} and its loss, {pairs} pairs", "patch()", make)


def _timm(name: str, images: int, patch_dropout: float, **parts: bool) -> Subject:
    def make(dtype: torch.dtype) -> Pair:
        timm = optional_package("timm")
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False, patch_drop_rate=patch_dropout).to(dtype).train()
        pixels = torch.randn(images, 3, 224, 224, dtype=torch.float64).to(dtype)
        labels = torch.arange(images)

        def run() -> Tensor:
            torch.manual_seed(1)  # both drop the same patches
            return F.cross_entropy(model(pixels), labels)

        return _pair(model, run, _patched("timm", run, **parts), [pixels, labels])

    dropped = f", {patch_dropout:.0%} of the patches dropped" if patch_dropout else ""
    line = f"patch({', '.join(f'{part}={value}' for part, value in parts.items())})"
    return Subject("timm", f"{name}, {images} images{dropped}", line, make)


def _pair(model: nn.Module, theirs: Loss, ours: Loss, inputs: list[Tensor]) -> Pair:
    weights: list[Tensor] = [*model.parameters()]
    return Pair(theirs, ours, weights, [*weights, *model.buffers(), *inputs])


def _sentences(count: int) -> tuple[list[int], Tensor]:
    """Return lengths of 16 to 128 words, and which places of the padded batch are words."""
    lengths = [16 + 16 * (i % 8) for i in range(count)]
    return lengths, torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)


def _attention_of(model: Any, implementation: str, run: Loss) -> Loss:
    def chosen() -> Tensor:
        model.set_attn_implementation(implementation)
        return run()

    return chosen


def _bert(count: int, packed: bool) -> Subject:
    def make(dtype: torch.dtype) -> Pair:
        importlib.import_module("oner_fast.integrations.transformers").register()
        transformers = optional_package("transformers")
        config = transformers.BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.BertModel(config, add_pooling_layer=False).to(dtype).train()
        lengths, words = _sentences(count)
        ids = torch.randint(1, config.vocab_size, words.shape) * words
        target = torch.randn(sum(lengths), config.hidden_size, dtype=torch.float64).to(dtype)
        row, places = ids[words].unsqueeze(0), torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)

        def in_a_row() -> Tensor:
            return F.mse_loss(model(row, position_ids=places).last_hidden_state[0], target)

        def with_padding() -> Tensor:
            return F.mse_loss(model(ids, attention_mask=words).last_hidden_state[words], target)

        ours = _attention_of(model, "oner_fast", in_a_row if packed else with_padding)
        return _pair(model, _attention_of(model, "sdpa", with_padding), ours, [ids, words, target, row, places])

    how = "packed into a row, instead of padded" if packed else "padded"
    line = 'attn_implementation="oner_fast"'
    return Subject("transformers", f"BERT of 6 layers, {count} sentences {how}", line, make)


def _llama(count: int) -> Subject:
    def make(dtype: torch.dtype) -> Pair:
        importlib.import_module("oner_fast.integrations.transformers").register()
        transformers = optional_package("transformers")
        config = transformers.LlamaConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2,
            intermediate_size=1024, vocab_size=8192, use_cache=False,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.LlamaModel(config).to(dtype).train()
        lengths, words = _sentences(count)
        row = torch.randint(1, config.vocab_size, (1, int(words.sum())))
        places = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
        target = torch.randn(row.shape[1], config.hidden_size, dtype=torch.float64).to(dtype)

        def run() -> Tensor:
            return F.mse_loss(model(row, position_ids=places).last_hidden_state[0], target)

        ours, theirs = (_attention_of(model, name, run) for name in ("oner_fast", "sdpa"))
        return _pair(model, theirs, ours, [row, places, target])

    line = 'attn_implementation="oner_fast"'
    return Subject("transformers", f"Llama of 6 layers, {count} sentences packed into a row", line, make)


def subjects(quick: bool) -> list[Subject]:
    """List the subjects; `quick` ones are small."""
    pairs, sentences = (256, 8) if quick else (2048, 32)
    images = 2 if quick else 8
    return [
        *(_open_clip_loss(name, pairs, 512) for name in ("ClipLoss", "SigLipLoss", "DistillClipLoss")),
        _open_clip_model("ViT-B-32", images),
        _timm("vit_small_patch16_224", images, 0.0),
        _timm("vit_small_patch16_224", images, 0.5),
        _timm("vit_small_patch16_224", images, 0.5, attention=False),
        _bert(sentences, packed=False),
        _bert(sentences, packed=True),
        _llama(sentences),
    ]
