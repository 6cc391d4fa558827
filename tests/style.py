"""Check the project's style where ruff does not: docstrings, comments and line lengths.

`make lint` runs it on all files of the repository; `python tests/style.py PATH ...` checks some. A docstring must not
begin with a question word or "Of", docstrings and comments use Markdown and no reStructuredText, code has at most 120
columns and Markdown at most 100. Tables, lines with a link, pragmas and generated reports may be longer.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE_COLUMNS, MARKDOWN_COLUMNS = 120, 100
CODE = {".py", ".cpp", ".h", ".cu", ".cuh", ".yml", ".yaml"}
CODE_NAMES = {"Makefile", "run", "run_versions", "versions"}  # the Makefile, and the files of .ci
GENERATED = ("benchmarks/results/",)
FIRST_WORDS = {"Of", "What", "Whose", "Where", "Which", "Who", "How"}

Problem = tuple[int, str]

_RST = re.compile(r"``|:(?:meth|func|class|mod|attr|data|exc|ref):`")
_PRAGMA = re.compile(r"\s*#\s*(?:type: ignore|noqa|fmt:)[^#]*$")
_LINK = re.compile(r"\]\(|https?://|^\[[^\]]+\]:")


def prose_problems(source: str) -> Iterator[Problem]:
    """Yield (line, problem) for the docstrings and comments of Python source."""
    for line, text in docstrings(source):
        first = re.match(r"\s*(\w+)", text)
        if first is not None and first[1] in FIRST_WORDS:
            yield line, f"docstring begins with {first[1]!r}; begin with an imperative or a noun phrase"
        if _RST.search(text):
            yield line, "docstring has reStructuredText markup; use Markdown, with single backticks"
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and _RST.search(token.string):
            yield token.start[0], "comment has reStructuredText markup; use Markdown, with single backticks"


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every docstring, those of attributes included."""
    for node in ast.walk(ast.parse(source)):
        for statement in getattr(node, "body", ()) if isinstance(getattr(node, "body", None), list) else ():
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, value.value


def long_lines(text: str, columns: int, markdown: bool = False) -> Iterator[Problem]:
    """Yield (line, problem) for lines over `columns`.

    A pragma at the end of a line of code does not count. Markdown's tables and lines with a link are exempt.
    """
    for number, line in enumerate(text.splitlines(), 1):
        if markdown and (line.lstrip().startswith("|") or _LINK.search(line.lstrip())):
            continue
        length = len(line if markdown else _PRAGMA.sub("", line))
        if length > columns:
            yield number, f"line has {length} columns, {columns} at most"


def problems(path: Path, name: str) -> list[Problem]:
    """List the problems of one file, whose `name` is its path within the repository."""
    if path.suffix == ".md":
        if name.startswith(GENERATED):
            return []
        return list(long_lines(path.read_text(encoding="utf-8"), MARKDOWN_COLUMNS, markdown=True))
    if path.suffix not in CODE and path.name not in CODE_NAMES:
        return []
    text = path.read_text(encoding="utf-8")
    found = list(long_lines(text, CODE_COLUMNS))
    if path.suffix == ".py":
        found += prose_problems(text)
    return sorted(found)


def repository_files(paths: Sequence[str]) -> list[str]:
    """List the files under `paths` (all where there are none) that git tracks or would track, without links."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *paths]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return sorted(name for name in set(names) if (ROOT / name).is_file() and not (ROOT / name).is_symlink())


def main(paths: Sequence[str]) -> int:
    """Print every problem as PATH:LINE: TEXT; returns 1 where there is one."""
    lines = [f"{name}:{line}: {text}" for name in repository_files(paths) for line, text in problems(ROOT / name, name)]
    print("\n".join(lines) if lines else "style: no problems")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
