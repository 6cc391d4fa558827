"""A frozen CLIP as UTA's teacher (Liu et al., TMLR 2024, arXiv 2405.19009).

It gives all of its image tokens in the joint space, and its text tower for zero-shot.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oner_fast.models import hugging_face_clip, lit, open_clip_files
from oner_fast.models.optional_packages import optional_package
from oner_fast.models.pretrained_encoders import MAX_TOKENS, Encoders
from oner_fast.models.teacher_image_towers import OpenClipPooled, TeacherImageTower, TimmViT, image_tower_of
from oner_fast.text_ids import TextTokenizer, check_ids

DTYPES = (torch.float32, torch.bfloat16)
TEXTS = 256  # number of texts that pass the text tower at once
CONFIG = "open_clip_config.json"

_FILE = re.compile(r"(?P<file>.+\.(?:safetensors|pt|pth|bin|ckpt|tar)):(?P<model>.+)")
_ANY_FILE = re.compile(r"(?P<file>.+?):(?P<model>(?:timm:)?[^:]+)")

Tokenize = Callable[[list[str]], Tensor]


class Teacher(nn.Module):
    """A frozen CLIP that gives targets: always in evaluation mode, computed without a graph.

    Its outputs are ordinary tensors, which a loss may save for its backward pass.

    Attributes:
        name: its source.
        embed_dim: size of an embedding.
        grid: number of cells along a side.
        image_size: pixels a side of the tower's input.
        interpolation, squash: how images are brought to that size, see `TeacherImageTower`.
        logit_scale: 1 / temperature that the CLIP was trained to (1.0 for an image tower alone).
        logit_bias: number added to the scaled cosines (SigLIP), or None.
        has_text: whether there is a text tower.
    """

    def __init__(
        self,
        tower: TeacherImageTower,
        *,
        name: str,
        model: nn.Module | None = None,
        tokenize: Callable[[], Tokenize] | None = None,
        grid: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Wrap `tower`.

        `model` is the whole CLIP where there is a text tower; `tokenize` makes its tokenizer on first use.
        """
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
        if grid is not None and grid < 1:
            raise ValueError(f"grid must be at least 1 cell a side, got {grid}")
        self.name, self.dtype, self._tower, self._make_tokenizer = name, dtype, tower, tokenize
        self.model = tower.module if model is None else model
        self._text: Any = model
        scale = getattr(model, "logit_scale", None)
        self.logit_scale = 1.0 if scale is None else float(scale.detach().float().exp())
        bias = getattr(model, "logit_bias", None)
        self.logit_bias = None if bias is None else float(bias.detach().float())
        self.has_text = model is not None and tokenize is not None
        if grid is not None and grid * tower.patch_size != tower.image_size:
            tower.resize(grid * tower.patch_size)
        self.to(device=device, dtype=dtype).requires_grad_(False).eval()
        self.image_size, self.interpolation, self.squash = tower.image_size, tower.interpolation, tower.squash
        self.grid = tower.image_size // tower.patch_size
        self.embed_dim = self._check()

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode, also where the module that holds the teacher is set to training."""
        return super().train(False)

    def tokens(self, images: Tensor) -> Tensor:
        """Embed [CLS] and each patch token, after the final norm and the projection.

        Token 0 is `encode_image`'s embedding.

        Args:
            images: (B, 3, S, S) uint8, or floats in [0, 1], of any size S; they are resized to `image_size`.

        Returns:
            (B, 1 + grid * grid, embed_dim) in the teacher's dtype, the grid row by row, not normalised.
        """
        pixels = self._pixels(images)
        with torch.inference_mode():
            hidden = self._tower.hidden(pixels)
        # Outside of inference mode the last product makes an ordinary tensor without a copy.
        with torch.no_grad():
            return _ordinary(self._tower.project(hidden))

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed (B, 3, S, S) uint8, or floats in [0, 1], as the CLIP does: (B, embed_dim), not normalised."""
        with torch.inference_mode():
            embeddings = self._tower.pooled(self._pixels(images))
        return _ordinary(embeddings)

    def encode_text(self, texts: Sequence[str] | Tensor) -> Tensor:
        """Embed texts, or their ids (B, L) from the tokenizer: (B, embed_dim) in the teacher's dtype, not normalised.

        Raises:
            ValueError: the teacher is an image tower alone, or the ids are none of its tokenizer.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a list of strings, got one string")
        if self._text is None or self._make_tokenizer is None:
            raise ValueError(f"{self.name} is an image tower without a text tower; name a whole CLIP to encode texts")
        device = next(self.model.parameters()).device
        ids = self._checked(texts) if isinstance(texts, Tensor) else None
        parts = []
        with torch.inference_mode():
            for start in range(0, len(texts), TEXTS):
                some = slice(start, start + TEXTS)
                tokens = self.tokenizer(list(texts[some])) if ids is None else ids[some]
                parts.append(self._text.encode_text(tokens.to(device)))
        return _ordinary(torch.cat(parts)) if parts else torch.empty((0, self.embed_dim), device=device)

    @cached_property
    def tokenizer(self) -> Tokenize:
        """Tokenizer of the text tower: list of strings -> (B, context_length) int64."""
        if self._make_tokenizer is None:
            raise ValueError(f"{self.name} is an image tower without a text tower, so it has no tokenizer")
        return self._make_tokenizer()

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """Tokenizer that checks its texts, and knows its `context_length`."""
        tokenizer = self.tokenizer
        length = self._context_length()
        return TextTokenizer(lambda texts, _: tokenizer(texts), length, least=length)

    def _context_length(self) -> int:
        return getattr(self.tokenizer, "context_length", MAX_TOKENS)

    def _checked(self, ids: Tensor) -> Tensor:
        """Return ids that were given; ValueError unless the text tower reads texts of their length."""
        ids, length = check_ids(ids), self._context_length()
        fixed = hasattr(self.tokenizer, "context_length")
        if ids.shape[1] > length or (fixed and ids.shape[1] != length):
            needed = f"(B, {length})" if fixed else f"(B, 1 to {length})"
            raise ValueError(f"tokens need shape {needed} for {self.name}, got {tuple(ids.shape)}; use its tokenize")
        words = getattr(self._text, "vocab_size", None)
        if isinstance(words, int) and (int(ids.min()) < 0 or int(ids.max()) >= words):
            raise ValueError(
                f"tokens hold ids from {int(ids.min())} to {int(ids.max())}, and {self.name} embeds 0 to {words - 1}; "
                "use its tokenize"
            )
        return ids

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of everything that decides the image features.

        That is the tower's kind, sizes, preprocessing, dtype and each of its weights; the name and the text tower are
        left out.
        """
        tower = self._tower
        described = {
            "kind": type(tower.module).__qualname__,
            "image_size": tower.image_size,
            "patch_size": tower.patch_size,
            "mean": list(tower.mean),
            "std": list(tower.std),
            "interpolation": tower.interpolation,
            "dtype": str(self.dtype),
            "structure": repr(tower.module),
        }
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        for name, tensor in sorted(tower.module.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _pixels(self, images: Tensor) -> Tensor:
        """Resize and normalise: (B, 3, image_size, image_size), on the device and in the dtype of the weights."""
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
            raise ValueError(f"images must have shape (B, 3, S, S), got {tuple(images.shape)}")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError(f"images must be uint8, or floats in [0, 1], got {images.dtype}")
        device = next(self.model.parameters()).device
        return self._tower.pixels(images, device).to(self.dtype)

    def _check(self) -> int:
        """Check on an image of noise that token 0 is the image's embedding, and return the embedding's size."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(256, (1, 3, self.image_size, self.image_size), dtype=torch.uint8, generator=generator)
        pooled = self.encode_image(noise)
        if not self._tower.has_tokens:
            return pooled.shape[1]
        tokens = self.tokens(noise)
        count = 1 + self.grid**2
        if tokens.shape[1] != count:
            raise ValueError(f"{self.name}: a grid of {self.grid} must give {count} tokens, got {tokens.shape[1]}")
        agreement = float(F.cosine_similarity(tokens[:, 0].float(), pooled.float()).min())
        if not agreement > 0.99:
            raise ValueError(
                f"{self.name}: the embedding is not its projected [CLS] token (cosine {agreement:.4f}), so that its "
                "tokens are not in the joint space"
            )
        return tokens.shape[2]


def load_teacher(
    source: str | Path,
    *,
    grid: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokens: bool = True,
) -> Teacher:
    """Load a CLIP as a teacher.

    Args:
        source: one of

            * a folder with `open_clip_config.json` and the weights (a run of `oner-fast train clip`);
            * a folder with `lit_config.json` and the heads (a run of `oner-fast train lit`: not a CLIP, but two
                pretrained encoders with a common space);
            * a folder with `config.json` and safetensors of a CLIP or SigLIP of transformers;
            * `MODEL:TAG` of open_clip, such as `ViT-B-16:openai` or `EVA01-g-14-plus:merged2b_s11b_b114k`;
            * `hf-hub:OWNER/NAME`, a CLIP in open_clip's layout;
            * `FILE:MODEL`: a file with weights of open_clip's MODEL, or of `timm:MODEL`: safetensors or PyTorch, with
                any suffix or none; for the names in it see `oner_fast.models.state_files.unwrapped`;
            * `timm:MODEL`, such as `timm:vit_base_patch16_clip_224.openai`: an image tower without texts.
        grid: number of cells along a side, usually the student's. The teacher's input is resized to grid * patch pixels
            and its positions are resampled. By default the teacher keeps its own grid.
        device: where the teacher computes.
        dtype: dtype of the weights and outputs: torch.float32 or torch.bfloat16.
        tokens: whether a grid of tokens in the joint space is needed, as UTA does. Where False, any CLIP is taken, and
            `Teacher.tokens` of one without such a grid raises ValueError.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: the source is none of these, is damaged, does not fit its configuration or names something to fetch;
            or its model has no grid of tokens in the joint space.
        ModuleNotFoundError: open_clip, timm or an encoder's package is not installed.
    """
    text = str(source)
    common: dict[str, Any] = {"grid": grid, "device": device, "dtype": dtype, "needed": tokens}
    if text.startswith("timm:"):
        return _timm(text, text.removeprefix("timm:"), {"pretrained": True}, common)
    if text.startswith("hf-hub:"):
        return _open_clip(text, text, {}, common)
    folder = Path(text.removeprefix("local-dir:"))
    if folder.is_dir():
        return _from_folder(folder, common)
    found = _FILE.fullmatch(text) or _ANY_FILE.fullmatch(text)
    if found and (_FILE.fullmatch(text) or Path(found["file"]).is_file()):
        return _from_file(text, Path(found["file"]), found["model"], common)
    if isinstance(source, Path) or text.startswith("local-dir:") or (":" not in text and "/" in text):
        raise FileNotFoundError(f"there is no folder {folder}")
    return _from_tag(text, common)


def is_teacher(folder: Path) -> bool:
    """Whether a folder holds a teacher that this library, open_clip or transformers saved."""
    return any((folder / name).is_file() for name in (CONFIG, lit.CONFIG)) or hugging_face_clip.is_folder(folder)


def is_fetched(source: str) -> bool:
    """Whether `load_teacher` may download the model that `source` names: a hub's, timm's, or a tag of open_clip.

    A path is read from this machine, and so is FILE:MODEL where the file is there and the model has no part of a hub.
    """
    if source.startswith(("timm:", "hf-hub:", "http:", "https:")):
        return True
    if Path(source.removeprefix("local-dir:")).exists():
        return False
    found = _FILE.fullmatch(source) or _ANY_FILE.fullmatch(source)
    if found is None or source.startswith("local-dir:"):
        return False
    return not Path(found["file"]).is_file() or open_clip_files.has_part_of_hub(found["model"])


def is_named(source: str) -> bool:
    """Whether `source`, which is no path on this machine, names a model in one of `load_teacher`'s other forms."""
    return source.startswith(("timm:", "hf-hub:", "local-dir:")) or _ANY_FILE.fullmatch(source) is not None


def lit_teacher(name: str, model: lit.LiT, encoders: Encoders, config: lit.LiTConfig, **common: Any) -> Teacher:
    """Wrap a LiT as a teacher; `common` holds grid, device and dtype, as in `load_teacher`."""
    common.pop("needed", None)
    tower = lit.LiTTower(model.visual, encoders, config.grid)
    return Teacher(tower, name=name, model=model, tokenize=lambda: encoders.tokenize, **common)


def _from_folder(folder: Path, common: dict[str, Any]) -> Teacher:
    """Load the teacher that a run or open_clip saved in `folder`."""
    if (folder / lit.CONFIG).is_file():
        return lit_teacher(str(folder), *lit.load_lit(folder), **common)
    if not (folder / CONFIG).is_file():
        if hugging_face_clip.is_folder(folder):
            return _hugging_face(folder, common)
        raise FileNotFoundError(
            f"{folder} holds neither {CONFIG} nor {lit.CONFIG}; a teacher's folder is a finished run of 'oner-fast "
            "train clip' or 'oner-fast train lit', or a CLIP that open_clip or transformers saved"
        )
    open_clip_files.check_folder(folder)
    return _open_clip(str(folder), f"local-dir:{folder}", {}, common)


def _from_file(name: str, file: Path, model: str, common: dict[str, Any]) -> Teacher:
    """Load open_clip's or timm's `model` with the weights of a file."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    if not model.startswith("timm:"):
        _check_known(model)
    with open_clip_files.plain_file(file) as plain:
        try:
            if model.startswith("timm:"):
                return _timm(name, model.removeprefix("timm:"), {"checkpoint_path": str(plain)}, common)
            return _open_clip(name, model, {"pretrained": str(plain)}, common)
        except RuntimeError as error:
            raise ValueError(f"{file} does not fit {model}: {' '.join(str(error).split())[:600]}") from error


def _from_tag(name: str, common: dict[str, Any]) -> Teacher:
    """Load the pretrained CLIP that open_clip knows as MODEL:TAG."""
    model, _, tag = name.partition(":")
    _check_known(model)
    tags = optional_package("open_clip").list_pretrained_tags_by_model(model)
    if tag not in tags:
        known = ", ".join(f"{model}:{each}" for each in tags) or "none; give FILE:MODEL"
        raise ValueError(f"a pretrained {model} must be named with its tag, got {name!r}; known: {known}")
    return _open_clip(name, model, {"pretrained": tag, "force_quick_gelu": _quick_gelu(model, tag)}, common)


def _check_known(model: str) -> None:
    if model not in optional_package("open_clip").list_models():
        raise ValueError(
            f"a teacher must be a folder, MODEL:TAG or FILE:MODEL of open_clip, hf-hub:OWNER/NAME or timm:MODEL; "
            f"open_clip has no model {model!r} (open_clip.list_models() names them)"
        )


def _quick_gelu(model: str, tag: str) -> bool:
    """Whether these weights were trained with QuickGELU, which a model's name alone does not tell."""
    return bool(optional_package("open_clip").get_pretrained_cfg(model, tag).get("quick_gelu", False))


def _open_clip(name: str, model_name: str, options: dict[str, Any], common: dict[str, Any]) -> Teacher:
    open_clip = optional_package("open_clip")
    try:
        if model_name.startswith("hf-hub:"):
            open_clip_files.check_no_code(open_clip.get_model_config(model_name), name)
        model = open_clip.create_model(model_name, require_pretrained=True, pretrained_text=False, **options)
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} cannot be loaded as a CLIP: {' '.join(str(error).split())[:600]}") from error

    def pooled(reason: str) -> TeacherImageTower:
        return OpenClipPooled(model, reason, name)

    texts = {"model": model, "tokenize": lambda: open_clip.get_tokenizer(model_name)}
    return _wrapped(lambda: image_tower_of(model, name), pooled, name, texts, common)


