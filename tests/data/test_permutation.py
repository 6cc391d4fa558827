import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oner_fast.data.permutation import Permutation


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 5000), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**32 - 1))
def test_a_permutation_is_a_bijection(n, seed, epoch):
    assert np.array_equal(np.sort(Permutation(n, seed, epoch).take(np.arange(n))), np.arange(n))


def test_single_lookups_equal_array_lookups():
    permutation = Permutation(1000, 7, 3)
    places = np.array([[5, 999], [0, 5]])
    assert permutation.take(places).tolist() == [[permutation[5], permutation[999]], [permutation[0], permutation[5]]]
    assert len(permutation) == 1000


def test_a_large_permutation_needs_no_memory_and_repeats_nothing():
    drawn = Permutation(10**12, 1, 0).take(np.arange(20000))
    assert np.unique(drawn).size == 20000 and drawn.min() >= 0 and drawn.max() < 10**12
    assert abs(drawn.mean() / 10**12 - 0.5) < 0.02


def test_permutations_differ_by_epoch_and_seed_and_never_change():
    first = Permutation(500, 1, 0).take(np.arange(500))
    assert np.array_equal(first, Permutation(500, 1, 0).take(np.arange(500)))
    for other in (Permutation(500, 1, 1), Permutation(500, 2, 0), Permutation(500, 1 << 32, 0)):
        assert (first == other.take(np.arange(500))).sum() < 10


@pytest.mark.parametrize("n", [5, 60])
def test_items_are_uniform_over_places(n):
    rounds = 1500
    counts = np.zeros((n, n))
    for epoch in range(rounds):
        counts[np.arange(n), Permutation(n, 11, epoch).take(np.arange(n))] += 1
    expected = rounds / n
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), (n - 1) ** 2
    assert abs(statistic - freedom) < 6 * np.sqrt(2 * freedom)


def test_neighbours_are_separated():
    order = Permutation(10007, 5, 1).take(np.arange(10007))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.04
    assert (np.diff(order) == 1).sum() < 10


def test_bad_places_and_sizes_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Permutation(0, 0, 0)
    for place in (-1, 10):
        with pytest.raises(IndexError, match="must be in"):
            Permutation(10, 0, 0)[place]
