"""Open trained models: `oner_fast.load(run or file)`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oner_fast import bounded_json, format_version
from oner_fast.data.batch import TokenizedText
from oner_fast.data.given_images import GivenImages
from oner_fast.data.tokenizer import Tokenizer
from oner_fast.loaded_model import LoadedModel, check_image_size, finished
from oner_fast.loaded_towers import LoadedTowers, clip_towers, student_towers
from oner_fast.models import hugging_face_clip, lit, open_clip_files, pretrained_encoders
from oner_fast.models.clip import CONFIG, build_clip, check_clip, clip_config_from_dict, clip_tokenizer
from oner_fast.models.file_kinds import file_kind
from oner_fast.models.files import FORMAT as ONER_FORMAT
from oner_fast.models.files import (
    SCALE,
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
from oner_fast.models.safetensors_header import read_header
from oner_fast.models.state_files import WRAPPERS, check_size, read_pytorch, unwrapped
from oner_fast.models.teacher import Teacher, is_named, lit_teacher, load_teacher
from oner_fast.models.teacher_image_towers import image_tower_of
from oner_fast.models.uta import UTA
from oner_fast.preprocess import Preprocess
from oner_fast.text_ids import GivenTexts, TextTokenizer, packed, padded, text_list
from oner_fast.train.engine import checkpoint

CLIP_FORMAT = "oner_fast.clip"


class Loaded(LoadedModel):
    """OneR's tower with its preprocessing and tokenizer.

    Attributes:
        model: the tower.
        tokenizer: its WordPiece tokenizer, which packs ids without padding; `tokenize` gives a tensor of them.
    """

    model: OneR

    def __init__(self, model: OneR, tokenizer: Tokenizer, log_logit_scale: float = 0.0) -> None:
        super().__init__(model)
        self.tokenizer = tokenizer
        self._scale = log_logit_scale

    @property
    def config(self) -> OneRConfig:
        """Configuration of the tower."""
        return self.model.config

    @property
    def preprocess(self) -> Preprocess:
        """Conversion of an image of any form and size to uint8 (3, S, S), called as `preprocess(image)`."""
        return Preprocess(self.config.image_size)

    @property
    def tokenize(self) -> TextTokenizer:
        """Tokenizer whose call gives ids (B, context_length) for `encode_text`, padded at their ends."""
        tokenizer = self.tokenizer

        def encode(texts: list[str], length: int) -> Tensor:
            return padded(tokenizer(texts, length), length, tokenizer.pad_id)

        return TextTokenizer(encode, self.config.max_text_tokens, least=1)

    @torch.no_grad()
    def encode_image_text(
        self, images: GivenImages, texts: GivenTexts, image_size: int | None = None, *, normalize: bool = True
    ) -> Tensor:
        """Embed pairs by F(I,T): (B, E). Raises ValueError where the numbers of images and texts differ."""
        pixels, (ids, cu_seqlens) = self._pixels(images, image_size), self._ids(texts)
        if pixels.shape[0] != len(cu_seqlens) - 1:
            raise ValueError(
                f"each image must have one text, got {pixels.shape[0]} images and {len(cu_seqlens) - 1} texts"
            )
        return finished(self.model.encode_image_text(pixels, ids, cu_seqlens), normalize)

    def _check_image_size(self, image_size: int | None) -> None:
        check_image_size(image_size, self.config.patch_size)

    def _embed_images(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    def _embed_texts(self, texts: GivenTexts) -> Tensor:
        return self.model.encode_text(*self._ids(texts))

    def _embed_patches(self, pixels: Tensor) -> Tensor:
        return self.model.encode_patches(pixels)

    def _log_logit_scale(self) -> float:
        return self._scale

    def _ids(self, texts: GivenTexts) -> tuple[Tensor, Tensor]:
        """Return the packed ids (T,) and cu_seqlens (B + 1,) of texts in any form, on the model's device."""
        most = self.config.max_text_tokens
        if isinstance(texts, Tensor):
            ids, cu_seqlens = packed(texts, self.tokenizer.pad_id, most, self.config.vocab_size)
        else:
            text = texts if isinstance(texts, TokenizedText) else self.tokenizer(text_list(texts), most)
            ids, cu_seqlens = text.input_ids, text.cu_seqlens
        return ids.to(self.device), cu_seqlens.to(self.device)