def _hugging_face(folder: Path, common: dict[str, Any]) -> Teacher:
    """Load the CLIP or SigLIP that transformers saved in `folder`."""
    model = hugging_face_clip.load_folder(folder)
    texts = {"model": model, "tokenize": lambda: hugging_face_clip.tokenizer_of(folder, model)}

    def pooled(reason: str) -> TeacherImageTower:
        return hugging_face_clip.HuggingFacePooled(model, reason, str(folder))

    return _wrapped(lambda: hugging_face_clip.HuggingFaceViT(model, str(folder)), pooled, str(folder), texts, common)


def _wrapped(
    tower: Callable[[], TeacherImageTower],
    pooled: Callable[[str], TeacherImageTower],
    name: str,
    texts: dict[str, Any],
    common: dict[str, Any],
) -> Teacher:
    """Make the teacher of a tower with tokens; where it has none and none is needed, that of its pooled embedding."""
    options = {key: value for key, value in common.items() if key != "needed"}
    try:
        return Teacher(tower(), name=name, **texts, **options)
    except ValueError as error:
        if common["needed"]:
            raise
        return Teacher(pooled(str(error)), name=name, **texts, **options)


def _timm(name: str, model_name: str, options: dict[str, Any], common: dict[str, Any]) -> Teacher:
    timm = optional_package("timm")
    if not timm.is_model(model_name):
        raise ValueError(f"timm has no model {model_name!r} (timm.list_models() names them)")
    tower = TimmViT(timm.create_model(model_name, **options), None, name)
    return Teacher(tower, name=name, **{key: value for key, value in common.items() if key != "needed"})


def _ordinary(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor
