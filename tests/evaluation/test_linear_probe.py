"""The linear probe: its gradient against autograd's, learnable labels, and random labels."""

import pytest
import torch
from torch.nn import functional as F

from oner_fast.evaluation import linear_probe
from oner_fast.evaluation.classifier import score_accuracy
from oner_fast.evaluation.linear_probe import fit_linear_probe, loss_and_gradient


def test_the_gradient_equals_autograds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_probe, "CHUNK_LOGITS", 20)  # four images at once
    torch.manual_seed(0)
    features, labels = torch.randn(30, 6, dtype=torch.float64), torch.randint(0, 5, (30,))
    state = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    loss = F.cross_entropy(features @ state[:-1] + state[-1], labels) + 0.3 / 2 * state[:-1].square().sum()
    loss.backward()
    found, gradient = loss_and_gradient(features, labels, state.detach(), 0.3)
    torch.testing.assert_close(found, loss.detach())
    torch.testing.assert_close(gradient, state.grad)


def test_the_probe_is_at_the_minimum() -> None:
    torch.manual_seed(1)
    features, labels = torch.randn(200, 5) * torch.tensor([1.0, 9.0, 0.1, 3.0, 0.0]), torch.randint(0, 3, (200,))
    probe = fit_linear_probe(features, labels, 3, l2_grid=(0.1,), iterations=200)
    assert probe.l2 == 0.1 and list(probe.held_out) == [0.1]
    standard = (features.double() - features.double().mean(0)) / features.double().std(0, correction=0).clamp(min=1e-6)
    state = torch.cat([probe.weight, probe.bias[None]]).double()
    _, gradient = loss_and_gradient(standard, labels, state, 0.1)
    assert gradient.abs().max() < 1e-4
    torch.testing.assert_close(probe.scores(features).double(), standard @ state[:-1] + state[-1], rtol=1e-4, atol=1e-4)


def test_separable_data_is_learnt_and_random_labels_are_not() -> None:
    torch.manual_seed(2)
    labels = torch.randint(0, 4, (600,))
    features = 0.05 * torch.randn(600, 10) + torch.randn(4, 10)[labels]
    probe = fit_linear_probe(features[:400], labels[:400], 4)
    assert score_accuracy(probe.scores(features[400:]), labels[400:])["top1"] == 1.0
    free = torch.randint(0, 4, (600,))
    probe = fit_linear_probe(features[:400], free[:400], 4)
    assert abs(score_accuracy(probe.scores(features[400:]), free[400:])["top1"] - 0.25) < 0.13  # four deviations


def test_the_held_out_tenth_chooses_the_penalty() -> None:
    torch.manual_seed(3)
    weights = torch.randn(60, 2)
    features = torch.randn(1200, 60)
    labels = (features @ weights + 6 * torch.randn(1200, 2)).argmax(1)
    few = fit_linear_probe(features[:100], labels[:100], 2)
    assert few.held_out[few.l2] == max(few.held_out.values())
    assert few.l2 == next(l2 for l2, top1 in few.held_out.items() if top1 == few.held_out[few.l2])
    assert 3 <= len(few.held_out) <= 6


def test_two_fits_give_equal_probes() -> None:
    torch.manual_seed(4)
    features, labels = torch.randn(80, 6), torch.randint(0, 3, (80,))
    one, other = (fit_linear_probe(features, labels, 3) for _ in range(2))
    assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias) and one.l2 == other.l2


def test_bad_input_is_named() -> None:
    features, labels = torch.randn(12, 4), torch.arange(12) % 3
    with pytest.raises(ValueError, match="at least 10 images and 2 classes, got 9 and 3"):
        fit_linear_probe(features[:9], labels[:9], 3)
    with pytest.raises(ValueError, match="at least 10 images and 2 classes, got 12 and 1"):
        fit_linear_probe(features, torch.zeros(12, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match=r"labels need to be in \[0, 2\)"):
        fit_linear_probe(features, labels, 2)
    with pytest.raises(ValueError, match=r"l2_grid needs at least one weight, none negative, got \(-1.0,\)"):
        fit_linear_probe(features, labels, 3, l2_grid=(-1.0,))
    with pytest.raises(ValueError, match="NaN or infinity"):
        fit_linear_probe(features / 0, labels, 3)