def load(
    source: Path | str, device: torch.device | str = "cpu", *, text_tower: str | Path | None = None
) -> Loaded | LoadedTowers:
    """Load a trained model: OneR's tower, UTA's student with its teacher's text tower, or a CLIP of anyone.

    Args:
        source: a run folder (its `model.safetensors`, or its newest checkpoint while it trains), a `model.safetensors`,
            or a checkpoint within a run folder; a folder of open_clip (`open_clip_config.json` and weights), of
            transformers (a CLIP or SigLIP: `config.json` and safetensors) or of `oner-fast train lit`; or a name:
            `FILE:MODEL`, a checkpoint of open_clip's MODEL; `MODEL:TAG`, pretrained weights of open_clip; or
            `hf-hub:OWNER/NAME`, a CLIP of open_clip on the Hugging Face hub.
        device: where the model computes.
        text_tower: for UTA's student, the CLIP that embeds texts, named as in `oner_fast.models.teacher.load_teacher`;
            the one that the student was aligned to by default. It is loaded at the first text.

    A file is recognised by its content, so that its suffix does not matter. Its weights are compared with its
    configuration before anything is built, no code in it runs, and nothing is fetched that it names: only `MODEL:TAG`
    and `hf-hub:` as `source` or `text_tower` are downloaded.

    Raises:
        FileNotFoundError: there is no such run or file, or the run has no model and no checkpoint yet.
        ValueError: the file is not a model of this library, is damaged, or its weights do not fit its configuration; or
            `text_tower` was given for a model that has a text tower.
        ModuleNotFoundError: open_clip, transformers or an encoder's package is needed and not installed.
        OSError: a file cannot be read.
    """
    loaded = _loaded(source, device)
    if text_tower is None:
        return loaded
    if not isinstance(loaded, LoadedTowers) or isinstance(loaded.model, Teacher):
        raise ValueError(f"{source} has its own text tower; only UTA's student takes another")
    loaded.text_source, loaded.may_fetch = str(text_tower), True
    return loaded


def _loaded(source: Path | str, device: torch.device | str) -> Loaded | LoadedTowers:
    path = Path(source)
    if not path.exists():
        if isinstance(source, str) and is_named(source):
            return clip_towers(load_teacher(source, device=device, tokens=False), Path())
        raise FileNotFoundError(
            f"there is no run folder or model file {path}; a CLIP of elsewhere is named FILE:MODEL, MODEL:TAG or "
            "hf-hub:OWNER/NAME"
        )
    path = _file_of(path) if path.is_dir() else path
    if path.name in (CONFIG, hugging_face_clip.CONFIG):
        return clip_towers(load_teacher(path.parent, device=device, tokens=False), path.parent)
    if path.name == lit.CONFIG:
        return _lit(lit.load_lit(path.parent), path.parent, device)
    if file_kind(path) != "safetensors":
        return _from_checkpoint(path, device)
    about = read_metadata(path)
    if about.get("format") == UTA_FORMAT:
        return student_towers(load_uta(path), about.get("teacher", ""), path.parent, device, _scale(about, path))
    if about.get("format") is None:
        open_clip_files.refuse_without_model(Found.in_header(read_header(path)), path)
    return _oner(*load_model(path), path, device, _scale(about, path) or 0.0)


def _file_of(folder: Path) -> Path:
    """Path of the trained model in a folder, of the configuration of another library, or of the newest checkpoint."""
    model = folder / "model.safetensors"
    if model.is_file() and _is_ours(model):
        return model
    for name in (CONFIG, lit.CONFIG):
        if (folder / name).is_file():
            return folder / name
    if hugging_face_clip.is_folder(folder):
        return folder / hugging_face_clip.CONFIG
    if model.is_file():
        return model
    if (found := checkpoint.latest(folder / "checkpoints")) is None:
        raise FileNotFoundError(
            f"{folder} holds neither model.safetensors nor a checkpoint; train it first, or give a CLIP's folder, with "
            f"{CONFIG} or the {hugging_face_clip.CONFIG} of transformers"
        )
    return found


