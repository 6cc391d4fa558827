"""A CLIP or SigLIP in a folder of transformers: `config.json`, safetensors, tokenizer and preprocessing.

Its configuration and weights are compared before anything is built, and only sizes, activations and token ids are taken
from it, so that no entry of it names code or a model to fetch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from oner_fast import bounded_json
from oner_fast.models.fitting import Found, check_shapes, filled
from oner_fast.models.optional_packages import optional_package
from oner_fast.models.resampling import resample_positions
from oner_fast.models.safetensors_header import Header, read_header
from oner_fast.models.state_files import read_safetensors, read_state, unwrapped
from oner_fast.models.teacher_image_towers import PooledTower, other_pooling, square

CONFIG = "config.json"
TYPES = ("clip", "siglip")
MAX_JSON = 2**20
MAX_TOKENIZER = 64 * 2**20
"""Greatest size of a file of the tokenizer; that of a vocabulary of 256,000 words takes 34 MB."""
MAX_SHARDS = 256

_WEIGHTS, _INDEX, _PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
_TOWER = (
    "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads", "hidden_act",
    "layer_norm_eps",
)  # fmt: skip
_TEXT = (
    *_TOWER, "vocab_size", "max_position_embeddings", "projection_size", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
_VISION = (*_TOWER, "num_channels", "image_size", "patch_size", "vision_use_head")
_MAX_CONTEXT = 4096
_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
_BESIDE = ("merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class HuggingFaceClip(nn.Module):
    """The towers of transformers' `CLIPModel` or `SiglipModel` under open_clip's names.

    Attributes:
        kind: `clip` or `siglip`.
        preprocess: content of the folder's `preprocessor_config.json`.
        vocab_size, context_length: number of words, and of the tokens of a text.
    """

    clip: Any

    def __init__(self, clip: Any, kind: str, preprocess: dict[str, Any]) -> None:
        super().__init__()
        self.clip = clip
        self.kind, self.preprocess = kind, preprocess
        self.visual = ImageSide(clip)
        text = clip.config.text_config
        self.vocab_size: int = text.vocab_size
        self.context_length: int = text.max_position_embeddings

    @property
    def logit_scale(self) -> Tensor:
        """Logarithm of the factor on the cosines."""
        scale: Tensor = self.clip.logit_scale
        return scale

    @property
    def logit_bias(self) -> Tensor | None:
        """Number added to the scaled cosines (SigLIP)."""
        return getattr(self.clip, "logit_bias", None)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Embed ids (B, context_length): (B, E), not normalised."""
        pooled: Tensor = self.clip.text_model(input_ids=ids).pooler_output
        return self.clip.text_projection(pooled) if self.kind == "clip" else pooled


class ImageSide(nn.Module):
    """The image tower with its projection, which SigLIP has none of."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.vision_model: Any = clip.vision_model
        self.projection: nn.Module = getattr(clip, "visual_projection", None) or nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed normalised pixels (B, 3, S, S): (B, E)."""
        embeddings: Tensor = self.projection(self.vision_model(pixel_values=pixels).pooler_output)
        return embeddings


class HuggingFacePooled(PooledTower):
    """The image tower of a folder."""

    def __init__(self, model: HuggingFaceClip, reason: str, name: str) -> None:
        super().__init__(reason)
        self.module: ImageSide = model.visual
        vision = model.clip.config.vision_config
        self.image_size = self.patch_size = square(vision.image_size, name, "images")
        self.mean, self.std, self.interpolation, self.squash = _preprocessing(model, self.image_size, name)

    def pooled(self, pixels: Tensor) -> Tensor:
        return self.module(pixels)


