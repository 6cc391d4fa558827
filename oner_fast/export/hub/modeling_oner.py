"""OneR for transformers: `AutoModel.from_pretrained(FOLDER, trust_remote_code=True)`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_oner import OneRConfig
from .plain_tower import PlainTower


@dataclass
class OneROutput(ModelOutput):
    """Embeddings (B, E), L2-normalised, of what was given: images, texts, or pairs of both."""

    embeds: Tensor | None = None


class OneRModel(PreTrainedModel):
    """One tower that embeds images, texts, and images with texts in one space."""

    config_class = OneRConfig
    base_model_prefix = "oner"
    main_input_name = "pixel_values"

    def __init__(self, config: OneRConfig) -> None:
        super().__init__(config)
        self.tower = PlainTower(config.to_dict())
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> OneROutput:
        """Embed images (B, 3, S, S) uint8, texts (B, T) int64, or the pairs of both in one pass.

        Raises ValueError where neither is given.
        """
        if pixel_values is None and input_ids is None:
            raise ValueError("give pixel_values, input_ids, or both; got neither")
        if input_ids is None:
            assert pixel_values is not None
            return OneROutput(self.tower.encode_image(pixel_values))
        if attention_mask is None:
            attention_mask = input_ids.new_ones(input_ids.shape)
        if pixel_values is None:
            return OneROutput(self.tower.encode_text(input_ids, attention_mask))
        return OneROutput(self.tower.encode_image_text(pixel_values, input_ids, attention_mask))

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Embed images (B, 3, S, S) uint8: (B, E)."""
        return self.tower.encode_image(pixel_values)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Embed texts (B, T) int64: (B, E)."""
        return self.tower.encode_text(
            input_ids, input_ids.new_ones(input_ids.shape) if attention_mask is None else attention_mask
        )

    def get_patch_features(self, pixel_values: Tensor) -> Tensor:
        """Project each patch's output of images (B, 3, S, S) uint8: (B, N, E), the grid row by row."""
        return self.tower.encode_patches(pixel_values)
