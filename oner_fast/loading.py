"""Open trained models: `oner_fast.load(run or file)`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oner_fast import bounded_json
from oner_fast.data.batch import TokenizedText
from oner_fast.data.given_images import GivenImage, GivenImages, as_rgb
from oner_fast.data.images import eval_transform
from oner_fast.data.tokenizer import Tokenizer
from oner_fast.loaded_towers import LoadedTowers, clip_towers, stacked, student_towers, text_list
from oner_fast.models import lit, pretrained_encoders, weights
from oner_fast.models.clip import CONFIG, CLIPConfig, clip_tokenizer, fill_clip
from oner_fast.models.files import FORMAT as ONER_FORMAT
from oner_fast.models.files import UTA_FORMAT, build_model, build_uta, load_model, load_uta, read_metadata
from oner_fast.models.oner import OneR, OneRConfig
from oner_fast.models.pretrained_encoders import Encoders
from oner_fast.models.teacher import Teacher, lit_teacher, load_teacher
from oner_fast.models.teacher_image_towers import image_tower_of
from oner_fast.train.engine import checkpoint

CLIP_FORMAT = "oner_fast.clip"


@dataclass(frozen=True)
class Loaded:
    """OneR's tower with its preprocessing and tokenizer. Embeddings are (B, E) float32, L2-normalised."""

    model: OneR
    tokenizer: Tokenizer

    @property
    def config(self) -> OneRConfig:
        """Configuration of the tower."""
        return self.model.config

    def preprocess(self, image: GivenImage, name: str = "image") -> Tensor:
        """Convert an image of any size to uint8 (3, S, S): upright, shorter side to S, centre square.

        Takes, and raises as, `oner_fast.data.given_images.as_rgb`; `name` is the image's name in an error.
        """
        return eval_transform(self.config.image_size)(as_rgb(image, name))

    @torch.inference_mode()
    def encode_image(self, images: GivenImages) -> Tensor:
        """Embed images by F(I): (B, E).

        Args:
            images: one image or a list of images, each a path, the bytes of an image file, a PIL image or a uint8 array
                (H, W, 3); an array (B, H, W, 3); or a tensor of pixels ready for the model, uint8 (B, 3, S, S).

        Raises:
            TypeError: an image has another form; the message says which.
            ValueError: there is no image, or one that cannot be decoded or is over the budget of a sample.
            OSError: a file cannot be read.
        """
        return _normalise(self.model.encode_image(self._images(images)))

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embed captions by F(T): (B, E).

        Raises:
            TypeError: `texts` is one string, or holds something that is no string.
            ValueError: there is no text, or one that is not valid Unicode.
        """
        text = self._texts(texts)
        return _normalise(self.model.encode_text(text.input_ids, text.cu_seqlens))

    @torch.inference_mode()
    def encode_image_text(self, images: GivenImages, texts: Sequence[str]) -> Tensor:
        """Embed pairs by F(I,T): (B, E). Raises ValueError where the numbers of images and texts differ."""
        pixels, text = self._images(images), self._texts(texts)
        if pixels.shape[0] != len(text):
            raise ValueError(f"each image must have one text, got {pixels.shape[0]} images and {len(text)} texts")
        return _normalise(self.model.encode_image_text(pixels, text.input_ids, text.cu_seqlens))

    @torch.inference_mode()
    def encode_patches(self, images: GivenImages) -> Tensor:
        """Project each patch output of F(I): (B, N, E), the grid row by row."""
        return _normalise(self.model.encode_patches(self._images(images)))

    def _images(self, images: GivenImages) -> Tensor:
        return stacked(images, self.preprocess).to(self._device)

    def _texts(self, texts: Sequence[str]) -> TokenizedText:
        return self.tokenizer(text_list(texts), self.config.max_text_tokens).to(self._device)

    @property
    def _device(self) -> torch.device:
        return self.model.cls_token.device


def load(
    source: Path | str, device: torch.device | str = "cpu", *, text_tower: str | Path | None = None
) -> Loaded | LoadedTowers:
    """Load a trained model: OneR's tower, UTA's student with its teacher's text tower, a CLIP, or a LiT.

    Args:
        source: a run folder (its `model.safetensors`, or its newest checkpoint while it trains), a `model.safetensors`,
            a checkpoint within a run folder, or a folder of open_clip (`open_clip_config.json` and weights) or of
            `oner-fast train lit` (`lit_config.json` and heads).
        device: where the model computes.
        text_tower: for UTA's student, the CLIP that embeds texts, named as in `oner_fast.models.teacher.load_teacher`;
            the one that the student was aligned to by default. It is loaded at the first text.

    Raises:
        FileNotFoundError: there is no such run or file, or the run has no model and no checkpoint yet.
        ValueError: the file is not a model of this library, or `text_tower` was given for a model that has a text
            tower.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"there is no run folder or model file {path}")
    path = _file_of(path) if path.is_dir() else path
    if path.name == CONFIG:
        loaded: Loaded | LoadedTowers = clip_towers(load_teacher(path.parent, device=device), path.parent, device)
    elif path.name == lit.CONFIG:
        loaded = _lit(lit.load_lit(path.parent), path.parent, device)
    elif weights.is_pytorch(path):
        loaded = _from_checkpoint(path, device)
    elif (about := read_metadata(path)).get("format") == UTA_FORMAT:
        loaded = student_towers(load_uta(path), about.get("teacher", ""), path.parent, device)
    else:
        loaded = _oner(str(path), *load_model(path), device)
    if text_tower is None:
        return loaded
    if not isinstance(loaded, LoadedTowers) or isinstance(loaded.model, Teacher):
        raise ValueError(f"{source} has its own text tower; only UTA's student takes another")
    return replace(loaded, text_source=str(text_tower), may_fetch=True)


