"""Configuration of OneR for transformers."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class OneRConfig(PretrainedConfig):
    """Sizes of OneR's tower; every one of them comes from `config.json`."""

    model_type = "oner"

    def __init__(self, **values: Any) -> None:
        """Take the values of `config.json`; a size that it lacks is that of a small tower."""
        sizes: dict[str, Any] = {
            "image_size": 48,
            "patch_size": 16,
            "width": 256,
            "depth": 4,
            "heads": 4,
            "mlp_width": 1024,
            "head_width": 768,
            "embed_dim": 128,
            "vocab_size": 8192,
            "max_text_tokens": 24,
            "shared_trunk": True,
            "shared_head": True,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        }
        for name, usual in sizes.items():
            setattr(self, name, values.pop(name, usual))
        super().__init__(**values)
