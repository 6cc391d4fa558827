"""The table at the end of the first run, on the terminal and as a Markdown file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from oner_fast.atomic import write_atomic
from oner_fast.benchmarks.first_gpu.parts import PARTS
from oner_fast.benchmarks.first_gpu.record import Findings

TITLES: Mapping[str, str] = {part.name: part.title for part in PARTS}


def text(found: Sequence[Findings]) -> str:
    """Return the table for a terminal; what is wrong or left out stands below it."""
    lines = [f"{'part':<10}{'verdict':<16}{'s':>5}  result"]
    lines += [f"{one.part:<10}{one.verdict:<16}{one.seconds:5.0f}  {one.skipped or one.headline}" for one in found]
    for one in found:
        lines += [f"{one.part}: WRONG: {sentence}" for sentence in one.failures]
        lines += [f"{one.part}: left out: {sentence}" for sentence in one.left_out]
    return "\n".join(lines)


def markdown(found: Sequence[Findings], machine: str) -> str:
    """Return the summary as a page."""
    lines = ["# The first run on a GPU", "", machine, "", "| part | what | verdict | s | result |", "|---" * 5 + "|"]
    for one in found:
        cells = [one.part, TITLES[one.part], one.verdict, f"{one.seconds:.0f}", one.skipped or one.headline]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    for title, pick in (("Wrong", lambda one: one.failures), ("Left out", lambda one: one.left_out)):
        items = [f"* {one.part}: {sentence}" for one in found for sentence in pick(one)]
        lines += ["", f"## {title}", "", *items] if items else []
    return "\n".join(lines) + "\n"


def write(folder: Path, found: Sequence[Findings], machine: str) -> None:
    """Write `summary.json` and `summary.md` into `folder`; each is replaced at once."""
    data = {"machine": machine, "parts": [asdict(one) for one in found]}
    for name, content in (
        ("summary.json", json.dumps(data, indent=1) + "\n"),
        ("summary.md", markdown(found, machine)),
    ):
        write_atomic(folder / name, lambda file, content=content: file.write(content.encode()))  # type: ignore[misc]
