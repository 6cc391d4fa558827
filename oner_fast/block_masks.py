"""Block-wise patch masks in integer arithmetic: the reference implementation.

This is the generator of BEiT, which UTA uses for its reversed block-wise masking. Until the wanted number of cells is
picked, it tries blocks. The area of a block lies between 16 cells and the number that remains. Its aspect is
log-uniform in [0.3, 1 / 0.3]. Its sides are round(sqrt(area * aspect)) and round(sqrt(area / aspect)), both shorter
than those of the grid, and its place is uniform on the grid. A block is accepted if it adds at least one cell and no
more than remain. After ten rejections in a row, the missing cells are picked one by one at random.

Attempt t of a sample uses the four words of its Philox block t for area, aspect, top and left. The cells picked one by
one are those with the smallest pairs (draw, cell), whose draws come from block 2^31 on.
"""

import math

import torch
from torch import Tensor

from oner_fast.philox import philox4x32, random_u32, split_seed

MIN_AREA = 16
ATTEMPTS = 10
PADDING = 1 << 31  # the first Philox block of the draws that pick cells one by one
MAX_SIDE, MAX_CELLS = 512, 1 << 16  # so that 32 bits hold every product

# Aspects times 2^12 at the middles of 64 equal parts of the distribution, as `aspects()` computes them. No logarithm,
# exponential or root is taken at run time: a side is the number of m >= 1 with (2 m - 1)^2 2^10 <= area * aspect.
ASPECTS = (
    1252, 1300, 1350, 1402, 1455, 1511, 1569, 1629, 1692, 1757, 1824, 1894, 1967, 2042, 2120, 2202,
    2286, 2374, 2465, 2559, 2657, 2759, 2865, 2975, 3089, 3207, 3330, 3458, 3591, 3728, 3871, 4020,
    4174, 4334, 4500, 4673, 4852, 5038, 5231, 5431, 5640, 5856, 6080, 6313, 6556, 6807, 7068, 7339,
    7620, 7912, 8216, 8531, 8858, 9197, 9550, 9916, 10296, 10691, 11101, 11527, 11969, 12428, 12904, 13399,
)  # fmt: skip


def aspects() -> tuple[int, ...]:
    """Compute the table `ASPECTS`; its k-th entry from the end is the reciprocal of its k-th."""
    parts = len(ASPECTS)
    return tuple(round((1 << 12) * math.exp(math.log(0.3) * (1 - (2 * k + 1) / parts))) for k in range(parts))


def pick_blocks(
    seed: int, stream: int, step: int | Tensor, samples: Tensor, grid: tuple[int, int], count: int
) -> Tensor:
    """Pick exactly `count` cells of a grid (height, width) in each sample: (B, height, width) bool.

    After each attempt the loop reads back from the device whether all samples are done.
    """
    height, width = grid
    device, key = samples.device, split_seed(seed)
    table = torch.tensor(ASPECTS, device=device)
    thresholds = (2 * torch.arange(1, max(grid) + 1, device=device) - 1).square() << 10
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    picked = torch.zeros(len(samples), height, width, dtype=torch.bool, device=device)
    remaining = torch.full_like(samples, count)
    failures = torch.zeros_like(samples)
    active = torch.arange(len(samples) if count else 0, device=device)
    attempt = 0
    while active.numel():
        words = philox4x32((attempt, samples[active], step, stream), key)
        here, left = picked[active], remaining[active]
        low, high = left.clamp(max=MIN_AREA), left.clamp(min=MIN_AREA)
        area = low + ((words[0] * (high - low + 1)) >> 32)
        aspect = (words[1] * len(ASPECTS)) >> 32
        block_height = torch.bucketize(area * table[aspect], thresholds, right=True)
        block_width = torch.bucketize(area * table[len(ASPECTS) - 1 - aspect], thresholds, right=True)
        top = ((words[2] * (height - block_height + 1)) >> 32).unsqueeze(1)
        first = ((words[3] * (width - block_width + 1)) >> 32).unsqueeze(1)
        in_rows = (rows >= top) & (rows < top + block_height.unsqueeze(1))  # [A, height]
        in_columns = (columns >= first) & (columns < first + block_width.unsqueeze(1))  # [A, width]
        block = in_rows.unsqueeze(2) & in_columns.unsqueeze(1)
        added = (block & ~here).flatten(1).sum(1)
        taken = (block_height < height) & (block_width < width) & (added >= 1) & (added <= left)
        picked[active] = here | (block & taken.view(-1, 1, 1))
        remaining[active] = left = left - torch.where(taken, added, 0)
        failures[active] = failed = torch.where(taken, 0, failures[active] + 1)
        active = active[(left > 0) & (failed < ATTEMPTS)]
        attempt += 1
    return _pad(picked, remaining, seed, stream, step, samples)


def _pad(picked: Tensor, missing: Tensor, seed: int, stream: int, step: int | Tensor, samples: Tensor) -> Tensor:
    cells = picked[0].numel() if len(picked) else 0
    short = missing.nonzero().squeeze(1)
    if short.numel() == 0:
        return picked
    draws = random_u32(seed, stream, step, samples[short], cells, first_block=PADDING)
    keys = draws * cells + torch.arange(cells, device=draws.device)
    keys = keys.masked_fill(picked[short].flatten(1), torch.iinfo(torch.int64).max)
    threshold = keys.sort(dim=1).values.gather(1, missing[short].unsqueeze(1) - 1)
    picked[short] |= (keys <= threshold).view_as(picked[short])
    return picked
