"""The style checker refuses what it should refuse, and nothing else."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("style", Path(__file__).with_name("style.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STYLE = load()


@pytest.mark.parametrize("word", ["Of", "What", "Whose", "Where", "Which", "Who", "How"])
def test_a_docstring_may_not_begin_with_a_question_word(word: str) -> None:
    source = f'"""Module."""\n\n\ndef f():\n    """{word} it is."""\n'
    assert [line for line, _ in STYLE.prose_problems(source)] == [5]
    assert repr(word) in next(STYLE.prose_problems(source))[1]


def test_docstrings_of_attributes_are_checked() -> None:
    source = 'class A:\n    """A class."""\n\n    x: int = 0\n    """What x is."""\n'
    assert [line for line, _ in STYLE.prose_problems(source)] == [5]


@pytest.mark.parametrize("text", ["Use ``x``.", "See :func:`f`.", "See :class:`~a.B`."])
def test_restructuredtext_is_refused_in_docstrings_and_comments(text: str) -> None:
    assert [line for line, _ in STYLE.prose_problems(f'"""{text}"""\n')] == [1]
    assert [line for line, _ in STYLE.prose_problems(f"x = 1  # {text}\n")] == [1]


def test_plain_docstrings_pass() -> None:
    source = '"""Whether `x` is 1; offsets and howls."""\n\nx = "What ``it`` says"  # Where `y` is 2.\n'
    assert list(STYLE.prose_problems(source)) == []


def test_long_lines_are_refused() -> None:
    assert list(STYLE.long_lines("x" * 120 + "\n" + "y" * 121, 120)) == [(2, "line has 121 columns, 120 at most")]
    assert list(STYLE.long_lines("x" * 120 + "  # type: ignore[misc]", 120)) == []
    assert len(list(STYLE.long_lines("x" * 121 + "  # noqa: E402", 120))) == 1


def test_markdown_tables_and_lines_with_a_link_may_be_long() -> None:
    long = "word " * 30
    text = f"{long}\n| {long} |\n[a page](page.md) {long}\n[1]: https://example.org/{'x' * 100}\n"
    assert [line for line, _ in STYLE.long_lines(text, 100, markdown=True)] == [1]
    assert len(list(STYLE.long_lines(text, 100))) == 4


def test_generated_reports_and_other_files_are_exempt(tmp_path: Path) -> None:
    long = tmp_path / "report.md"
    long.write_text("word " * 30, encoding="utf-8")
    assert STYLE.problems(long, "docs/report.md") == [(1, "line has 150 columns, 100 at most")]
    assert STYLE.problems(long, "benchmarks/results/cpu/report.md") == []
    image = tmp_path / "figure.png"
    image.write_bytes(b"\x89PNG" + b"x" * 200)
    assert STYLE.problems(image, "figure.png") == []


def test_the_command_exits_1_where_there_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.py").write_text('"""Good."""\n', encoding="utf-8")
    (tmp_path / "bad.py").write_text('"""What is bad."""\n', encoding="utf-8")
    monkeypatch.setattr(STYLE, "ROOT", tmp_path)
    monkeypatch.setattr(STYLE, "repository_files", lambda paths: list(paths))
    assert STYLE.main(["good.py"]) == 0
    assert STYLE.main(["good.py", "bad.py"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("bad.py:1: docstring begins with 'What'")


def test_files_are_those_of_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not (STYLE.ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = STYLE.repository_files(["tests"])
    assert "tests/style.py" in names and all(name.startswith("tests/") for name in names)
    assert not any(name.startswith("oner_fast/kernels/") for name in STYLE.repository_files([]))