class HuggingFaceViT(HuggingFacePooled):
    """The image tower of a CLIP, whose tokens pass the final norm and the projection of [CLS]."""

    has_tokens = True

    def __init__(self, model: HuggingFaceClip, name: str) -> None:
        if model.kind != "clip":
            raise ValueError(other_pooling(name, "attention"))
        super().__init__(model, "", name)
        self.patch_size = square(model.clip.config.vision_config.patch_size, name, "patches")

    def resize(self, image_size: int) -> None:
        embeddings = self.module.vision_model.embeddings
        table = embeddings.position_embedding.weight.detach()
        resampled = resample_positions(table.unsqueeze(0), image_size // self.patch_size).squeeze(0)
        embeddings.position_embedding = nn.Embedding.from_pretrained(resampled)
        embeddings.position_ids = torch.arange(len(resampled), device=table.device).expand(1, -1)
        embeddings.num_positions, embeddings.num_patches = len(resampled), len(resampled) - 1
        embeddings.image_size = self.image_size = image_size

    def hidden(self, pixels: Tensor) -> Tensor:
        return self.module.vision_model(pixel_values=pixels).last_hidden_state

    def project(self, hidden: Tensor) -> Tensor:
        return self.module.projection(self.module.vision_model.post_layernorm(hidden))


def transformers_package() -> ModuleType:
    """Import transformers. Raises ModuleNotFoundError, which says how to install it, where it is absent."""
    found = optional_package("transformers")
    optional_package("transformers.modeling_utils")  # imports torchvision, whose ops may have to be declared
    return found


def is_folder(folder: Path) -> bool:
    """Whether a folder holds a `config.json` that names a type of model, as transformers writes it."""
    path = folder / CONFIG
    try:
        if not path.is_file() or path.stat().st_size > MAX_JSON:
            return False
        return isinstance(bounded_json.load_object(path.read_bytes(), str(path)).get("model_type"), str)
    except (ValueError, OSError):
        return False


def load_folder(folder: Path) -> HuggingFaceClip:
    """Load a CLIP or SigLIP (float32, evaluation mode).

    Raises:
        FileNotFoundError: the folder holds no weights.
        ValueError: the folder holds a model of another type, or weights that do not fit its configuration.
        ModuleNotFoundError: transformers is not installed.
        OSError: a file cannot be read.
    """
    path = folder / CONFIG
    config = _json(path)
    kind = config.get("model_type")
    if kind not in TYPES:
        raise ValueError(f"{path} names the type {bounded_json.shown(kind)}, and {' or '.join(TYPES)} is needed")
    sizes = {"text": _sizes(config, "text", _TEXT, path), "vision": _sizes(config, "vision", _VISION, path)}
    found, read = _weights(folder)
    problem = f"the weights in {folder} do not fit {CONFIG} beside them"
    found = Found({name: shape for name, shape in found.shapes.items() if not _is_places(name)}, {})
    _check_sizes(sizes, found, problem)
    build = _builder(kind, sizes, config.get("projection_dim"))
    try:
        with torch.device("meta"):
            shapes = {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}
    except Exception as error:  # transformers passes most values on unchecked, so that they may fail anywhere
        if isinstance(error, MemoryError | ImportError):
            raise
        raise ValueError(f"{problem}: no model has these sizes ({str(error).splitlines()[0][:200]})") from error
    check_shapes(found, shapes, problem)
    state = {name: tensor for name, tensor in read().items() if not _is_places(name)}
    return HuggingFaceClip(filled(build(), state, problem), kind, _preprocess_of(folder))


class FolderTokenizer:
    """A folder's own tokenizer as open_clip's: texts to ids (B, context_length), padded and cut."""

    def __init__(self, tokenizer: Any, context_length: int, vocab_size: int, name: str) -> None:
        self._tokenizer, self.context_length = tokenizer, context_length
        self._vocab_size, self._name = vocab_size, name

    def __call__(self, texts: list[str]) -> Tensor:
        """Tokenize texts: (B, context_length) int64. Raises ValueError where a word is none of the model's."""
        try:
            ids: Tensor = self._tokenizer(
                texts, padding="max_length", truncation=True, max_length=self.context_length, return_tensors="pt"
            )["input_ids"]
        except ValueError as error:
            raise ValueError(f"the tokenizer in {self._name} cannot pad texts: {error}") from error
        if int(ids.max()) >= self._vocab_size:
            raise ValueError(
                f"the tokenizer in {self._name} gives the id {int(ids.max())}, and the model embeds {self._vocab_size} "
                "words"
            )
        return ids


def tokenizer_of(folder: Path, model: HuggingFaceClip) -> FolderTokenizer:
    """Load the folder's tokenizer by transformers, from this machine alone and without code of the folder.

    Raises:
        ValueError: the folder holds none that transformers can load, or a file of it is too large.
    """
    transformers = transformers_package()
    if not any((folder / name).is_file() for name in _VOCABULARIES):  # transformers makes up a vocabulary of its own
        raise ValueError(f"{folder} holds no tokenizer: {', '.join(_VOCABULARIES)} are absent; copy one into it")
    for name in (*_VOCABULARIES, *_BESIDE):
        file = folder / name
        if file.is_file() and file.stat().st_size > MAX_TOKENIZER:
            raise ValueError(f"{file} has {file.stat().st_size:,} bytes, and at most {MAX_TOKENIZER:,} are read")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), config=model.clip.config, local_files_only=True, trust_remote_code=False
        )
    except MemoryError:
        raise
    except Exception as error:  # transformers and tokenizers raise many kinds
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder} holds no tokenizer that transformers can load: {reason}") from error
    return FolderTokenizer(tokenizer, model.context_length, model.vocab_size, str(folder))


