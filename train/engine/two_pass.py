"""Two-pass accumulation: a contrast of the whole batch, with the activations of one micro-batch at a time.

The first pass computes every micro-batch's embeddings without a graph. The loss of all embeddings together gives
their gradients. The second pass computes each micro-batch again, with a graph, and carries these gradients back. Both
passes must compute the same function, so every random draw is part of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from oner_fast.train.engine.replica import Replica


class Embedded(Protocol):
    """The part of a forward's output that the contrast reads."""

    @property
    def embeddings(self) -> Mapping[Any, Tensor]:
        """(B, E) by name, floating point."""

    @property
    def logit_scale(self) -> Tensor:
        """0-d, the same in every micro-batch."""


@dataclass(frozen=True)
class Features:
    """Embeddings (B, E) by name, and logit_scale (0-d)."""

    embeddings: dict[Any, Tensor]
    logit_scale: Tensor


Input = TypeVar("Input")
Output = TypeVar("Output", bound=Embedded)


def first_pass(replica: Replica, forward: Callable[[Input], Embedded], inputs: Sequence[Input]) -> Features:
    """Compute the features of all micro-batches without a graph.

    Args:
        replica: the trained module, whose ranks are not synchronised here.
        forward: the forward pass of one micro-batch.
        inputs: the micro-batches.

    Returns:
        Embeddings (sum of all B, E) and logit_scale as leaves that require a gradient. Backpropagate the loss of these
        before `second_pass`.
    """
    with torch.no_grad(), replica.without_sync():
        found = [forward(each) for each in inputs]
    embeddings = {
        name: torch.cat([each.embeddings[name] for each in found]).requires_grad_() for name in found[0].embeddings
    }
    return Features(embeddings, found[0].logit_scale.clone().requires_grad_())


def second_pass(
    replica: Replica,
    forward: Callable[[Input], Output],
    inputs: Sequence[Input],
    leaves: Features,
    own_loss: Callable[[Output], Tensor] | None = None,
) -> None:
    """Compute every micro-batch again and carry the gradients of `leaves` back to the parameters.

    Args:
        replica: the trained module; its ranks are synchronised in the last micro-batch's backward.
        forward: as in `first_pass`.
        inputs: as in `first_pass`.
        leaves: the result of `first_pass`, whose gradients are set; a leaf without gradient is skipped.
        own_loss: a further loss (0-d) of each micro-batch by itself, which is added.
    """
    start = 0
    for index, each in enumerate(inputs):
        with replica.synced_at(index, len(inputs)):
            output = forward(each)
            terms = [] if own_loss is None else [own_loss(output)]
            rows = 0
            for name, embeddings in output.embeddings.items():
                rows, gradient = embeddings.shape[0], leaves.embeddings[name].grad
                if gradient is not None:
                    terms.append((embeddings * gradient[start : start + rows]).sum())
            if leaves.logit_scale.grad is not None:
                terms.append(output.logit_scale * leaves.logit_scale.grad / len(inputs))
            # Added in a chain: a stack would be one more tensor, and the value of the sum is never read.
            surrogate = terms[0]
            for term in terms[1:]:
                surrogate = surrogate + term
            surrogate.backward()
        start += rows
