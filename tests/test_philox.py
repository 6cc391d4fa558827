import pytest
import torch

from oner_fast.philox import philox4x32, random_u32, split_seed

FULL = 0xFFFFFFFF


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((FULL,) * 4, (FULL, FULL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, expected):
    assert tuple(int(word) for word in philox4x32(counter, key)) == expected


def scalar_philox(counter, key):
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ k[0], second & FULL, (first >> 32) ^ c[3] ^ k[1], first & FULL]
        k = [(k[0] + 0x9E3779B9) & FULL, (k[1] + 0xBB67AE85) & FULL]
    return c


def test_draws_follow_from_the_counter():
    seed, stream, step = 0xDEADBEEF12345678, 7, 99
    samples = torch.tensor([0, 5, FULL])
    drawn = random_u32(seed, stream, step, samples, 10)
    assert drawn.shape == (3, 10) and drawn.dtype == torch.int64
    for row, sample in enumerate(samples.tolist()):
        for column in range(10):
            words = scalar_philox((column // 4, sample, step, stream), (0x12345678, 0xDEADBEEF))
            assert drawn[row, column] == words[column % 4]


def test_a_samples_draws_do_not_depend_on_the_batch():
    together = random_u32(3, 1, 2, torch.arange(100), 6)
    assert torch.equal(random_u32(3, 1, 2, torch.tensor([42]), 6)[0], together[42])
    assert torch.equal(random_u32(3, 1, 2, torch.arange(100), 3), together[:, :3])


def test_draws_are_uniform_and_apart():
    drawn = random_u32(1, 2, 3, torch.arange(4096), 4)
    assert drawn.min() >= 0 and drawn.max() <= FULL
    assert abs(drawn.double().mean().item() / 2**32 - 0.5) < 0.01
    assert drawn.unique().numel() > drawn.numel() - 5
    for other in (random_u32(2, 2, 3, torch.arange(4096), 4), random_u32(1, 3, 3, torch.arange(4096), 4)):
        assert (drawn == other).sum() <= 2


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match="seed must be in"):
        split_seed(seed)


def test_a_step_out_of_range_is_refused():
    with pytest.raises(ValueError, match="step must be in"):
        random_u32(0, 0, 2**32, torch.arange(2), 1)
