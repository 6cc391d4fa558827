"""Image towers of open_clip and timm for UTA, which needs each token in the joint space and not [CLS] alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oner_fast.models.optional_packages import optional_package


class TeacherImageTower(ABC):
    """An image tower that gives all of its tokens in the joint space.

    Its pooled embedding is token 0 ([CLS]) after the final norm and the projection; the other tokens pass through the
    same norm and projection.

    Attributes:
        patch_size, image_size: sides of a patch and of the image, in pixels.
        mean, std: normalisation of pixel values in [0, 1].
        interpolation: method by which images are resized, `bicubic` or `bilinear`.
        squash: whether images are resized to a square as a whole, instead of cut to their centre.
        has_tokens: whether there are such tokens; a `PooledTower` has none.
    """

    patch_size: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    squash: bool = False
    has_tokens: bool = True
    module: nn.Module
    """The module that holds the weights."""

    @abstractmethod
    def resize(self, image_size: int) -> None:
        """Take images of another size; the tower's own library resamples the positions."""

    def pixels(self, images: Tensor, device: torch.device) -> Tensor:
        """Resize images (B, 3, S, S) uint8, or floats in [0, 1], to `image_size` and normalise them: float32."""
        pixels = images.to(device).float()
        top = 255.0 if images.dtype == torch.uint8 else 1.0
        if pixels.shape[-1] != self.image_size:
            mode = "bilinear" if self.interpolation == "bilinear" else "bicubic"
            pixels = F.interpolate(pixels, self.image_size, mode=mode, antialias=True, align_corners=False)
            pixels = pixels.clamp(0.0, top)
        mean = torch.tensor(self.mean, device=device).view(3, 1, 1) * top
        std = torch.tensor(self.std, device=device).view(3, 1, 1) * top
        return (pixels - mean) / std

    @abstractmethod
    def hidden(self, pixels: Tensor) -> Tensor:
        """Compute [CLS] and the grid's tokens, before projection, of normalised pixels (B, 3, S, S): (B, 1 + N, D).

        The grid is in order row by row.
        """

    @abstractmethod
    def project(self, hidden: Tensor) -> Tensor:
        """Project (B, 1 + N, D) -> (B, 1 + N, E)."""

    @abstractmethod
    def pooled(self, pixels: Tensor) -> Tensor:
        """Embed normalised pixels (B, 3, S, S) by the library's own pooling: (B, E)."""


