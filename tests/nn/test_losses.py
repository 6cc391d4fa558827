from __future__ import annotations

import pytest
import torch

from oner_fast.nn.losses import SigmoidLoss
from oner_fast.ops import sigmoid_loss


def test_it_computes_the_op_with_its_own_scale_and_bias() -> None:
    query, key, ids = torch.randn(6, 8), torch.randn(6, 8), torch.tensor([1, 1, 2, -1, -1, 3])
    for options in ({}, {"same": "ignore"}, {"normalized": True}):
        module = SigmoidLoss(scale=8.0, bias=-4.0, **options)
        expected = sigmoid_loss(query, key, 8.0, -4.0, query_ids=ids, **options)
        torch.testing.assert_close(module(query, key, query_ids=ids), expected)


def test_it_begins_where_siglip_does_and_learns_both_numbers() -> None:
    module = SigmoidLoss()
    assert module.logit_scale.exp().item() == pytest.approx(10) and module.logit_bias.item() == -10
    assert set(module.state_dict()) == {"logit_scale", "logit_bias"}
    query = torch.randn(16, 8)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        loss = module(query, query)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert module.logit_scale.exp() > 10 and module.logit_bias > -10  # pairs are right, and all start as wrong


def test_a_scale_without_a_logarithm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scale must be above 0, got -1\.0"):
        SigmoidLoss(scale=-1.0)
