"""The documentation quotes messages and shows figures; both are those of the code as it is."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FOREIGN = ("torch.OutOfMemoryError",)  # messages of other libraries


def _strings() -> list[list[str]]:
    """Return every string of the sources as its constant pieces; an f-string has several."""
    found = []
    for folder in ("oner_fast", "train", "benchmarks", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                values = [part.value for part in parts if isinstance(part, ast.Constant)]
                pieces = [" ".join(value.split()) for value in values if isinstance(value, str)]
                if len(" ".join(pieces)) >= (15 if len(pieces) > 1 else 30):
                    found.append(pieces)
    return found


def _has(strings: list[list[str]], part: str) -> bool:
    """Whether a source says `part`: as a piece of a string, or as one whose every piece stands in `part`."""
    return any(all(piece in part for piece in pieces) or any(part in piece for piece in pieces) for pieces in strings)


def _quoted(page: str) -> list[str]:
    """Return the messages of a page's `text` blocks and of the first column of its tables."""
    blocks = re.findall(r"^```text\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    cells = re.findall(r"^\| `([^`|]+)` \|", page, flags=re.MULTILINE)
    return [" ".join(each.split()) for each in [*blocks, *cells]]


def test_troubleshooting_quotes_messages_that_the_code_has() -> None:
    strings = _strings()
    messages = _quoted((DOCS / "troubleshooting.md").read_text(encoding="utf-8"))
    assert len(messages) > 12
    for message in messages:
        if message.startswith(FOREIGN):
            continue
        parts = [part.strip() for part in message.split("...")]
        assert any(_has(strings, part) for part in parts if len(part) >= 15), f"no source says {message!r}"


def test_a_quote_with_another_wording_is_reported() -> None:
    part = "runs/mine/checkpoints contains 2 checkpoints up to step-00000400.pt; resume it, or give another --run-dir"
    assert not _has(_strings(), part)


def test_committed_figures_are_what_their_script_draws(tmp_path: Path) -> None:
    command = [sys.executable, str(DOCS / "figures" / "make_figures.py"), "--out", str(tmp_path)]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, "PYTHONSAFEPATH": ""})
    drawn = sorted([*tmp_path.glob("*.svg"), tmp_path / "benchmark_report.html"])
    assert len(drawn) >= 9
    for path in drawn:
        assert path.read_bytes() == (DOCS / "figures" / path.name).read_bytes(), f"draw {path.name} again"


def test_every_promise_names_a_test_that_exists() -> None:
    page = (DOCS / "reliability.md").read_text(encoding="utf-8")
    promises = re.findall(r"^\| (.+?) \| `(tests/[\w/]+\.py)::(\w+)` \|$", page, re.MULTILINE)
    assert len(promises) > 60
    for promise, file, name in promises:
        source = (DOCS.parent / file).read_text(encoding="utf-8")
        assert f"def {name}(" in source, f"{promise!r} names {file}::{name}, and there is no such test"
