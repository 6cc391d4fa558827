"""Counter-based randomness: Philox4x32-10 (Salmon et al., SC 2011) in int64 tensor arithmetic.

A draw is a function of (seed, stream, step, sample) and of nothing else, so that workers, ranks, a restart and the
device change nothing. Only integers are used: no float rounding can move a mask or a crop.
"""

import torch
from torch import Tensor

# Streams keep the draws of different purposes apart. A masking pass adds its own index to its stream.
PERMUTE = 1
AUGMENT = 2
SUBSTITUTE = 3
MASK_PATCH = 4
MASK_TEXT = 16
MASK_BLOCK = 28
DROP_PATH = 40
DROP_ATTENTION = 1 << 31  # plus the number of the sequence: no other stream is that large

MASK_PASSES = 12  # passes that fit between MASK_PATCH and MASK_TEXT, and between MASK_TEXT and MASK_BLOCK

_WORD = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def philox4x32(
    counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int], key: tuple[Tensor | int, Tensor | int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute Philox4x32-10 of four 32-bit counter words under a key of two.

    Args:
        counter: ints or int64 tensors with values in [0, 2^32) that broadcast together.
        key: two ints or 0-d int64 tensors in [0, 2^32).

    Returns:
        Four int64 tensors of the broadcast shape, with values in [0, 2^32).
    """
    device = next((word.device for word in counter if isinstance(word, Tensor)), torch.device("cpu"))
    words = torch.broadcast_tensors(*(torch.as_tensor(word, dtype=torch.int64, device=device) for word in counter))
    even, odd = torch.stack((words[0], words[2])), torch.stack((words[1], words[3]))
    column = (2,) + (1,) * words[0].dim()
    # A 64-bit product wraps into the sign; the shift and the mask still give its exact upper half.
    multipliers = torch.tensor((_MULTIPLIER_0, _MULTIPLIER_1), dtype=torch.int64, device=device).view(column)
    keys = _schedule(key, device).view(_ROUNDS, *column)
    for round_key in keys:
        product = (even * multipliers).flip(0)
        even = (product >> 32).bitwise_and_(_WORD).bitwise_xor_(odd).bitwise_xor_(round_key)
        odd = product.bitwise_and_(_WORD)
    return even[0], odd[0], even[1], odd[1]


def _schedule(key: tuple[Tensor | int, Tensor | int], device: torch.device) -> Tensor:
    """Return the words of the key in every round: (10, 2) int64."""
    low, high = key
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        rounds = torch.arange(_ROUNDS, dtype=torch.int64, device=device)
        return torch.stack(((low + rounds * _WEYL_0) & _WORD, (high + rounds * _WEYL_1) & _WORD), dim=1)
    schedule = [((low + r * _WEYL_0) & _WORD, (high + r * _WEYL_1) & _WORD) for r in range(_ROUNDS)]
    return torch.tensor(schedule, dtype=torch.int64, device=device)


def split_seed(seed: int) -> tuple[int, int]:
    """Split a seed in [0, 2^64) into two key words (low, high); raise ValueError outside that range."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"a seed must be in [0, 2^64), not {seed}")
    return seed & _WORD, seed >> 32


def check_step(step: int | Tensor) -> None:
    """Raise ValueError for a number outside [0, 2^32); the value of a tensor is not read."""
    if not isinstance(step, Tensor) and not 0 <= step <= _WORD:
        raise ValueError(f"a step must be in [0, 2^32), not {step}")


def mask_stream(base: int, index: int) -> int:
    """Return the stream of a masking pass: `MASK_PATCH`, `MASK_TEXT` or `MASK_BLOCK` plus its index.

    Raises ValueError for an index outside [0, 12).
    """
    if not 0 <= index < MASK_PASSES:
        raise ValueError(f"a masking pass has an index in [0, {MASK_PASSES}), not {index}")
    return base + index


def random_u32(
    seed: int, stream: int, step: int | Tensor, sample: Tensor, count: int, *, first_block: int = 0
) -> Tensor:
    """Draw `count` random 32-bit integers for each sample.

    The counter is (block of four draws, counted from `first_block`; sample; step; stream), the key is the seed.

    Args:
        seed: in [0, 2^64).
        stream: the purpose of the draws, one of the constants above.
        step: a number in [0, 2^32), or a 0-d int64 tensor on the device of `sample`.
        sample: (B,) int64, the places in the global batch.
        count: the number of draws for each sample.
        first_block: the first block of four draws.

    Returns:
        (B, count) int64 with values in [0, 2^32).

    Raises:
        ValueError: the seed or the step is out of range.
    """
    check_step(step)
    blocks = torch.arange((count + 3) // 4, dtype=torch.int64, device=sample.device) + first_block
    words = philox4x32((blocks, sample.unsqueeze(1), step, stream), split_seed(seed))  # four of (B, blocks)
    return torch.stack(words, dim=2).flatten(1)[:, :count]
