"""Configurations as JSON and back, with every value checked."""

import dataclasses
import enum
import json
import math
from pathlib import Path
from typing import Literal

import pytest

from oner_fast.train.config.serialization import from_dict, load_json, save_json, to_dict


class Precision(enum.Enum):
    FP32 = "float32"
    BF16 = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    max_norm: float | None = 1.0


@dataclasses.dataclass(frozen=True)
class Run:
    steps: int
    optim: Optim = Optim()
    precision: Precision = Precision.FP32
    objective: Literal["oner", "clip"] = "oner"
    widths: tuple[int, ...] = (64, 128)
    grad_checkpointing: bool = False
    data: Path = Path("data")
    limit: float = math.inf
    weights: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


def test_dict_and_file_round_trip(tmp_path):
    config = Run(
        steps=3, optim=Optim(max_norm=None), precision=Precision.BF16, widths=(1,), limit=-math.inf, weights={"a": 2.0}
    )
    plain = to_dict(config)
    assert plain["precision"] == "BF16" and plain["widths"] == [1] and plain["limit"] == "-inf"
    assert from_dict(Run, json.loads(json.dumps(plain, allow_nan=False))) == config
    path = tmp_path / "run" / "config.json"
    save_json(config, path)
    assert load_json(Run, path) == config
    assert [p.name for p in path.parent.iterdir()] == ["config.json"]
    assert from_dict(Run, {"steps": 3}) == Run(steps=3)


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"stepz": 3}, ValueError, "Run: unknown 'stepz'. Did you mean 'steps'?"),
        ({"optim": {"LR": 1.0}}, ValueError, "optim: unknown 'LR'"),
        ({"steps": 1.5}, TypeError, "steps: needs int, got 1.5 (float)"),
        ({"steps": True}, TypeError, "steps: needs int, got True (bool)"),
        ({"optim": {"lr": "1e-3"}}, TypeError, "optim.lr: needs float, got '1e-3'"),
        ({"optim": {"lr": None}}, TypeError, "optim.lr: needs float"),
        ({"optim": {"max_norm": "x"}}, TypeError, "optim.max_norm: needs float"),
        ({"optim": {"betas": [0.9]}}, ValueError, "optim.betas: needs 2 values, got 1"),
        ({"optim": {"betas": [0.9, "a"]}}, TypeError, "optim.betas[1]: needs float"),
        ({"optim": 3}, TypeError, "optim: needs an object"),
        ({"widths": [1, 2.5]}, TypeError, "widths[1]: needs int"),
        ({"precision": "FP8"}, ValueError, "precision: needs one of FP32, BF16, got 'FP8'"),
        ({"objective": "uta"}, ValueError, "objective: needs one of 'oner', 'clip', got 'uta'"),
        ({"weights": {"itc": "one"}}, TypeError, "weights.itc: needs float"),
        ({"grad_checkpointing": 1}, TypeError, "grad_checkpointing: needs bool"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
    ],
)
def test_from_dict_refuses(change, kind, text):
    with pytest.raises(kind) as error:
        from_dict(Run, {"steps": 3, **change})
    assert text in str(error.value)


def test_missing_fields_and_broken_files(tmp_path):
    with pytest.raises(ValueError, match="'steps' is missing"):
        from_dict(Run, {})
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: "):
        load_json(Run, path)
    path.write_text('{"steps": "3"}')
    with pytest.raises(TypeError, match=r"config\.json: steps"):
        load_json(Run, path)


def test_an_integer_stays_one_in_a_union():
    @dataclasses.dataclass(frozen=True)
    class Either:
        size: "float | int"
        name: "Path | str"

    got = from_dict(Either, {"size": 3, "name": "x"})
    assert type(got.size) is int and type(got.name) is str


def test_what_json_cannot_hold_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Odd:
        values: object

    with pytest.raises(TypeError, match=r"values\[0\]: a configuration cannot hold a set"):
        to_dict(Odd(values=[{1}]))
