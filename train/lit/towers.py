"""The two towers of a LiT-like training: frozen encoders, and the heads that learn."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from oner_fast.models.lit import FORMAT, ImageTower, LiTConfig, LiTTower, build_heads, pooled_features, save_lit
from oner_fast.models.pretrained_encoders import Encoders
from oner_fast.train.clip.towers import Embeddings, TwoTowers


class LiTTowers(TwoTowers):
    """Trained heads on frozen encoders. Only the heads are parameters and enter a checkpoint."""

    def __init__(self, config: LiTConfig, encoders: Encoders, temperature: float, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.heads = build_heads(config, encoders, temperature)
        # In a tuple, where a module's search for submodules does not find them.
        self._frozen = (encoders.image.to(device), encoders.text.to(device))
        self._encoders = encoders
        self._tower = (LiTTower(ImageTower(encoders.image, self.heads.image), encoders, config.grid),)

    @property
    def log_logit_scale(self) -> nn.Parameter:
        return self.heads.logit_scale

    def read(self, captions: list[str]) -> Tensor:
        """Return padded token ids (B, L)."""
        return self._encoders.tokenize(captions)

    def forward(self, images: Tensor, texts: Tensor) -> Embeddings:
        """Embed uint8 images (B, 3, S, S) and padded token ids (B, L).

        The image head is linear, so an image's embedding is the mean of its tokens' and needs the pooled features only.
        """
        image_encoder, text_encoder = self._frozen
        with torch.no_grad():
            features = pooled_features(image_encoder(self._tower[0].pixels(images, images.device)))
            text = text_encoder(texts)
        return Embeddings(self.heads.image(features), self.heads.embed_text(text), self.log_logit_scale.exp())

    def about(self) -> dict[str, str]:
        """Describe a LiT and the weights that its heads belong to."""
        return {
            "kind": FORMAT,
            "model_config": json.dumps(asdict(self.config)),
            "encoders": json.dumps(self._encoders.origins()),
        }

    def save(self, folder: Path) -> None:
        """Write the heads and the origin of the encoders."""
        save_lit(folder, self.heads, self.config, self._encoders.origins())

    @property
    def encoders(self) -> Encoders:
        """The two frozen encoders."""
        return self._encoders