def _json(path: Path) -> dict[str, Any]:
    return bounded_json.load_object(path.read_bytes(), str(path), max_bytes=MAX_JSON)


def _sizes(config: dict[str, Any], tower: str, known: tuple[str, ...], path: Path) -> dict[str, Any]:
    """Take the known settings of a tower; those of the older entry `..._config_dict` go first, as in transformers."""
    values: dict[str, Any] = {}
    for name in (f"{tower}_config", f"{tower}_config_dict"):
        given = config.get(name) or {}
        if not isinstance(given, dict):
            raise ValueError(f"{path}: {name!r} must be an object")
        values |= {key: value for key, value in given.items() if key in known and value is not None}
    return values


def _builder(kind: str, sizes: dict[str, dict[str, Any]], projection_dim: Any) -> Callable[[], nn.Module]:
    transformers = transformers_package()
    kinds = {
        "clip": ("CLIPConfig", "CLIPModel"),
        "siglip": ("SiglipConfig", "SiglipModel"),
    }
    config_class, model_class = (getattr(transformers, name) for name in kinds[kind])
    common = {} if projection_dim is None or kind == "siglip" else {"projection_dim": projection_dim}

    def build() -> nn.Module:
        config = config_class(text_config=dict(sizes["text"]), vision_config=dict(sizes["vision"]), **common)
        model: nn.Module = model_class(config)
        return model

    return build


def _check_sizes(sizes: dict[str, dict[str, Any]], found: Found, problem: str) -> None:
    """Raise ValueError where a size is far larger than any of the weights, before a model of it is described."""
    largest = max((size for shape in found.shapes.values() for size in shape), default=1)
    for tower, values in sizes.items():
        for name, value in values.items():
            if not isinstance(value, int) or isinstance(value, bool) or name.endswith("token_id"):
                continue
            most = {"num_hidden_layers": len(found.shapes), "max_position_embeddings": _MAX_CONTEXT}
            if not 0 < value <= most.get(name, 64 * largest):
                raise ValueError(f"{problem}: it asks for {name} {value:,} of the {tower} tower")


def _is_places(name: str) -> bool:
    """Whether an entry numbers places, as files of older releases hold beside the weights."""
    return name.endswith("embeddings.position_ids")


