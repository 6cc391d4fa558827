"""Base of what `oner_fast.load` returns: frozen towers, in the form that open_clip and clip_benchmark evaluate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oner_fast.data.given_images import GivenImage, GivenImages, as_list
from oner_fast.preprocess import Preprocess
from oner_fast.text_ids import GivenTexts, TextTokenizer

_SLACK = 0.25  # by which an interpolated image of floats in [0, 1] may be outside of that range


class LoadedModel(nn.Module, ABC):
    """A trained model with its preprocessing and tokenizer, always in evaluation mode and without gradients.

    Embeddings are (B, E) float32. It may be handed to open_clip and clip_benchmark as it is: with `preprocess` as the
    transform of the images and `tokenize` as the tokenizer.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> LoadedModel:
        """Stay in evaluation mode."""
        return super().train(False)  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.model.parameters()).device

    @property
    @abstractmethod
    def preprocess(self) -> Preprocess:
        """Conversion of an image of any form and size to uint8 (3, S, S), called as `preprocess(image)`."""

    @property
    @abstractmethod
    def tokenize(self) -> TextTokenizer:
        """Tokenizer whose call gives one tensor of ids (B, context_length) for `encode_text`, padded at its end."""

    @property
    def logit_scale(self) -> Tensor:
        """Logarithm of the factor on the cosines, as in a CLIP: 0-d float32, on the model's device.

        It is 0 where the file does not state what the model was trained with.
        """
        return torch.tensor(self._log_logit_scale(), device=self.device)

    @property
    def logit_bias(self) -> Tensor | None:
        """Number added to the scaled cosines (SigLIP): 0-d float32, or None."""
        return None

    @torch.no_grad()
    def encode_image(self, images: GivenImages, image_size: int | None = None, *, normalize: bool = True) -> Tensor:
        """Embed images: (B, E).

        Args:
            images: one image or a list of images, each a path, the bytes of an image file, a PIL image or a uint8 array
                (H, W, 3); an array (B, H, W, 3); or a tensor of pixels ready for the model, (B, 3, S, S) uint8 or
                floats in [0, 1]. S may be any multiple of the patch size of OneR or a student; a CLIP resizes a tensor
                to its own size.
            image_size: side in pixels that images are brought to, a multiple of the patch size; the size of the
                training by default. Positions are resampled for another size. A CLIP takes its own size alone.
            normalize: whether embeddings are L2-normalised.

        Raises:
            TypeError: an image has another form; the message says which.
            ValueError: there is no image, one cannot be decoded or is over the budget of a sample, the patches do not
                divide `image_size`, a CLIP is given another than its own, or floats are not in [0, 1].
            OSError: a file cannot be read.
        """
        return finished(self._embed_images(self._pixels(images, image_size)), normalize)

    @torch.no_grad()
    def encode_text(self, texts: GivenTexts, *, normalize: bool = True) -> Tensor:
        """Embed texts: (B, E).

        Args:
            texts: strings; ids (B, L) from `tokenize`; or for OneR packed ids, as its `tokenizer` gives them.
            normalize: whether embeddings are L2-normalised.

        Raises:
            TypeError: `texts` is one string, or holds something that is no string; ids are no integers.
            ValueError: there is no text, one that is not valid Unicode, or ids that are none of the model's; the model
                has no text tower, or one that cannot be loaded, would have to be fetched without having been asked for,
                or does not fit. The message says which.
        """
        return finished(self._embed_texts(texts), normalize)

    @torch.no_grad()
    def encode_patches(self, images: GivenImages, image_size: int | None = None, *, normalize: bool = True) -> Tensor:
        """Embed each patch in the joint space: (B, N, E), the grid row by row.

        Arguments and errors are those of `encode_image`. ValueError, too, where a CLIP's tokens are in no joint space.
        """
        return finished(self._embed_patches(self._pixels(images, image_size)), normalize)

    def forward(
        self, image: GivenImages | None = None, text: GivenTexts | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Embed images, texts or both as open_clip's CLIP does.

        Returns:
            The L2-normalised embeddings of images and of texts, None where not given, and the factor on their cosines.
        """
        images = None if image is None else self.encode_image(image)
        texts = None if text is None else self.encode_text(text)
        return images, texts, self.logit_scale.exp()

    def _pixels(self, images: GivenImages, image_size: int | None) -> Tensor:
        self._check_image_size(image_size)
        return stacked(images, self.preprocess, image_size).to(self.device)

    @abstractmethod
    def _check_image_size(self, image_size: int | None) -> None:
        """Raise ValueError unless images may have this side; None is the model's own."""

    @abstractmethod
    def _embed_images(self, pixels: Tensor) -> Tensor: ...

    @abstractmethod
    def _embed_texts(self, texts: GivenTexts) -> Tensor: ...

    @abstractmethod
    def _embed_patches(self, pixels: Tensor) -> Tensor: ...

    @abstractmethod
    def _log_logit_scale(self) -> float: ...


def check_image_size(image_size: int | None, patch_size: int) -> None:
    """Raise ValueError unless the patches divide an image of this size; None is the model's own."""
    if image_size is not None and (image_size < patch_size or image_size % patch_size):
        least = max(1, image_size // patch_size) * patch_size
        raise ValueError(
            f"image_size must be a multiple of the patch size {patch_size}, such as {least} or {least + patch_size}, "
            f"got {image_size}"
        )


def stacked(
    images: GivenImages, preprocess: Callable[[GivenImage, str, int | None], Tensor], image_size: int | None = None
) -> Tensor:
    """Stack images to one uint8 tensor (B, 3, S, S); a tensor passes unchanged.

    Raises as `oner_fast.data.given_images.as_list` and `preprocess` do; a tensor that is no batch of images, one of
    another size than `image_size`, or one of floats that are not in [0, 1], is a ValueError.
    """
    if isinstance(images, Tensor):
        if images.is_nested or images.is_meta or images.ndim != 4:
            shape = "a nested" if images.is_nested else "a meta" if images.is_meta else f"{tuple(images.shape)}"
            raise ValueError(
                f"images: got {shape} tensor, need (B, 3, S, S) of the model's size S; give images of other sizes, or "
                "one alone, as a list of tensors (3, H, W)"
            )
        if len(images) == 0:
            raise ValueError("images must hold at least one image, got none")
        if image_size is not None and images.shape[-1] != image_size:
            raise ValueError(f"images: got a tensor of {images.shape[-1]} px beside image_size {image_size}; resize it")
        if images.is_floating_point():
            _check_range(images)
        return images
    return torch.stack([preprocess(image, f"image {i}", image_size) for i, image in enumerate(as_list(images))])


def finished(embeddings: Tensor, normalize: bool) -> Tensor:
    """Convert embeddings to float32, and L2-normalise them where asked for."""
    return F.normalize(embeddings.float(), dim=-1) if normalize else embeddings.float()


def _check_range(images: Tensor) -> None:
    """Raise ValueError where floats are bytes, or were normalised already."""
    least, most = (float(each) for each in images.aminmax())
    if least < -_SLACK or most > 1 + _SLACK:
        raise ValueError(
            f"images: got floats from {least:.3g} to {most:.3g}, need uint8, or floats in [0, 1]; the model subtracts "
            "the mean itself, so use its own preprocess as the transform"
        )
