"""A tiny training whose every part is random, for the tests of the step; and two processes for those of ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from oner_fast.data.batch import PairBatch, TokenizedText
from oner_fast.models.oner import OneR, OneRConfig
from oner_fast.train.config.common import Optimisation, Run
from oner_fast.train.engine.distributed import World
from oner_fast.train.oner.ema import build_teacher
from oner_fast.train.oner.settings import Objectives, OneRConfiguration
from oner_fast.train.oner.step import TrainingStep
from oner_fast.train.oner.student import Student


@dataclass(frozen=True)
class Words:
    """The facts about a tokenizer that masking needs."""

    mask_id: int = 2
    first_word_id: int = 3
    vocab_size: int = 29


class Small:
    """Makers of configurations, batches and steps."""

    vocabulary = Words()
    world = World(0, 1, 0, torch.device("cpu"))

    @staticmethod
    def config(
        accum_freq: int = 1, seed: int = 7, model: dict[str, Any] | None = None, **objectives: Any
    ) -> OneRConfiguration:
        """A model of nine patches; `objectives` are Objectives' fields."""
        sizes: dict[str, Any] = {
            "image_size": 12, "patch_size": 4, "width": 8, "depth": 2, "heads": 2, "vocab_size": 29,
            "max_text_tokens": 9, "embed_dim": 5, "projector_hidden": 7,
        }  # fmt: skip
        return OneRConfiguration(
            model=OneRConfig(**{**sizes, **(model or {})}),
            objectives=Objectives(**{"predictor_hidden": 6, "mask_word_ratio": 0.4, **objectives}),
            optim=Optimisation(batch_size=8, accum_freq=accum_freq),
            run=Run(seed=seed),
        )

    @staticmethod
    def batch(count: int = 8, step: int = 3, second: bool = False) -> PairBatch:
        """Pairs with captions of 1 to 9 tokens, some words of two; with another view of each image where asked."""
        draw = torch.Generator().manual_seed(count + step)
        lengths = torch.randint(1, 10, (count,), generator=draw)
        total = int(lengths.sum())
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
        word_ids = torch.cat([torch.arange(int(length)) // 2 for length in lengths]).int()
        text = TokenizedText(torch.randint(3, 29, (total,), generator=draw), ends, word_ids)
        images = torch.randint(256, (count, 3, 12, 12), dtype=torch.uint8, generator=draw)
        other = torch.randint(256, (count, 3, 12, 12), dtype=torch.uint8, generator=draw) if second else None
        captions = [("a caption", "A  Caption", "another", "a third")[i % 4] for i in range(count)]
        return PairBatch(images, text, torch.arange(count), captions, step, 0, second=other)

    @staticmethod
    def shake(module: torch.nn.Module, seed: int) -> None:
        """Every parameter far from zero, so that each counts; the temperature stays."""
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name != "log_logit_scale":
                    noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
                    parameter.copy_(0.3 * noise + (1.0 if "norm" in name and "weight" in name else 0.0))

    @classmethod
    def student(cls, config: OneRConfiguration, dtype: torch.dtype = torch.float64) -> Student:
        """The same weights each time."""
        student = Student(config.model, config.objectives).to(dtype)
        cls.shake(student, 1)
        return student

    @classmethod
    def teacher(cls, config: OneRConfiguration, student: Student) -> OneR | None:
        """A teacher of other weights than the student's, where the configuration has one."""
        if not config.objectives.momentum_teacher:
            return None
        teacher = build_teacher(student.tower)
        cls.shake(teacher, 2)
        return teacher

    @classmethod
    def step(cls, config: OneRConfiguration, dtype: torch.dtype = torch.float64) -> tuple[TrainingStep, Student]:
        """A step of one process, and its student."""
        student = cls.student(config, dtype)
        return cls.step_of(config, student), student

    @classmethod
    def step_of(cls, config: OneRConfiguration, student: Student, world: World | None = None) -> TrainingStep:
        """A step that trains `student`."""
        teacher = cls.teacher(config, student)
        return TrainingStep(config, student, teacher, cls.vocabulary, world or cls.world, None)

    @staticmethod
    def part(batch: PairBatch, rank: int, size: int) -> PairBatch:
        """The pairs of one rank."""
        return replace(batch.split(size)[rank])


@pytest.fixture
def small() -> type[Small]:
    """The makers above."""
    return Small


@pytest.fixture
def run_two_ranks() -> Callable[..., None]:
    """Runs a test's file as a program with (rank, 2, more arguments) for each of two ranks; both must end well.

    As a program because pytest imports the file under a name that a child could not import.
    """

    def run(file: str, *arguments: Any) -> None:
        commands = [[sys.executable, file, str(rank), "2", *map(str, arguments)] for rank in range(2)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
            for c in commands
        ]
        try:
            outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)

    return run


@pytest.fixture
def check_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Runs a training's `main` with `--dry-run`, and checks its report and that no file under `tmp_path` changed."""

    def files() -> dict[str, bytes | None]:
        return {str(path): path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}

    def check(main: Callable[[list[str]], int], words: list[str], run: str) -> None:
        before = files()
        capsys.readouterr()
        assert main([*words, "--dry-run"]) == 0
        memory, pace, whole, loss = capsys.readouterr().out.splitlines()
        assert re.fullmatch(r"memory  \d+\.\d\d GiB at the peak of the process", memory)
        assert re.fullmatch(r"pace    \d+\.\d samples/s, \d+\.\d{3} s a step, \d+% of it waiting for data \(.*\)", pace)
        assert re.fullmatch(rf"run     {run}: \d+\.\d\d hours", whole)
        assert re.fullmatch(r"loss    -?\d+\.\d{4}", loss)
        assert files() == before

    return check
