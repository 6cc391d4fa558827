"""Linear probe: multinomial logistic regression on frozen features, by full-batch L-BFGS.

Features are standardised by the training images' mean and deviation. The loss is the mean cross-entropy plus
l2 / 2 * |W|^2, without the bias. A tenth of the training images, held out, chooses l2 from a small grid; the probe is
then fitted to all images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oner_fast.evaluation.classifier import check_features, score_accuracy
from oner_fast.evaluation.embed import shown

L2_GRID = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
HELD_OUT_EVERY = 10
CHUNK_LOGITS = 1 << 24  # number of logits held at once (64 MiB)


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe.

    Attributes:
        weight: (E, C).
        bias: (C,).
        mean, scale: (E,), the standardisation of features.
        l2: the chosen weight of the penalty.
        held_out: for each l2 tried, the top-1 accuracy on the held-out tenth.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor
    l2: float
    held_out: dict[float, float]

    def scores(self, features: Tensor) -> Tensor:
        """Compute logits (N, C) float32 of (N, E) features."""
        return torch.addmm(self.bias, (features.float() - self.mean) / self.scale, self.weight)


def fit_linear_probe(
    features: Tensor, labels: Tensor, classes: int, *, l2_grid: Sequence[float] = L2_GRID, iterations: int = 100
) -> LinearProbe:
    """Fit a probe to (N, E) features with (N,) int64 labels in [0, classes).

    Args:
        l2_grid: weights of the penalty, the strongest first. Each fit starts from the previous one, and the search ends
            after two fits in a row that are worse than the best.
        iterations: the most L-BFGS iterations for each l2.

    Raises:
        ValueError: shapes or labels do not fit, there are fewer than ten images or two classes, or features are not
            finite.
    """
    check_features(features, labels, classes)
    if len(features) < HELD_OUT_EVERY or classes < 2:
        raise ValueError(
            f"a linear probe needs at least {HELD_OUT_EVERY} images and 2 classes, got {len(features)} and {classes}"
        )
    if not l2_grid or min(l2_grid) < 0:
        raise ValueError(f"l2_grid needs at least one weight, none negative, got {tuple(l2_grid)}")
    features = features.float()
    deviation = features.std(0, correction=0)
    mean, scale = features.mean(0), torch.where(deviation > 1e-8, deviation, 1.0)
    standard = (features - mean) / scale
    held = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    held[labels.argsort(stable=True)[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]] = True  # the same share of each class
    state = standard.new_zeros(features.shape[1] + 1, classes)
    best, chosen, worse = state, l2_grid[0], 0
    tried: dict[float, float] = {}
    for number in shown(range(len(l2_grid)), "fitting linear probes"):
        l2 = l2_grid[number]
        state = _minimise(standard[~held], labels[~held], l2, state, iterations)
        top1 = float(score_accuracy(_logits(standard[held], state), labels[held])["top1"])
        better = top1 > max(tried.values(), default=-1.0)
        tried[l2] = top1
        if better:
            best, chosen, worse = state, l2, 0
        elif (worse := worse + 1) == 2:
            break
    state = _minimise(standard, labels, chosen, best, iterations)
    return LinearProbe(state[:-1], state[-1], mean, scale, chosen, tried)


def _logits(features: Tensor, state: Tensor) -> Tensor:
    return torch.addmm(state[-1], features, state[:-1])


def _minimise(features: Tensor, labels: Tensor, l2: float, start: Tensor, iterations: int) -> Tensor:
    """Minimise the loss: (E + 1, C) weights with the biases in the last row."""
    state = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [state], max_iter=iterations, history_size=10, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        loss, state.grad = loss_and_gradient(features, labels, state.detach(), l2)
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return state.detach()


@torch.no_grad()
def loss_and_gradient(features: Tensor, labels: Tensor, state: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """Compute the loss and its gradient, a part of the images at a time.

    `features` is (N, E), `labels` (N,) int64, and `state` (E + 1, C) with the biases in the last row.
    """
    weight = state[:-1]
    loss = 0.5 * l2 * weight.square().sum()
    gradient = torch.cat([l2 * weight, torch.zeros_like(state[-1:])])
    size = max(1, CHUNK_LOGITS // state.shape[1])
    for rows, right in zip(features.split(size), labels.split(size), strict=True):
        log_share = _logits(rows, state).log_softmax(1)
        loss = loss - log_share.gather(1, right[:, None]).sum() / len(features)
        error = log_share.exp_()
        error[torch.arange(len(right), device=right.device), right] -= 1.0
        error /= len(features)
        gradient[:-1].addmm_(rows.T, error)
        gradient[-1] += error.sum(0)
    return loss, gradient