class OpenClipViT(TeacherImageTower):
    """open_clip's own VisionTransformer."""

    def __init__(self, model: nn.Module, name: str) -> None:
        visual: Any = model.visual
        self.module, self._model, self._visual = visual, model, visual
        if visual.attn_pool is not None or visual.pool_type != "tok":
            pool = "attention" if visual.attn_pool is not None else visual.pool_type
            raise ValueError(other_pooling(name, pool))
        if visual.proj is None:
            raise ValueError(f"{name}: the image tower has no projection, so that its tokens are in no joint space")
        self.patch_size = square(visual.patch_size, name, "patches")
        self.image_size = square(visual.image_size, name, "images")
        self.mean, self.std, self.interpolation, self.squash = _preprocessing(visual, name)

    def resize(self, image_size: int) -> None:
        grid = image_size // self.patch_size
        self._visual.grid_size, self._visual.image_size = (grid, grid), (image_size, image_size)
        state = {"visual.positional_embedding": self._visual.positional_embedding.detach()}
        optional_package("open_clip").model.resize_pos_embed(state, self._model)
        self._visual.positional_embedding = nn.Parameter(state["visual.positional_embedding"], requires_grad=False)
        self.image_size = image_size

    def hidden(self, pixels: Tensor) -> Tensor:
        found = self._visual.forward_intermediates(
            pixels,
            indices=1,
            normalize_intermediates=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        return torch.cat([found["image_intermediates_prefix"][-1], found["image_intermediates"][-1]], dim=1)

    def project(self, hidden: Tensor) -> Tensor:
        return hidden @ self._visual.proj

    def pooled(self, pixels: Tensor) -> Tensor:
        return self._visual(pixels)


class TimmViT(TeacherImageTower):
    """A ViT of timm, alone or as the trunk of open_clip's TimmModel (for example EVA)."""

    def __init__(self, trunk: nn.Module, visual: nn.Module | None, name: str) -> None:
        self._trunk: Any = trunk
        self._visual: Any = visual
        self.module = trunk if visual is None else visual
        known: Any = trunk
        embedding = getattr(trunk, "patch_embed", None)
        if embedding is None or not hasattr(trunk, "num_prefix_tokens") or not hasattr(trunk, "set_input_size"):
            raise ValueError(_no_grid(name, trunk))
        if known.global_pool != "token" or known.num_prefix_tokens < 1:
            raise ValueError(other_pooling(name, known.global_pool or "none"))
        if hasattr(trunk, "head_dist"):
            raise ValueError(other_pooling(name, "distillation token"))
        self.patch_size = square(embedding.patch_size, name, "patches")
        self.image_size = square(embedding.img_size, name, "images")
        cfg: dict[str, Any] = known.pretrained_cfg
        cfg = cfg if visual is None else {**cfg, **getattr(visual, "preprocess_cfg", {})}
        self.mean, self.std, self.interpolation = tuple(cfg["mean"]), tuple(cfg["std"]), cfg["interpolation"]
        self.squash = _squashes(cfg, name)

    def resize(self, image_size: int) -> None:
        (self._trunk if self._visual is None else self._visual).set_input_size(image_size)
        self.image_size = image_size

    def hidden(self, pixels: Tensor) -> Tensor:
        tokens = self._trunk.forward_features(pixels)
        registers = self._trunk.num_prefix_tokens - 1
        return torch.cat([tokens[:, :1], tokens[:, 1 + registers :]], dim=1) if registers else tokens

    def project(self, hidden: Tensor) -> Tensor:
        # Each token becomes the [CLS] token of a sequence of one, so that timm's own pooling, norm and head apply.
        out = self._trunk.forward_head(hidden.reshape(-1, 1, hidden.shape[-1]))
        out = out if self._visual is None else self._visual.head(out)
        return out.view(*hidden.shape[:2], -1)

    def pooled(self, pixels: Tensor) -> Tensor:
        return self.module(pixels)


class PooledTower(TeacherImageTower):
    """An image tower whose tokens are in no joint space; it embeds images as wholes alone."""

    has_tokens = False

    def __init__(self, reason: str) -> None:
        """Take the sentence that says why no token of it is in the joint space."""
        self._reason = reason

    def resize(self, image_size: int) -> None:
        raise ValueError(self._reason)

    def hidden(self, pixels: Tensor) -> Tensor:
        raise ValueError(self._reason)

    def project(self, hidden: Tensor) -> Tensor:
        raise ValueError(self._reason)


class OpenClipPooled(PooledTower):
    """The image side of any model of open_clip."""

    def __init__(self, model: nn.Module, reason: str, name: str) -> None:
        super().__init__(reason)
        whole: Any = model
        self._model, self.module = whole, whole.visual
        self.image_size = self.patch_size = square(whole.visual.image_size, name, "images")
        self.mean, self.std, self.interpolation, self.squash = _preprocessing(whole.visual, name)

    def pooled(self, pixels: Tensor) -> Tensor:
        return self._model.encode_image(pixels, normalize=False)


def image_tower_of(model: nn.Module, name: str) -> TeacherImageTower:
    """Wrap the image tower of an open_clip model.

    Raises:
        ValueError: its image tower has no token grid (a ResNet, a ConvNeXt), does not pool by [CLS], or has no
            projection.
    """
    visual: Any = model.visual
    if isinstance(visual, optional_package("open_clip").transformer.VisionTransformer):
        return OpenClipViT(model, name)
    if hasattr(visual, "trunk"):
        return TimmViT(visual.trunk, visual, name)
    raise ValueError(_no_grid(name, visual))


def _no_grid(name: str, tower: nn.Module) -> str:
    return (
        f"{name}: its image tower, a {type(tower).__name__}, has no grid of tokens beside a [CLS] token; "
        "a teacher must be a ViT"
    )


def other_pooling(name: str, pool: str) -> str:
    """Say why a tower that pools by `pool` is no teacher."""
    return (
        f"{name}: its image tower pools by {pool!r}, so that no token of it is in the joint space; "
        "a teacher's embedding must be its [CLS] token ('tok', 'token')"
    )


def square(size: int | list[int] | tuple[int, ...], name: str, what: str) -> int:
    """Return the one side of a size; ValueError, which starts with `name`, where it has two."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"{name}: its {what} must be square, got {size}")
    return sides.pop()


def _preprocessing(visual: Any, name: str) -> tuple[tuple[float, ...], tuple[float, ...], str, bool]:
    """Mean, standard deviation, interpolation and `squash`; CLIP's where the model states none."""
    constants = optional_package("open_clip").constants
    found = {"mean": constants.OPENAI_DATASET_MEAN, "std": constants.OPENAI_DATASET_STD, "interpolation": "bicubic"}
    found |= getattr(visual, "preprocess_cfg", {})
    return tuple(found["mean"]), tuple(found["std"]), found["interpolation"], _squashes(found, name)


def _squashes(preprocess: dict[str, Any], name: str) -> bool:
    """Whether images are squashed; ValueError where they would be padded."""
    mode = preprocess.get("resize_mode") or "shortest"
    if mode not in ("shortest", "squash"):
        raise ValueError(
            f"{name}: its images are resized by the mode {str(mode)[:40]!r}, and 'shortest' or 'squash' is needed"
        )
    return bool(mode == "squash")
