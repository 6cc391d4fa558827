"""Measure open_clip's losses in bfloat16, its own and ours: error against float64, time, and memory kept for backward.

    python docs/examples/open_clip_precision.py 1024 512

takes the number of pairs and the width of the features. It prints a Markdown table. Times are the medians of rounds in
which both take turns.
"""

import statistics
import sys
import time

import torch

from oner_fast.integrations import open_clip as ours
from oner_fast.models.optional_packages import optional_package

theirs = optional_package("open_clip").loss
NAMES = ("ClipLoss", "DistillClipLoss", "SigLipLoss")


def arguments(name: str, pairs: int, width: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Make the features of pairs that a model has begun to tell apart, in bfloat16's numbers."""
    generator = torch.Generator().manual_seed(0)

    def rows(near: torch.Tensor | float = 0.0) -> torch.Tensor:
        x = torch.randn(pairs, width, generator=generator, dtype=torch.float64) + near
        return torch.nn.functional.normalize(x, dim=1).bfloat16().to(dtype)

    image = rows()
    found = {"image_features": image, "text_features": rows(image.double() * width**0.5 / 8)}
    found = {key: x.requires_grad_() for key, x in found.items()}
    found["logit_scale"] = torch.tensor(10.0 if name == "SigLipLoss" else 50.0, dtype=dtype, requires_grad=True)
    if name == "SigLipLoss":
        found["logit_bias"] = torch.tensor(-10.0, dtype=dtype, requires_grad=True)
    if name == "DistillClipLoss":
        found |= {"dist_image_features": rows(), "dist_text_features": rows()}
        found["dist_logit_scale"] = torch.tensor(50.0, dtype=dtype)
    return found


def run(loss: torch.nn.Module, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Compute the loss and the gradients of image features and logit_scale."""
    found = loss(**given)
    total = sum(found) if isinstance(found, tuple) else found
    gradients = torch.autograd.grad(total, [given[key] for key in ("image_features", "logit_scale")])
    return [total.detach(), *gradients]


def kept(loss: torch.nn.Module, given: dict[str, torch.Tensor]) -> float:
    """Count the MiB that forward keeps for backward, each tensor's memory once."""
    seen: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        found = loss(**given)
    del found
    return sum(seen.values()) / 2**20


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the relative error in the 2-norm."""
    return float((found.double() - exact).norm() / exact.norm())


def main(pairs: int, width: int, rounds: int = 5) -> None:
    """Print the table."""
    print("| loss | error of loss | of its feature gradient | of its scale gradient | kept, MiB | times as fast |")
    print("|---|---|---|---|---|---|")
    for name in NAMES:
        exact = run(getattr(theirs, name)(), arguments(name, pairs, width, torch.float64))
        given = arguments(name, pairs, width, torch.float32)
        both = [getattr(module, name)() for module in (theirs, ours)]
        seconds: list[list[float]] = [[], []]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results = [run(loss, given) for loss in both]
            memory = [kept(loss, given) for loss in both]
            for _ in range(rounds):
                for times, loss in zip(seconds, both, strict=True):
                    start = time.perf_counter()
                    run(loss, given)
                    times.append(time.perf_counter() - start)
        errors = [[error(x, right) for x, right in zip(found, exact, strict=True)] for found in results]
        cells = [f"{one:.1e} and {two:.1e}" for one, two in zip(*errors, strict=True)]
        cells.append(f"{memory[0]:.1f} and {memory[1]:.1f}")
        cells.append(f"{statistics.median(seconds[0]) / statistics.median(seconds[1]):.2f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
