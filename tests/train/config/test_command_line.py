"""Recipes by name, and command lines that override their values."""

import dataclasses
import enum
import math
from pathlib import Path
from typing import Literal

import pytest

from oner_fast.train.config import registry
from oner_fast.train.config.command_line import parse
from oner_fast.train.config.registry import UnknownRecipe, get_recipe, import_all_recipes, recipe, recipes


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


@pytest.fixture(autouse=True)
def only_these_recipes(monkeypatch):
    import_all_recipes()  # so that no import within a test adds to the registry
    monkeypatch.setattr(registry, "_RECIPES", {})

    @recipe
    def oner_tiny_cpu() -> Run:
        """The small one.

        More about it.
        """
        return Run(steps=10)

    @recipe
    def oner_large_gpu() -> Run:
        """The large one."""
        return Run(steps=1000, optim=Optim(lr=3e-4), weights={"itc": 1.0})


def test_registry_and_unknown_names():
    assert list(recipes()) == ["oner_large_gpu", "oner_tiny_cpu"]
    assert get_recipe("oner_tiny_cpu") == Run(steps=10)
    with pytest.raises(UnknownRecipe) as error:
        get_recipe("oner_tiny_gpu")
    assert "Did you mean" in str(error.value)
    assert "oner_large_gpu, oner_tiny_cpu" in str(error.value)
    with pytest.raises(UnknownRecipe) as error:
        get_recipe("zzz")
    assert "Did you mean" not in str(error.value)


def test_a_recipe_needs_a_name_a_docstring_and_to_be_alone():
    def short() -> Run:
        """Named badly."""
        return Run(steps=1)

    with pytest.raises(ValueError, match="model_data_hardware"):
        recipe(short)

    def oner_no_docstring() -> Run:
        return Run(steps=1)

    with pytest.raises(ValueError, match="docstring"):
        recipe(oner_no_docstring)

    def oner_tiny_cpu() -> Run:
        """The same name from elsewhere."""
        return Run(steps=1)

    with pytest.raises(ValueError, match="already defined"):
        recipe(oner_tiny_cpu)


def test_parse_picks_the_recipe_and_overrides_nested_fields():
    assert parse([], "oner_tiny_cpu", "prog") == Run(steps=10)
    words = ["--optim.lr", "1e-2", "--recipe", "oner_large_gpu", "--optim.max-norm", "None", "--precision", "BF16"]
    words += ["--widths", "1", "2", "3", "--grad-checkpointing", "--objective=clip"]
    got = parse(words, "oner_tiny_cpu", "prog")
    assert got == Run(
        steps=1000,
        optim=Optim(lr=1e-2, max_norm=None),
        precision=Precision.BF16,
        widths=(1, 2, 3),
        grad_checkpointing=True,
        objective="clip",
        weights={"itc": 1.0},
    )
    assert parse(["--recipe=oner_large_gpu"], "oner_tiny_cpu", "prog").steps == 1000


def test_the_last_part_of_a_flag_is_enough_where_it_is_the_only_one(capsys):
    @dataclasses.dataclass(frozen=True)
    class Part:
        size: int = 1
        fast: bool = True
        run_dir: str = "a"

    @dataclasses.dataclass(frozen=True)
    class Whole:
        left: Part = Part()
        right: Optim = Optim()
        other: Run = Run(steps=1)

    @recipe
    def whole_two_parts() -> Whole:
        """Both."""
        return Whole()

    @recipe
    def part_one_cpu() -> Part:
        """One."""
        return Part()

    @dataclasses.dataclass(frozen=True)
    class Nested:
        left: Part = Part()

    @recipe
    def nested_one_cpu() -> Nested:
        """All last parts differ."""
        return Nested()

    for words in (["--no-fast", "--size=2"], ["--left.no-fast", "--left.size", "2"]):
        assert parse(words, "nested_one_cpu", "prog") == Nested(left=Part(size=2, fast=False))
    assert parse(["--no-fast", "--run_dir=b"], "part_one_cpu", "prog") == Part(fast=False, run_dir="b")
    words = ["--run-dir", "--size", "--no-fast", "--steps=7", "--no-grad-checkpointing"]
    got = parse([words[0], "x=y", words[1], "3", *words[2:]], "whole_two_parts", "prog")
    assert got == Whole(left=Part(size=3, fast=False, run_dir="x=y"), other=Run(steps=7))
    assert parse(["--run_dir=b", "--other.optim.lr", "2"], "whole_two_parts", "prog") == Whole(
        left=Part(run_dir="b"), other=Run(steps=1, optim=Optim(lr=2.0))
    )
    with pytest.raises(SystemExit):
        parse(["--lr", "1"], "whole_two_parts", "prog")
    assert "--right.lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (["--recipe", "oner_tiny_cpx"], ["unknown recipe 'oner_tiny_cpx'", "Did you mean 'oner_tiny_cpu'", "prog"]),
        (["--recipe"], ["--recipe needs a name", "oner_large_gpu, oner_tiny_cpu"]),
        (["--recipe", "--steps", "3"], ["--recipe needs a name"]),
        (["--optim.max-nrom", "1"], ["--max-nrom", "--max-norm "]),
        (["--max_nrom", "1"], ["max-norm "]),
        (["--optimiser.lr", "1"], ["--optimiser.lr"]),
        (["--optim.lr", "fast"], ["--lr", "fast"]),
        (["--objective", "clop"], ["--objective", "clop", "clip"]),
        (["--steps", "0"], ["steps must be at least 1, got 0"]),
    ],
)
def test_parse_errors_exit_with_2_and_say_what_is_wrong(words, texts, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(words, "oner_tiny_cpu", "prog")
    assert stop.value.code == 2
    output = capsys.readouterr().err
    for text in texts:
        assert text in output


def test_list_and_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--list-recipes"], "oner_tiny_cpu", "prog")
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["  oner_large_gpu  The large one.", "* oner_tiny_cpu   The small one."]
    with pytest.raises(SystemExit) as stop:
        parse(["--help"], "oner_tiny_cpu", "prog")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--lr" in text and "--list-recipes" in text and "oner_tiny_cpu" in text
