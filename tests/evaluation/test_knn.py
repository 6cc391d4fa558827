"""Weighted k-NN against the formula in float64, and the accuracy of scores."""

import pytest
import torch
from torch.nn import functional as F

from oner_fast.evaluation import knn
from oner_fast.evaluation.classifier import score_accuracy
from oner_fast.evaluation.knn import knn_scores


@pytest.mark.parametrize(("count", "k"), [(100, 20), (100, 1), (7, 20)])
def test_votes_follow_the_formula(count: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "QUERY_BLOCK", 4)
    monkeypatch.setattr(knn, "TRAIN_BLOCK", 13)
    torch.manual_seed(count + k)
    train, query = torch.randn(count, 8) * torch.rand(count, 1), torch.randn(11, 8) * 5
    labels = torch.randint(0, 6, (count,))
    found = knn_scores(train, labels, query, 6, k=k, temperature=0.07)
    assert found.shape == (11, 6) and found.dtype == torch.float32
    for row, one in zip(found, query.double(), strict=True):
        cosines = [float(one @ other / one.norm() / other.norm()) for other in train.double()]
        expected = torch.zeros(6, dtype=torch.float64)
        for cosine, label in sorted(zip(cosines, labels.tolist(), strict=True), reverse=True)[:k]:
            expected[label] += torch.tensor((cosine - 1) / 0.07).double().exp()
        torch.testing.assert_close(row.double(), expected, rtol=1e-4, atol=1e-12)


def test_a_near_neighbour_outvotes_two_far_ones() -> None:
    train = F.normalize(torch.tensor([[1.0, 0.1], [0.6, 0.8], [0.6, 0.9]]))
    votes = knn_scores(train, torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]]), 2, k=3)
    assert votes.argmax() == 0
    assert knn_scores(train, torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]]), 2, k=3, temperature=10).argmax() == 1


def test_accuracy_of_scores() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.3, 0.5], [0.4, 0.4, 0.2], [0.0, 0.0, 1.0]])
    result = score_accuracy(scores, torch.tensor([0, 2, 0, 1]))
    assert result["top1"] == 0.5  # the third is a tie, which is lost; the fourth is wrong
    assert result["top5"] == 1.0
    assert result["chance@1"] == pytest.approx(1 / 3) and result["chance@5"] == 1.0
    assert result["majority"] == 0.5
    assert (result["images"], result["classes"]) == (4, 3)
    votes = torch.zeros(1, 8)
    votes[0, 3] = 1.0
    assert score_accuracy(votes, torch.tensor([5]))["top5"] == 0.0  # no neighbour is of its class


def test_bad_input_is_named() -> None:
    features, labels = torch.randn(12, 4), torch.arange(12) % 3
    with pytest.raises(ValueError, match=r"labels need to be in \[0, 2\), got 0 to 2"):
        knn_scores(features, labels, features, 2)
    with pytest.raises(ValueError, match=r"query needs shape \(Q, 4\), got \(12, 3\)"):
        knn_scores(features, labels, features[:, :3], 3)
    with pytest.raises(ValueError, match="k must be at least 1 and temperature above 0"):
        knn_scores(features, labels, features, 3, temperature=0.0)
    with pytest.raises(ValueError, match="NaN or infinity"):
        knn_scores(features / 0, labels, features, 3)
    with pytest.raises(ValueError, match=r"got \(12, 4\) and \(5,\)"):
        knn_scores(features, labels[:5], features, 3)
    with pytest.raises(ValueError, match="the scores hold NaN"):
        score_accuracy(torch.full((2, 3), torch.nan), torch.tensor([0, 1]))