def _is_ours(model: Path) -> bool:
    """Whether a file names a format of this library; other libraries call theirs model.safetensors too."""
    try:
        return read_metadata(model).get("format", "").startswith("oner_fast.")
    except ValueError:
        return True  # its own error is raised where it is read


def _scale(about: dict[str, str], path: Path) -> float | None:
    """Read the logarithm of the scale from a file's metadata; None where it states none."""
    if (text := about.get(SCALE)) is None:
        return None
    try:
        scale = float(text[:40])
    except ValueError:
        scale = math.nan
    if not abs(scale) < 20:
        raise ValueError(f"{path}: {SCALE} must be a number between -20 and 20, got {bounded_json.shown(text)}")
    return scale


def _scale_of(state: dict[str, Tensor], name: str) -> float | None:
    """Read the logarithm of the scale from the weights of a checkpoint."""
    tensor = state.get(name)
    return float(tensor) if tensor is not None and tensor.numel() == 1 else None


def _oner(tower: OneR, tokenizer_json: str, path: Path, device: torch.device | str, log_logit_scale: float) -> Loaded:
    tokenizer = Tokenizer.from_json(tokenizer_json, f"the tokenizer in {path}")
    if tokenizer.vocab_size > tower.config.vocab_size:
        raise ValueError(
            f"the tokenizer in {path} has ids up to {tokenizer.vocab_size - 1}, and the model embeds "
            f"{tower.config.vocab_size} words"
        )
    return Loaded(tower.to(device), tokenizer, log_logit_scale)


def _lit(parts: tuple[lit.LiT, Encoders, lit.LiTConfig], run: Path, device: torch.device | str) -> LoadedTowers:
    """Wrap a LiT, whose images are first reduced to the size that its heads were trained on."""
    teacher = lit_teacher(str(run), *parts, device=device)
    return LoadedTowers(teacher, parts[2].image_size, teacher.name, run)


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
        return clip_towers(teacher, run)
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
        scale = _scale_of(student, "scale")
        student = part_of(student, "student.") or student
        check_uta(Found.in_state(student), uta_config, problem)
        named = state.get("teacher", "")
        return student_towers(
            filled(UTA(uta_config), student, problem), named if isinstance(named, str) else "", run, device, scale
        )
    config = config_from_dict(values, name)
    scale = _scale_of(student, SCALE) or 0.0
    student = tower_of(student)
    check_oner(Found.in_state(student), config, problem)
    return _oner(filled(OneR(config), student, problem), _text(state, "tokenizer", path), path, device, scale)


def _checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a run; ValueError where it is another PyTorch file, which holds no configuration."""
    state = read_pytorch(path)
    if not {"format", "step"} <= state.keys():
        tensors = unwrapped(state, str(path)) if _holds_weights(state) else {}
        open_clip_files.refuse_without_model(Found.in_state(tensors), path)
        raise ValueError(
            f"{path} is not a checkpoint of this library: it holds {_listed(state)}; weights alone carry no "
            "configuration: oner_fast.models.files.load_uta(path, config) loads a student's, and "
            "oner_fast.load('FILE:MODEL') a CLIP's"
        )
    format_version.check_format_version(path, state.pop("format"), format_version.CHECKPOINT)
    if "model_config" not in state or not isinstance(state.get("student"), dict):
        raise ValueError(f"{path} is not a checkpoint of a tower: it holds {_listed(state)}")
    return state


def _holds_weights(content: dict[Any, Any]) -> bool:
    """Whether a PyTorch file holds tensors by name, under a usual key or directly."""
    held = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), content)
    return any(isinstance(each, Tensor) for each in held.values())


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
