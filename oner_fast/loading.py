"""Open trained models: `oner_fast.load(run or file)`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oner_fast import bounded_json, format_version
from oner_fast.data.batch import TokenizedText
from oner_fast.data.given_images import GivenImage, GivenImages, as_rgb
from oner_fast.data.images import eval_transform
from oner_fast.data.tokenizer import Tokenizer
from oner_fast.loaded_towers import LoadedTowers, check_image_size, clip_towers, stacked, student_towers, text_list
from oner_fast.models import lit, pretrained_encoders
from oner_fast.models.clip import CONFIG, build_clip, check_clip, clip_config_from_dict, clip_tokenizer
from oner_fast.models.file_kinds import file_kind
from oner_fast.models.files import FORMAT as ONER_FORMAT
from oner_fast.models.files import (
    UTA_FORMAT,
    check_oner,
    check_uta,
    config_from_dict,
    load_model,
    load_uta,
    read_metadata,
    uta_config_from_dict,
)
from oner_fast.models.fitting import Found, filled
from oner_fast.models.oner import OneR, OneRConfig
from oner_fast.models.pretrained_encoders import Encoders
from oner_fast.models.state_files import check_size, read_pytorch, unwrapped
from oner_fast.models.teacher import Teacher, lit_teacher, load_teacher
from oner_fast.models.teacher_image_towers import image_tower_of
from oner_fast.models.uta import UTA
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

    def preprocess(self, image: GivenImage, name: str = "image", image_size: int | None = None) -> Tensor:
        """Convert an image of any size to uint8 (3, S, S): upright, shorter side to S, centre square.

        S is the configuration's `image_size`, or the one given here. Takes, and raises as,
        `oner_fast.data.given_images.as_rgb`; `name` is the image's name in an error.
        """
        return eval_transform(image_size or self.config.image_size)(as_rgb(image, name))

    @torch.inference_mode()
    def encode_image(self, images: GivenImages, image_size: int | None = None) -> Tensor:
        """Embed images by F(I): (B, E).

        Args:
            images: one image or a list of images, each a path, the bytes of an image file, a PIL image or a uint8 array
                (H, W, 3); an array (B, H, W, 3); or a tensor of pixels ready for the model, uint8 (B, 3, S, S), where S
                may be any multiple of the patch size.
            image_size: side in pixels that images are brought to, a multiple of the patch size; the size of the
                training by default. Positions are resampled for another size.

        Raises:
            TypeError: an image has another form; the message says which.
            ValueError: there is no image, one cannot be decoded or is over the budget of a sample, or the patches do
                not divide `image_size`.
            OSError: a file cannot be read.
        """
        return _normalise(self.model.encode_image(self._images(images, image_size)))

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embed captions by F(T): (B, E)."""
        text = self._texts(texts)
        return _normalise(self.model.encode_text(text.input_ids, text.cu_seqlens))

    @torch.inference_mode()
    def encode_image_text(self, images: GivenImages, texts: Sequence[str], image_size: int | None = None) -> Tensor:
        """Embed pairs by F(I,T): (B, E). Raises ValueError where the numbers of images and texts differ."""
        pixels, text = self._images(images, image_size), self._texts(texts)
        if pixels.shape[0] != len(text):
            raise ValueError(f"each image must have one text, got {pixels.shape[0]} images and {len(text)} texts")
        return _normalise(self.model.encode_image_text(pixels, text.input_ids, text.cu_seqlens))

    @torch.inference_mode()
    def encode_patches(self, images: GivenImages, image_size: int | None = None) -> Tensor:
        """Project each patch output of F(I): (B, N, E), the grid row by row."""
        return _normalise(self.model.encode_patches(self._images(images, image_size)))

    def _images(self, images: GivenImages, image_size: int | None) -> Tensor:
        check_image_size(image_size, self.config.patch_size)
        return stacked(images, self.preprocess, image_size).to(self._device)

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

    A file is recognised by its content, so that its suffix does not matter. Its weights are compared with its
    configuration before anything is built, no code in it runs, and nothing is fetched that it names: only `text_tower`
    may name a model that is downloaded.

    Raises:
        FileNotFoundError: there is no such run or file, or the run has no model and no checkpoint yet.
        ValueError: the file is not a model of this library, is damaged, or its weights do not fit its configuration; or
            `text_tower` was given for a model that has a text tower.
        OSError: a file cannot be read.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"there is no run folder or model file {path}")
    path = _file_of(path) if path.is_dir() else path
    if path.name == CONFIG:
        loaded: Loaded | LoadedTowers = clip_towers(load_teacher(path.parent, device=device), path.parent, device)
    elif path.name == lit.CONFIG:
        loaded = _lit(lit.load_lit(path.parent), path.parent, device)
    elif file_kind(path) != "safetensors":
        loaded = _from_checkpoint(path, device)
    elif (about := read_metadata(path)).get("format") == UTA_FORMAT:
        loaded = student_towers(load_uta(path), about.get("teacher", ""), path.parent, device)
    else:
        loaded = _oner(*load_model(path), path, device)
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


