"""Begin a training of OneR with the weights of a run or a file (`--init-from`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from oner_fast import bounded_json
from oner_fast.data.tokenizer import Tokenizer
from oner_fast.models.contrast import FILE as CONTRAST_FILE
from oner_fast.models.contrast import load_contrast
from oner_fast.models.file_kinds import file_kind
from oner_fast.models.files import FORMAT, check_oner, config_from_dict, load_model
from oner_fast.models.fitting import Found, check_shapes
from oner_fast.models.oner import OneR, OneRConfig
from oner_fast.nn.positions import lengthen, resample_grid
from oner_fast.train.config.sizes import require_same_sizes
from oner_fast.train.engine import checkpoint
from oner_fast.train.oner.student import Student

_FREE = ("image_size", "max_text_tokens", "vocab_size", "grad_checkpointing")
_PATCHES, _WORDS = "patch_embedding.positions", "word_embedding.positions"
_PARTS = ("predictor", "text_predictor", "word_head", "patch_head")

State = dict[str, Tensor]


@dataclass(frozen=True)
class StartingWeights:
    """Weights of OneR with their tokenizer.

    Attributes:
        name: the file, for messages.
        config: sizes of the tower.
        tokenizer: the words that the tower embeds.
        tower: weights of the tower.
        parts: weights of the predictors and heads that the file, or the one beside it, holds.
        teacher: weights of the averaged teacher; None where there is none.
        log_logit_scale: a learnt temperature; None where it was fixed, or is not in the file.
    """

    name: str
    config: OneRConfig
    tokenizer: Tokenizer
    tower: State
    parts: dict[str, State]
    teacher: State | None
    log_logit_scale: Tensor | None

    def fill(self, student: Student) -> str:
        """Take the weights over into a new student, and return a sentence about what is taken and what is new.

        Positions are resampled. A temperature that was learnt is taken where the student learns one too.

        Raises:
            ValueError: sizes of the tower, of a predictor or of a head differ.
        """
        require_same_sizes(self.name, self.config, student.tower.config, _FREE)
        student.tower.load_state_dict(self._fitted(self.tower, student.tower))
        taken, new = ["tower"], []
        for name in _PARTS:
            module = getattr(student, name)
            if module is None:
                continue
            if name not in self.parts:
                new.append(name)
                continue
            self._load(module, name)
            taken.append(name)
        if self.log_logit_scale is not None and student.log_logit_scale.requires_grad:
            student.log_logit_scale.data.copy_(self.log_logit_scale)
            taken.append("temperature")
        return f"{self.name} gives {', '.join(taken)}" + (f"; new are {', '.join(new)}" if new else "")

    def fill_teacher(self, teacher: OneR) -> None:
        """Take the averaged teacher's weights over, where there are any; otherwise leave it a copy of the student."""
        if self.teacher is not None:
            teacher.load_state_dict(self._fitted(self.teacher, teacher))

    def _fitted(self, state: State, tower: OneR) -> State:
        own = tower.config
        return {
            **state,
            _PATCHES: resample_grid(state[_PATCHES], own.image_size // own.patch_size),
            _WORDS: lengthen(state[_WORDS], own.max_text_tokens),
        }

    def _load(self, module: nn.Module, name: str) -> None:
        state = self.parts[name]
        wanted = {key: tuple(each.shape) for key, each in module.state_dict().items()}
        remedy = "; give --predictor-hidden as in its training" if name in ("predictor", "text_predictor") else ""
        try:
            check_shapes(Found.in_state(state), wanted, f"{self.name} does not fit this training: its {name}")
        except ValueError as error:
            raise ValueError(f"{error}{remedy}") from error
        module.load_state_dict(state)


def read_starting_weights(path: Path) -> StartingWeights:
    """Read a `model.safetensors`, with the `contrast.safetensors` beside it, or a checkpoint.

    A model's file holds the tower alone; predictors and averaged teacher are in the other file, and the heads of masked
    words and patches and the temperature only in checkpoints.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no model or checkpoint of OneR, or is damaged.
    """
    if file_kind(path) != "safetensors":
        return _of_checkpoint(path)
    tower, tokenizer = load_model(path)
    parts: dict[str, State] = {}
    teacher = None
    if (beside := path.with_name(CONTRAST_FILE)).is_file():
        contrast = load_contrast(beside, tower.config, hashlib.sha256(path.read_bytes()).hexdigest())
        for name in ("predictor", "text_predictor"):
            if (module := getattr(contrast, name)) is not None:
                parts[name] = module.state_dict()
        teacher = None if contrast.teacher is None else contrast.teacher.state_dict()
    return StartingWeights(
        str(path), tower.config, _tokenizer(tokenizer, path), tower.state_dict(), parts, teacher, None
    )


def _of_checkpoint(path: Path) -> StartingWeights:
    state = checkpoint.load(path)
    if state.get("kind", FORMAT) != FORMAT or not {"student", "tokenizer", "model_config"} <= state.keys():
        raise ValueError(f"{path} is no checkpoint of `oner-fast train oner`, whose weights are needed")
    config = config_from_dict(
        bounded_json.load_object(state["model_config"], f"the configuration in {path}"), f"the configuration in {path}"
    )
    student, problem = state["student"], f"{path}: the weights do not fit the configuration beside them"
    tower = _under("tower", student)
    check_oner(Found.in_state(tower), config, problem)
    if (teacher := state.get("teacher")) is not None:
        check_oner(Found.in_state(teacher), config, f"{problem}: teacher")
    parts = {name: part for name in _PARTS if (part := _under(name, student))}
    objectives: dict[str, Any] = json.loads(state["config"])["objectives"]
    scale = student["log_logit_scale"] if objectives.get("learnable_temperature") else None
    return StartingWeights(str(path), config, _tokenizer(state["tokenizer"], path), tower, parts, teacher, scale)


def _tokenizer(text: str, path: Path) -> Tokenizer:
    return Tokenizer.from_json(text, f"the tokenizer in {path}")


def _under(part: str, state: Mapping[str, Tensor]) -> State:
    """Entries of one part, under the names within it."""
    prefix = f"{part}."
    return {name.removeprefix(prefix): each for name, each in state.items() if name.startswith(prefix)}