def _weights(folder: Path) -> tuple[Found, Callable[[], dict[str, Tensor]]]:
    """Find the weights of a folder: their shapes, and what reads them."""
    if (single := folder / _WEIGHTS).is_file():
        return Found.in_header(read_header(single)), lambda: unwrapped(read_safetensors(single), str(single))
    if (index := folder / _INDEX).is_file():
        shards = _shards(index)
        entries: dict[str, Any] = {}
        for shard in shards:
            tensors = read_header(shard).tensors
            if both := entries.keys() & tensors.keys():
                raise ValueError(f"{shard} holds {sorted(both)[0][:80]!r}, which another file of {index} holds too")
            entries |= tensors

        def joined() -> dict[str, Tensor]:
            return {name: tensor for shard in shards for name, tensor in read_safetensors(shard).items()}

        return Found.in_header(Header(entries, {})), joined
    if (pickled := folder / _PICKLED).is_file():
        state = read_state(pickled)
        return Found.in_state(state), lambda: state
    raise FileNotFoundError(f"{folder} holds {CONFIG} but neither {_WEIGHTS}, {_INDEX} nor {_PICKLED}")


def _shards(index: Path) -> list[Path]:
    """List the files that an index names, all in its own folder."""
    content = bounded_json.load_object(index.read_bytes(), str(index), max_bytes=32 * MAX_JSON)
    names = content.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index} lacks 'weight_map', the file of each tensor")
    files = sorted(set(names.values()))
    if not 0 < len(files) <= MAX_SHARDS:
        raise ValueError(f"{index} names {len(files):,} files, and 1 to {MAX_SHARDS} are read")
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name[:80]!r}, and a safetensors file beside it is needed")
    return [index.parent / name for name in files]


def _preprocess_of(folder: Path) -> dict[str, Any]:
    """Read the settings of the image processor; none where there is no file."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (path := folder / name).is_file():
            values = _json(path)
            inner = values.get("image_processor", values)
            return inner if isinstance(inner, dict) else values
    return {}


def _preprocessing(
    model: HuggingFaceClip, image_size: int, name: str
) -> tuple[tuple[float, ...], tuple[float, ...], str, bool]:
    """Mean, standard deviation, interpolation and `squash`; those of the type of model where none is stated."""
    values, clip = model.preprocess, model.kind == "clip"
    mean, std = (_CLIP_MEAN, _CLIP_STD) if clip else ((0.5,) * 3, (0.5,) * 3)
    size = values.get("size", {"shortest_edge": image_size} if clip else {"height": image_size, "width": image_size})
    sides = size if isinstance(size, dict) else {"shortest_edge": size}
    if not sides or any(
        side not in ("shortest_edge", "height", "width") or pixels != image_size for side, pixels in sides.items()
    ):
        raise ValueError(
            f"{name}: its images are resized to {bounded_json.shown(size)}, and {image_size} px, the model's own size, "
            "is needed"
        )
    resample = values.get("resample", 3)
    if resample not in (2, 3):
        raise ValueError(f"{name}: its images are resized by Pillow's method {resample}, and 2 or 3 is needed")
    squash = not values.get("do_center_crop", clip) and "height" in sides
    return (
        _three(values.get("image_mean", mean), f"{name}: image_mean"),
        _three(values.get("image_std", std), f"{name}: image_std"),
        "bilinear" if resample == 2 else "bicubic",
        squash,
    )


def _three(values: Any, name: str) -> tuple[float, ...]:
    numbers = isinstance(values, list | tuple) and len(values) == 3
    if not numbers or not all(type(each) in (int, float) and abs(each) < 1e3 for each in values):
        raise ValueError(f"{name} must be three numbers, got {bounded_json.shown(values)}")
    if name.endswith("std") and min(values) <= 0:
        raise ValueError(f"{name} must be above 0, got {bounded_json.shown(values)}")
    return tuple(float(each) for each in values)
