"""The parts of OneR's contrast that are no part of the model: the student's predictors and the averaged teacher.

A run keeps them in `contrast.safetensors` beside `model.safetensors`, so that an evaluation can look where the contrast
looked. The file names the model to which it belongs by the SHA-256 of the model's file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from oner_fast import bounded_json, format_version
from oner_fast.atomic import write_atomic
from oner_fast.models.files import check_oner, serialised
from oner_fast.models.fitting import Found, check_shapes, filled
from oner_fast.models.oner import OneR, OneRConfig, PassName
from oner_fast.models.safetensors_header import Header, read_header
from oner_fast.models.state_files import read_safetensors
from oner_fast.nn.heads import Predictor

FILE = "contrast.safetensors"
FORMAT = "oner_fast.contrast"
_PREDICTORS = ("predictor", "text_predictor")


@dataclass(frozen=True)
class Contrast:
    """Predictors and teacher of a training.

    Attributes:
        predictor: maps the student's projections; None for the identity.
        text_predictor: maps those of F(T) where each head has its own; None where `predictor` serves them too.
        teacher: the averaged tower, which gives the keys; None where the student's own projections are the keys.
    """

    predictor: Predictor | None
    text_predictor: Predictor | None
    teacher: OneR | None

    def predicted(self, projected: Mapping[PassName, Tensor]) -> dict[PassName, Tensor]:
        """Predict the projections (B, E) of each pass: (B, E).

        Each predictor makes one product for all of its passes.
        """
        if self.predictor is None:
            return dict(projected)
        found: dict[PassName, Tensor] = {}
        texts = [name for name in projected if self.text_predictor is not None and name == "text"]
        others = [name for name in projected if name not in texts]
        for predictor, names in ((self.text_predictor, texts), (self.predictor, others)):
            if predictor is not None and names:
                rows = [projected[name].shape[0] for name in names]
                parts = predictor(torch.cat([projected[name] for name in names])).split(rows)
                found |= dict(zip(names, parts, strict=True))
        return {name: found[name] for name in projected}


def save_contrast(path: Path, contrast: Contrast, model: str) -> None:
    """Write the file, which is replaced at once.

    Args:
        path: the file, `FILE` in the run.
        contrast: predictors and teacher.
        model: SHA-256 of the bytes of `model.safetensors`, in hexadecimal.
    """
    parts = {name: part for name in (*_PREDICTORS, "teacher") if (part := getattr(contrast, name)) is not None}
    metadata = {"format": FORMAT, format_version.FIELD: str(format_version.CONTRAST), "model": model}
    data = serialised(nn.ModuleDict(parts), metadata)
    write_atomic(path, lambda file: file.write(data))


def load_contrast(path: Path, config: OneRConfig, model: str) -> Contrast:
    """Read the file of `save_contrast`, in float32 and evaluation mode, without gradients.

    Args:
        path: the file.
        config: the sizes of the model beside it.
        model: SHA-256 of the model's file, in hexadecimal.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another file, belongs to another model, or its weights do not fit the model's sizes.
    """
    header = read_header(path)
    if (given := header.metadata.get("format")) != FORMAT:
        raise ValueError(f"{path} holds no predictor and teacher: its format is {bounded_json.shown(given)}")
    format_version.check_format_version(path, header.metadata.get(format_version.FIELD), format_version.CONTRAST)
    if header.metadata.get("model") != model:
        raise ValueError(
            f"{path} belongs to another model than the one beside it; run the training's command again, which writes "
            "both files anew"
        )
    problem = f"{path}: the weights do not fit the model beside it"
    parts = {name.partition(".")[0] for name in header.tensors}
    if extra := sorted(parts - {*_PREDICTORS, "teacher"}):
        raise ValueError(f"{problem}: extra {extra[0][:80]}")
    for name in parts & set(_PREDICTORS):
        _check_predictor(_part(header, name), config.embed_dim, f"{problem}: {name}")
    if "teacher" in parts:
        check_oner(_part(header, "teacher"), config, f"{problem}: teacher")
    state = read_safetensors(path)

    def weights(name: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}

    def predictor(name: str) -> Predictor | None:
        if name not in parts:
            return None
        own = weights(name)
        return filled(Predictor(config.embed_dim, own["0.weight"].shape[0]), own, problem).requires_grad_(False)

    teacher = filled(OneR(config), weights("teacher"), problem).requires_grad_(False) if "teacher" in parts else None
    return Contrast(predictor("predictor"), predictor("text_predictor"), teacher)


def _part(header: Header, name: str) -> Found:
    """Find the shapes of one part, under the names within it."""
    prefix = f"{name}."
    tensors = {key.removeprefix(prefix): each for key, each in header.tensors.items() if key.startswith(prefix)}
    return Found.in_header(Header(tensors, {}))


def _check_predictor(found: Found, embed_dim: int, problem: str) -> None:
    shape = found.shapes.get("0.weight")
    hidden = shape[0] if shape else 1  # a wrong shape is named below
    with torch.device("meta"):
        wanted = {name: tuple(each.shape) for name, each in Predictor(embed_dim, hidden).state_dict().items()}
    check_shapes(found, wanted, problem)
