"""UTA's student: a ViT in EVA-02's style that reads only the visible patches (Liu et al., TMLR 2024, arXiv 2405.19009).

There is no mask token and no decoder. [CLS] and the kept patches pass through the trunk. The final norm and one Linear
map each output to the joint space of the CLIP teacher.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from oner_fast.models.resampling import resample_patches, resample_positions
from oner_fast.nn import packed_rows
from oner_fast.nn.embeddings import PatchEmbedding
from oner_fast.nn.linear import Linear
from oner_fast.nn.rope import RotaryPositions
from oner_fast.nn.rotary_transformer import RotaryTrunk
from oner_fast.nn.transformer import Kept, init_weights
from oner_fast.ops.masked_gather import ragged_boundaries


@dataclass(frozen=True)
class UTAConfig:
    """Sizes of the student; the defaults are B's. Mean and standard deviation are CLIP's."""

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_hidden: int = 2048
    embed_dim: int = 1024
    rope_theta: float = 10000.0
    rope_grid: int = 16
    """Cells of the axis to which the positions of each grid are rescaled before they become angles."""
    layer_norm_eps: float = 1e-6
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    grad_checkpointing: bool = False
    mask_token: bool = False
    """Use a learned mask token, for comparisons that feed masked patches to the student; UTA has none."""

    @property
    def grid(self) -> int:
        """Number of patches along a side of the image."""
        return self.image_size // self.patch_size

    @property
    def cells(self) -> int:
        """Number of patches of an image."""
        return self.grid**2


UTA_SIZES: dict[str, UTAConfig] = {
    "tiny": UTAConfig(48, 8, width=192, depth=6, heads=6, mlp_hidden=512, embed_dim=256),
    "b": UTAConfig(),
    "l": UTAConfig(336, 14, width=1024, depth=24, heads=16, mlp_hidden=2730),
    "g": UTAConfig(336, 14, width=1408, depth=40, heads=16, mlp_hidden=4096),
}
"""UTA's B, L and g, and `tiny`, our own size for a CPU."""