def _oner(tower: OneR, tokenizer_json: str, path: Path, device: torch.device | str) -> Loaded:
    tokenizer = Tokenizer.from_json(tokenizer_json, f"the tokenizer in {path}")
    if tokenizer.vocab_size > tower.config.vocab_size:
        raise ValueError(
            f"the tokenizer in {path} has ids up to {tokenizer.vocab_size - 1}, and the model embeds "
            f"{tower.config.vocab_size} words"
        )
    return Loaded(tower.to(device).eval().requires_grad_(False), tokenizer)


def _lit(parts: tuple[lit.LiT, Encoders, lit.LiTConfig], run: Path, device: torch.device | str) -> LoadedTowers:
    """Wrap a LiT, whose images are first reduced to the size that its heads were trained on."""
    teacher = lit_teacher(str(run), *parts, device=device)
    return replace(clip_towers(teacher, run, device), image_size=parts[2].image_size)


def _from_checkpoint(path: Path, device: torch.device | str) -> Loaded | LoadedTowers:
    """Load the model of an unfinished run; its checkpoint names the kind of model under "kind"."""
    state = _checkpoint(path)
    kind = state.get("kind", ONER_FORMAT)
    if kind not in (ONER_FORMAT, UTA_FORMAT, CLIP_FORMAT, lit.FORMAT):
        raise ValueError(f"{path} holds a model of an unknown kind, {str(kind)[:60]!r}")
    name = f"the configuration in {path}"
    values = bounded_json.load_object(_text(state, "model_config", path), name)
    student = unwrapped(state["student"], str(path))
    check_size(student, path)
    problem = f"{path}: the weights do not fit the configuration beside them"
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    if kind == CLIP_FORMAT:
        clip_config = clip_config_from_dict(values, name)
        student = part_of(student, "clip.")
        check_clip(Found.in_state(student), clip_config, problem)
        clip = filled(build_clip(clip_config), student, problem)
        tower = image_tower_of(clip, str(run))
        teacher = Teacher(tower, name=str(run), model=clip, tokenize=lambda: clip_tokenizer(clip_config), device=device)
        return clip_towers(teacher, run, device)
    if kind == lit.FORMAT:
        lit_config = lit.lit_config_from_dict(values, name)
        encoders = pretrained_encoders.packaged_encoders()
        lit.check_origins(bounded_json.loads(_text(state, "encoders", path), str(path)), encoders, str(path))
        student = part_of(student, "heads.")
        lit.check_lit(Found.in_state(student), lit_config, encoders, problem)
        heads = filled(lit.build_heads(lit_config, encoders), student, problem)
        return _lit((lit.LiT(encoders, heads).eval(), encoders, lit_config), run, device)
    if kind == UTA_FORMAT:
        uta_config = uta_config_from_dict(values, name)
        student = part_of(student, "student.") or student
        check_uta(Found.in_state(student), uta_config, problem)
        named = state.get("teacher", "")
        return student_towers(
            filled(UTA(uta_config), student, problem), named if isinstance(named, str) else "", run, device
        )
    config = config_from_dict(values, name)
    student = tower_of(student)
    check_oner(Found.in_state(student), config, problem)
    return _oner(filled(OneR(config), student, problem), _text(state, "tokenizer", path), path, device)


def _checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a run; ValueError where it is another PyTorch file, which holds no configuration."""
    state = read_pytorch(path)
    if not {"format", "step"} <= state.keys():
        raise ValueError(
            f"{path} is not a checkpoint of this library: it holds {_listed(state)}; weights alone carry no "
            "configuration: oner_fast.models.files.load_uta(path, config) loads a student's, and "
            "oner_fast.models.teacher.load_teacher('FILE:MODEL') a CLIP's"
        )
    format_version.check_format_version(path, state.pop("format"), format_version.CHECKPOINT)
    if "model_config" not in state or not isinstance(state.get("student"), dict):
        raise ValueError(f"{path} is not a checkpoint of a tower: it holds {_listed(state)}")
    return state


def _listed(content: dict[Any, Any]) -> str:
    names = sorted(key[:60] for key in content if isinstance(key, str))
    return ", ".join(names[:8]) + (f" and {len(names) - 8:,} more" if len(names) > 8 else "") or "nothing by name"


def _text(state: dict[str, Any], name: str, path: Path) -> str:
    if not isinstance(text := state.get(name), str):
        raise ValueError(f"{path}: the text {name!r} is missing; a checkpoint of this library holds it")
    return text


def tower_of(student: dict[str, Tensor]) -> dict[str, Tensor]:
    """Entries of a student's state that belong to the tower."""
    return part_of(student, "tower.")


def part_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Entries of `state` under a prefix, without the prefix."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _normalise(embeddings: Tensor) -> Tensor:
    return F.normalize(embeddings.float(), dim=-1)
