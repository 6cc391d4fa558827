"""The modality-specific input maps of the tower: pixels to tokens and word ids to tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from oner_fast import ops
from oner_fast.dtypes import statistics_dtype
from oner_fast.nn.packed_rows import place_in_caption, select_rows
from oner_fast.nn.positions import ResampledGrids


class PatchEmbedding(nn.Module):
    """Embed patches with learned absolute positions; the pixels of a masked patch are never read or embedded.

    A masked cell becomes the mask token with the cell's position and keeps its place in the sequence. A dropped cell
    (patch dropout) is absent.

    Images may have any square size that the patches divide. Positions of another grid than the table's are resampled
    from it (`oner_fast.nn.positions`).
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        mask_token: bool = True,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size must be a multiple of patch_size {patch_size}, got {image_size}")
        self.image_size, self.patch_size = image_size, patch_size
        self.grid = image_size // patch_size
        self.mean, self.std = mean, std
        self.project = nn.Linear(len(mean) * patch_size**2, width)
        self.positions = nn.Parameter(torch.empty(self.grid**2, width))
        self._resampled = ResampledGrids()
        self.mask_token = nn.Parameter(torch.empty(width)) if mask_token else None
        nn.init.trunc_normal_(self.positions, std=0.02)
        if self.mask_token is not None:
            nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(
        self,
        images: Tensor,
        cells: Tensor | None = None,
        masked: Tensor | None = None,
        masked_count: int | None = None,
    ) -> Tensor:
        """Embed images (B, C, S, S), uint8 or floating: (B, M, D).

        Args:
            images: (B, C, S, S) uint8 or floating.
            cells: (B, M) int64; all cells by default.
            masked: (B, M) bool, with the same number of True in each row.
            masked_count: that number. Where None, it is read from `masked`, for which the host waits for a GPU.

        Raises:
            ValueError: the rows of `masked` differ in number, or the patches do not divide the images.
        """
        positions = self.positions_of(images)
        batch, count = images.shape[0], positions.shape[0]
        if cells is None:
            cells = torch.arange(count, device=images.device).expand(batch, count)
        if masked is None:
            return self._embed(images, cells) + select_rows(positions, cells.flatten()).view(batch, -1, self.width)
        if self.mask_token is None:
            raise ValueError("masked needs a mask token, and this embedding was built with mask_token=False")
        order = torch.argsort(masked.to(torch.uint8), dim=1, stable=True)  # visible cells first, in order
        visible = order[:, : masked.shape[1] - (self.masked_count(masked) if masked_count is None else masked_count)]
        tokens = self._embed(images, cells.gather(1, visible))  # [B, V, D]
        placed = _PlaceTokens.apply(tokens, self.mask_token, order) + select_rows(positions, cells.flatten())
        return placed.view(batch, -1, self.width)

    def packed(self, images: Tensor, cells: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Embed a packed selection of patches: (T, D).

        Args:
            images: (B, C, S, S) uint8 or floating.
            cells: (T,) int64, those of all images one after another.
            cu_seqlens: (B + 1,) int32, their boundaries.

        Raises:
            ValueError: the patches do not divide the images.
        """
        return self._embed(images, cells, cu_seqlens) + select_rows(self.positions_of(images), cells)

    def positions_of(self, images: Tensor) -> Tensor:
        """Return the positions of the patches of images (B, C, S, S): (N, D), row-major.

        Raises:
            ValueError: the images are not square, or the patches do not divide them.
        """
        height, width = images.shape[-2:]
        if height == width == self.image_size:
            return self.positions
        if height != width or width % self.patch_size or not width:
            raise ValueError(
                f"images must have shape (B, C, {self.image_size}, {self.image_size}), or another square size that is "
                f"a multiple of the patch size {self.patch_size}, got {tuple(images.shape)}"
            )
        return self._resampled(self.positions, width // self.patch_size)

    @property
    def width(self) -> int:
        """Size of a token."""
        return self.positions.shape[1]

    @staticmethod
    def masked_count(masked: Tensor) -> int:
        """Number of masked cells of each image. Raises ValueError where the images differ (checked on the CPU)."""
        counts = masked.sum(dim=1)
        if masked.device.type == "cpu" and bool((counts != counts[:1]).any()):
            raise ValueError(
                f"masked must hide the same number of patches in every image, got {counts.unique().tolist()}"
            )
        return int(counts[0])

    @classmethod
    def masked_places(cls, masked: Tensor) -> Tensor:
        """Cells of each image that are masked, ascending: (B, count) int64. Raises as `masked_count`."""
        return torch.argsort((~masked).to(torch.uint8), dim=1, stable=True)[:, : cls.masked_count(masked)]

    def _embed(self, images: Tensor, kept: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        device = images.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.project.weight.dtype
        given = (images, kept, self.patch_size, self.mean, self.std, dtype)
        if cu_seqlens is None:
            return self.project(ops.gather_patches(*given))
        return self.project(ops.gather_patches(*given, cu_seqlens=cu_seqlens)[0])


class _PlaceTokens(torch.autograd.Function):
    """Put tokens (B, V, D) at the cells `order[:, :V]` and the mask token (D,) at the others: (B * M, D).

    `order` (B, M) int64 lists all cells of each image. The gradient of the mask token is one float32 column sum. As the
    gradient of an `index_select` it would be a serial sum in the dtype of the tokens on CUDA, with one addend for each
    masked cell of the batch: percents off in bfloat16.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(tokens: Tensor, mask_token: Tensor, order: Tensor) -> Tensor:
        batch, shown, width = tokens.shape
        rows = torch.arange(batch * shown, device=order.device).view(batch, shown)
        # Row b V + v is the v-th visible patch of image b, and row B V is the mask token.
        slots = torch.full_like(order, batch * shown).scatter(1, order[:, :shown], rows)
        table = torch.cat([tokens.reshape(-1, width), mask_token.to(tokens.dtype).unsqueeze(0)])
        return table.index_select(0, slots.flatten())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        tokens, mask_token, order = inputs
        ctx.save_for_backward(order)
        ctx.shown, ctx.dtype = tokens.shape[1], mask_token.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (order,), (grad,) = ctx.saved_tensors, grads
        starts = torch.arange(order.shape[0], device=order.device).unsqueeze(1) * order.shape[1]
        visible, hidden = (order + starts).tensor_split([ctx.shown], dim=1)
        to_tokens = to_mask = None
        if ctx.needs_input_grad[0]:
            to_tokens = grad.index_select(0, visible.flatten()).view(*visible.shape, grad.shape[1])
        if ctx.needs_input_grad[1]:
            to_mask = grad.index_select(0, hidden.flatten()).sum(0, dtype=statistics_dtype(grad)).to(ctx.dtype)
        return to_tokens, to_mask, None


class WordEmbedding(nn.Module):
    """Embed the word ids of packed captions, with learned absolute positions within the caption."""

    def __init__(self, vocab_size: int, max_tokens: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.empty(max_tokens, width))
        nn.init.trunc_normal_(self.words.weight, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Embed input_ids (T,) int64 of packed captions with boundaries cu_seqlens (B + 1,) int32: (T, D).

        Raises ValueError where a caption is longer than the positions (checked on the CPU).
        """
        places = place_in_caption(cu_seqlens, input_ids.shape[0])
        limit = self.positions.shape[0]
        if places.device.type == "cpu" and places.numel() and int(places.max()) >= limit:
            raise ValueError(f"captions may hold {limit} tokens, got one of {int(places.max()) + 1}; truncate them")
        return select_rows(self.words.weight, input_ids) + select_rows(self.positions, places)