class UTA(nn.Module):
    """The student: patch embedding, learned positions, trunk with rotary positions, and the map to the joint space."""

    def __init__(self, config: UTAConfig) -> None:
        super().__init__()
        self.config = c = config
        self.patch_embedding = PatchEmbedding(
            c.image_size, c.patch_size, c.width, c.image_mean, c.image_std, c.mask_token
        )
        self.cls_token = nn.Parameter(torch.empty(c.width))
        self.cls_position = nn.Parameter(torch.empty(c.width))
        self.rope = RotaryPositions(c.grid, c.width // c.heads, c.rope_theta, c.rope_grid)
        self.trunk = RotaryTrunk(c.width, c.depth, c.heads, c.mlp_hidden, c.layer_norm_eps, c.grad_checkpointing)
        self.head = Linear(c.width, c.embed_dim)
        for token in (self.cls_token, self.cls_position):
            nn.init.trunc_normal_(token, std=0.02)
        for linear in (self.patch_embedding.project, self.head):
            init_weights(linear)

    def forward(
        self,
        images: Tensor,
        kept: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        masked: Tensor | None = None,
        masked_count: int | None = None,
        branch_factors: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the outputs of [CLS] and of the kept patches in the joint space, not normalised.

        Args:
            images: (B, C, S, S) uint8, or floating in [0, 1]; only the kept patches are read. S may be any multiple of
                the patch size: positions of another grid than the configuration's are resampled.
            kept: the cells that enter, row-major, each at most once in an image: (B, K) int64, all where None; with
                `cu_seqlens` flat, (T,).
            cu_seqlens: (B + 1,) int32, the boundaries of the images in a flat `kept`.
            masked: (B, N) bool, the same number in each image: these cells enter as the mask token with their position.
                Only without `kept` and where `config.mask_token`, for the comparison "the same student, fed mask
                tokens".
            masked_count: how many those are in each image. Where None, it is read from `masked`: a GPU is waited for.
            branch_factors: (2 * depth, B), the factors of each image's residual branches, from
                `oner_fast.nn.drop_path.branch_factors`; none where None.

        Returns:
            (B, 1 + K, E), [CLS] first; with `cu_seqlens` the pair `(packed (T + B, E), cu_seqlens_out (B + 1,))`.

        Raises:
            ValueError, IndexError: a shape, dtype or cell does not fit, or `masked` is given with `kept`.
        """
        if cu_seqlens is None:
            x, places = self._embed(images, kept, masked, masked_count)
            tokens = x.shape[1]
            factors = None if branch_factors is None else branch_factors.repeat_interleave(tokens, 1)
            outputs = self.head(self._run(images, x.flatten(0, 1), places.flatten(), _even(x), tokens, factors=factors))
            return outputs.unflatten(0, (-1, tokens))
        if kept is None or masked is not None:
            raise ValueError("cu_seqlens divides a flat kept: pass kept of shape (T,) and no masked")
        x, places, cu_seqlens_out = self._embed_packed(images, kept, cu_seqlens)
        factors = None
        if branch_factors is not None:
            lengths = cu_seqlens_out.diff().long()
            factors = branch_factors.repeat_interleave(lengths, 1, output_size=x.shape[0])
        longest = 1 + self._grid(images) ** 2
        return self.head(self._run(images, x, places, cu_seqlens_out, longest, factors=factors)), cu_seqlens_out

    def encode_image(self, images: Tensor, projected: bool = True) -> Tensor:
        """Embed images (B, C, S, S), with all patches visible: the output of [CLS], (B, E), not normalised.

        Where `projected` is false, returns the input of the head, (B, D), which is the final norm's output. The last
        block computes no other output.
        """
        x, places = self._embed(images, None, None)
        batch, tokens = x.shape[:2]
        first = torch.arange(batch, device=x.device)
        kept = Kept(first * tokens, torch.arange(batch + 1, dtype=torch.int32, device=x.device))
        outputs = self._run(images, x.flatten(0, 1), places.flatten(), _even(x), tokens, kept)
        return self.head(outputs) if projected else outputs

    def encode_patches(self, images: Tensor, projected: bool = True) -> Tensor:
        """Compute the outputs of all patches of images (B, C, S, S): (B, N, E), row-major, not normalised.

        Where `projected` is false, returns the input of the head, (B, N, D).
        """
        x, places = self._embed(images, None, None)
        outputs = self._run(images, x.flatten(0, 1), places.flatten(), _even(x), x.shape[1])
        outputs = outputs.unflatten(0, (x.shape[0], -1))[:, 1:]
        return self.head(outputs.flatten(0, 1)).unflatten(0, outputs.shape[:2]) if projected else outputs

    def _grid(self, images: Tensor) -> int:
        """Return the number of patches along a side of images (B, C, S, S)."""
        return images.shape[-1] // self.config.patch_size

    def _run(
        self,
        images: Tensor,
        x: Tensor,
        places: Tensor,
        cu_seqlens: Tensor,
        longest: int,
        kept: Kept | None = None,
        factors: Tensor | None = None,
    ) -> Tensor:
        rotation = self.rope(places, self.cls_token.dtype, self._grid(images))
        return self.trunk(x, rotation, cu_seqlens, longest, kept, factors)

    def _embed(
        self, images: Tensor, kept: Tensor | None, masked: Tensor | None, masked_count: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embed the trunk's input (B, 1 + K, D), and return the place of each of its tokens (B, 1 + K).

        The place is 0 for [CLS], else 1 + cell.
        """
        if masked is not None and kept is not None:
            raise ValueError("masked cells stay among all patches: pass either kept or masked")
        tokens = self.patch_embedding(images, kept, masked, masked_count)
        batch, count, width = tokens.shape
        prefix = (self.cls_token + self.cls_position).to(tokens.dtype).expand(batch, 1, width)
        cells = torch.arange(count, device=tokens.device).expand(batch, count) if kept is None else kept
        places = torch.cat([cells.new_zeros(batch, 1), cells + 1], dim=1)
        return torch.cat([prefix, tokens], dim=1), places

    def _embed_packed(self, images: Tensor, kept: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = self.patch_embedding.packed(images, kept, cu_seqlens)
        prefix = (self.cls_token + self.cls_position).to(tokens.dtype).unsqueeze(0)
        rows = packed_rows.pack_texts(cu_seqlens, kept.shape[0], 1).rows  # [CLS] is row 0 of the table
        x = packed_rows.select_rows(torch.cat([prefix, tokens]), rows)
        places = torch.cat([kept.new_zeros(1), kept + 1]).index_select(0, rows)
        return x, places, ragged_boundaries(cu_seqlens, 1)


@torch.no_grad()
def resampled(student: UTA, *, image_size: int, patch_size: int | None = None) -> UTA:
    """Copy a student to another resolution or patch size: learned positions and patch embedding are resampled.

    Rotary positions need nothing: each grid is rescaled to the same angles. For the resampling see
    `oner_fast.models.resampling`.

    Args:
        student: the student, which stays as it is.
        image_size: pixels along a side of the copy's images.
        patch_size: pixels along a side of its patches; the student's where None.

    Raises:
        ValueError: `image_size` is not a multiple of the patch size.
    """
    patch_size = student.config.patch_size if patch_size is None else patch_size
    config = replace(student.config, image_size=image_size, patch_size=patch_size)
    weight, positions = student.patch_embedding.project.weight, student.patch_embedding.positions
    copy = UTA(config).to(device=weight.device, dtype=weight.dtype).train(student.training)
    state = student.state_dict()
    state["patch_embedding.project.weight"] = resample_patches(weight, len(config.image_mean), patch_size)
    table = torch.cat([student.cls_position.unsqueeze(0), positions]).unsqueeze(0)
    state["patch_embedding.positions"] = resample_positions(table, config.grid)[0, 1:]
    copy.load_state_dict(state)
    return copy


def _even(x: Tensor) -> Tensor:
    """Boundaries of x (B, L, D): cu_seqlens (B + 1,) int32."""
    return torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * x.shape[1]
