"""Word-patch localisation: where in an image the model sees a word.

The cosine of each patch output with a text embedding passes a softmax over the patches. The result is laid out on the
grid, enlarged to the image (bicubic) and stretched to [0, 1]. No gradients are involved.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# Red, green, blue and opacity in [0, 1], from low to high: clear, amber, orange, deep red.
RAMP = torch.tensor(
    [
        [1.00, 0.93, 0.66, 0.00],
        [1.00, 0.82, 0.40, 0.30],
        [0.98, 0.58, 0.20, 0.62],
        [0.88, 0.27, 0.15, 0.80],
        [0.55, 0.05, 0.16, 0.88],
    ]
)


def patch_scores(patches: Tensor, text: Tensor, *, temperature: float = 0.2) -> Tensor:
    """Share of attention of each patch: softmax over patches of cosine / temperature.

    Args:
        patches: (..., N, E) patch outputs, L2-normalised here.
        text: (..., E) text embeddings, L2-normalised here.
        temperature: divides the cosines.

    Returns:
        (..., N) float32, each row summing to 1.
    """
    if patches.dim() < 2 or patches.shape[-1] != text.shape[-1]:
        raise ValueError(
            f"patches need shape (..., N, E) and text (..., E), got {tuple(patches.shape)} and {tuple(text.shape)}"
        )
    if temperature <= 0:
        raise ValueError(f"temperature needs to be above 0, got {temperature}")
    cosine = (F.normalize(patches.float(), dim=-1) * F.normalize(text.float(), dim=-1).unsqueeze(-2)).sum(-1)
    return torch.softmax(cosine / temperature, dim=-1)


def heat_map(scores: Tensor, size: tuple[int, int], *, grid: tuple[int, int] | None = None) -> Tensor:
    """Enlarge (..., N) patch scores to (..., height, width) in [0, 1].

    Where all scores are equal, the map is 0 everywhere.

    Args:
        scores: (..., N), row by row.
        size: height and width in pixels.
        grid: rows and columns of the patches; square by default.
    """
    patches = scores.shape[-1]
    rows, columns = grid or (round(patches**0.5),) * 2
    if rows * columns != patches:
        raise ValueError(f"a grid of {rows} x {columns} does not hold {patches} patches; give grid=(rows, columns)")
    flat = scores.float().reshape(-1, 1, rows, columns)
    low, high = flat.amin((2, 3), keepdim=True), flat.amax((2, 3), keepdim=True)
    flat = torch.where(high - low > 1e-6 * high, flat, torch.zeros_like(flat))
    large = F.interpolate(flat, size=size, mode="bicubic", align_corners=False)
    low, high = large.amin((2, 3), keepdim=True), large.amax((2, 3), keepdim=True)
    stretched = (large - low) / (high - low).clamp_min(1e-12)
    return stretched.reshape(*scores.shape[:-1], *size)


def overlay(image: Tensor, heat: Tensor, *, fade: float = 0.35) -> Tensor:
    """Lay a heat map over an image.

    Args:
        image: (3, H, W) uint8.
        heat: (H, W) in [0, 1].
        fade: how much the image is first lightened towards white, so that the heat stands out.

    Returns:
        (3, H, W) uint8.
    """
    if image.dim() != 3 or image.shape[0] != 3 or image.dtype != torch.uint8 or heat.shape != image.shape[1:]:
        raise ValueError(
            f"image needs shape (3, H, W) uint8 and heat (H, W), got {tuple(image.shape)} {image.dtype}"
            f" and {tuple(heat.shape)}"
        )
    place = heat.clamp(0, 1) * (len(RAMP) - 1)
    lower = place.floor().clamp_max(len(RAMP) - 2).long()
    part = (place - lower).unsqueeze(-1)
    colour = RAMP[lower] * (1 - part) + RAMP[lower + 1] * part  # [H, W, 4]
    washed = image.float() / 255 * (1 - fade) + fade
    opacity = colour[..., 3]
    mixed = washed * (1 - opacity) + colour[..., :3].permute(2, 0, 1) * opacity
    return (mixed * 255).round().clamp(0, 255).to(torch.uint8)
