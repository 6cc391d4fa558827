"""The small training step of each system, for the record of a commit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from oner_fast.benchmarks import peak_memory
from oner_fast.benchmarks.step.baseline import PlainStep
from oner_fast.benchmarks.step.clip import OpenCLIPStep, OurCLIPStep, tiny_clip
from oner_fast.benchmarks.step.ours import OurStep
from oner_fast.benchmarks.step.setting import synthetic_batch
from oner_fast.benchmarks.step.steps import Step
from oner_fast.benchmarks.step.uta import OurUTAStep, PlainUTAStep, tiny_uta
from oner_fast.train.oner import recipes
from oner_fast.train.oner.settings import OneRConfiguration

PAIRS = 16
# Relative tolerances of the losses and of each gradient's L2 distance. bfloat16 rounds to 2^-9 in each layer.
TOLERANCES = {"float32": (1e-4, 5e-3), "bfloat16": (2e-2, 0.3)}


@dataclass(frozen=True)
class System:
    """A system's step at a small size.

    Args:
        shape: describes the size.
        ours: makes our step for a dtype of autocast.
        plain: makes a baseline of our step; takes also `compiled` and `exact`.
    """

    shape: Callable[[], str]
    ours: Callable[[torch.dtype | None], Any]
    plain: Callable[..., Step]


def tiny_oner(pairs: int = PAIRS) -> OneRConfiguration:
    """Make the tiny recipe's configuration with another batch size, MoCo v3's head and 4,096 words.

    The head is that of the GPU's recipes, so that records of commits before the tiny recipe's own compare.
    """
    base = recipes.oner_tiny_pictograms_cpu()
    model = replace(base.model, vocab_size=4096, projector_hidden=768)
    return replace(base, model=model, optim=replace(base.optim, batch_size=pairs))


def _our_oner(dtype: torch.dtype | None) -> OurStep:
    config = tiny_oner()
    return OurStep(config, synthetic_batch(config, 4, config.model.max_text_tokens), dtype)


def _oner_shape() -> str:
    model = tiny_oner().model
    return f"width {model.width}, {model.depth} layers, {model.image_size} px, {PAIRS} pairs"


def _uta_shape() -> str:
    model = tiny_uta(PAIRS).model
    return f"width {model.width}, {model.depth} layers, {model.image_size} px, {PAIRS} images"


def _clip_shape() -> str:
    model = tiny_clip(PAIRS).model
    return (
        f"widths {model.vision_width} and {model.text_width}, {model.vision_layers} and {model.text_layers} layers, "
        f"{model.image_size} px, {PAIRS} pairs"
    )


SYSTEMS = {
    "oner": System(_oner_shape, _our_oner, PlainStep),
    "uta": System(_uta_shape, lambda dtype: OurUTAStep(tiny_uta(PAIRS), dtype), PlainUTAStep),
    "clip": System(_clip_shape, lambda dtype: OurCLIPStep(tiny_clip(PAIRS), dtype), OpenCLIPStep),
}


def counts_of(step: Step) -> dict[str, int]:
    """Count a step: bytes kept for backward beyond weights and batch, and FLOPs of products."""
    with FlopCounterMode(display=False) as counter:
        beyond = peak_memory.saved_during(step.gradient, step.given())[1]
    step.optimizer.zero_grad(set_to_none=True)
    return {"saved_bytes": beyond, "flops": int(counter.get_total_flops())}


def memory_of(step: Step) -> peak_memory.Memory:
    """Measure the peak of a whole step, gradients included, and what it keeps for backward; weights do not count."""
    peak, _ = peak_memory.peak_bytes(lambda: [step()], warm_ups=1)
    kept = peak_memory.saved_during(step.gradient, step.given())
    step.optimizer.zero_grad(set_to_none=True)
    return peak_memory.Memory(peak, *kept)