def _file_of(folder: Path) -> Path:
    """Path of the trained model in a folder, or else of its newest checkpoint."""
    for name in ("model.safetensors", CONFIG, lit.CONFIG):
        if (folder / name).is_file():
            return folder / name
    if (found := checkpoint.latest(folder / "checkpoints")) is None:
        raise FileNotFoundError(f"{folder} holds neither model.safetensors nor a checkpoint; train it first")
    return found


def _oner(name: str, tower: OneR, tokenizer_json: str, device: torch.device | str) -> Loaded:
    try:
        bounded_json.load_object(tokenizer_json, f"the tokenizer of {name}", max_bytes=weights.MAX_HEADER)
        tokenizer = Tokenizer.from_json(tokenizer_json)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(f"the tokenizer of {name} cannot be read: {str(error).splitlines()[:1]}") from error
    if tokenizer.vocab_size > tower.config.vocab_size:
        raise ValueError(
            f"{name}: its tokenizer has {tokenizer.vocab_size:,} pieces, and its model embeds "
            f"{tower.config.vocab_size:,}"
        )
    return Loaded(tower.to(device).eval().requires_grad_(False), tokenizer)


def _lit(parts: tuple[lit.LiT, Encoders, lit.LiTConfig], run: Path, device: torch.device | str) -> LoadedTowers:
    """Wrap a LiT, whose images are first reduced to the size that its heads were trained on."""
    teacher = lit_teacher(str(run), *parts, device=device)
    return replace(clip_towers(teacher, run, device), image_size=parts[2].image_size)


def _from_checkpoint(path: Path, device: torch.device | str) -> Loaded | LoadedTowers:
    """Load the model of an unfinished run; its checkpoint names the kind of model under "kind"."""
    weights.check_archive(path)
    state = checkpoint.load(path) if _is_ours(path) else _foreign(path)
    name, kind, student = str(path), state.get("kind", ONER_FORMAT), state.get("student", {})
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    if "model_config" not in state or not isinstance(student, dict):
        raise ValueError(f"{path} is not a checkpoint of a tower: it holds {', '.join(sorted(map(str, state))[:8])}")
    if kind == CLIP_FORMAT:
        values = weights.check_settings(_json(state, "model_config", name), name)
        try:
            config = weights.config_of(CLIPConfig, values)
        except ValueError as error:
            raise ValueError(f"{path}: its configuration does not describe a CLIP ({error})") from error
        return _clip(fill_clip(config, part_of(student, "clip."), name), config, run, device)
    if kind == lit.FORMAT:
        lit_config = lit.lit_config_from_dict(_json(state, "model_config", name), name)
        encoders = pretrained_encoders.packaged_encoders()
        lit.check_origins(_json(state, "encoders", name), encoders, name)
        heads = lit.fill_heads(lit_config, encoders, part_of(student, "heads."), name)
        return _lit((lit.LiT(encoders, heads).eval(), encoders, lit_config), run, device)
    if kind == UTA_FORMAT:
        uta = build_uta(_entry(state, "model_config", name), part_of(student, "student.") or student, name)
        teacher = _entry(state, "teacher", name) if "teacher" in state else ""
        return student_towers(uta, teacher, run, device)
    if kind != ONER_FORMAT:
        raise ValueError(f"{path} holds a model of the unknown kind {kind!r}; update oner_fast")
    tower = build_model(_entry(state, "model_config", name), tower_of(student), name)
    return _oner(name, tower, _entry(state, "tokenizer", name), device)


def _clip(model: torch.nn.Module, config: CLIPConfig, run: Path, device: torch.device | str) -> LoadedTowers:
    tower = image_tower_of(model, str(run))
    teacher = Teacher(tower, name=str(run), model=model, tokenize=lambda: clip_tokenizer(config), device=device)
    return clip_towers(teacher, run, device)


def _is_ours(path: Path) -> bool:
    """Tell whether a PyTorch file is a checkpoint of this library, by its name or its place."""
    return checkpoint.is_name(path.name) or path.suffix == ".pt"


def _foreign(path: Path) -> dict[str, Any]:
    """Read a PyTorch file of another name: our checkpoint, or else weights that come without a configuration."""
    state, _ = weights.read_weights(path)
    if "model_config" in state:
        return state
    count = len(weights.state_dict_of(state, str(path)))
    raise ValueError(
        f"{path} holds {count:,} tensors and no configuration of this library, so that the sizes of the model are not "
        "known; load the weights of a student with oner_fast.models.files.load_uta(path, config)"
    )


def _json(state: dict[str, Any], entry: str, name: str) -> Any:
    return bounded_json.loads(_entry(state, entry, name), name, max_bytes=1 << 20)


def _entry(state: dict[str, Any], entry: str, name: str) -> str:
    if not isinstance(found := state.get(entry), str):
        raise ValueError(f"{name} is not whole: it lacks the text {entry!r}")
    return found


def tower_of(student: dict[str, Tensor]) -> dict[str, Tensor]:
    """Entries of a student's state that belong to the tower."""
    return part_of(student, "tower.")


def part_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Entries of `state` under a prefix, without the prefix."""
    named = (
        (name, tensor) for name, tensor in state.items() if isinstance(name, str)
    )  # a foreign file may hold others
    return {name.removeprefix(prefix): tensor for name, tensor in named if name.startswith(prefix)}


def _normalise(embeddings: Tensor) -> Tensor:
    return F.normalize(embeddings.float(), dim=-1)
