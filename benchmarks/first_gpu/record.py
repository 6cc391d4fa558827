"""Findings of a part of the first run: plain data, written to a file after every finding."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from oner_fast import bounded_json
from oner_fast.atomic import write_atomic

PASSED, PARTLY, SKIPPED, FAILED, TIMED_OUT = "passed", "passed in part", "skipped", "failed", "timed out"
FAILURES = (FAILED, TIMED_OUT)


@dataclass
class Findings:
    """Findings of one part.

    Args:
        part: the part's name.
        rows: figures, one dictionary for each thing that was checked or measured.
        headline: the most important figure, for the summary.
        failures: sentences about what is wrong; one is enough for the verdict "failed".
        left_out: sentences about what this machine or the time did not allow.
        skipped: why the whole part could not run; empty otherwise.
        finished: whether the part came to its end.
        seconds: how long it took.
        verdict: set at the end, by the process that started the part.
    """

    part: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    headline: str = ""
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    skipped: str = ""
    finished: bool = False
    seconds: float = 0.0
    verdict: str = ""

    def judge(self, *, timed_out: bool = False, status: int = 0, limit: float = 0.0, last: str = "") -> None:
        """Set the verdict from the findings and from how the part's process ended.

        Args:
            timed_out: the process was ended at its time limit of `limit` seconds.
            status: its exit status.
            last: the last line that it wrote.
        """
        if timed_out:
            self.failures.append(f"the time limit of {limit:.0f} s ended it; the finished rows stand")
        elif status or not self.finished:
            self.failures.append(f"its process ended with status {status}: {last or 'it wrote nothing'}")
        if timed_out:
            self.verdict = TIMED_OUT
        elif self.failures:
            self.verdict = FAILED
        elif self.skipped:
            self.verdict = SKIPPED
        else:
            self.verdict = PARTLY if self.left_out else PASSED


class Record:
    """The findings of a part, which each change writes to `path` at once, so that they survive the process.

    Args:
        path: the JSON file.
        part: the part's name.
        seconds: time that the part may take, from now on.
    """

    def __init__(self, path: Path, part: str, seconds: float) -> None:
        self.path, self.found = path, Findings(part)
        self._start, self._seconds = time.monotonic(), seconds
        self._write()

    def left(self) -> float:
        """Seconds that are left to the part."""
        return self._start + self._seconds - time.monotonic()

    def say(self, text: str) -> None:
        """Print a line."""
        print(text, flush=True)

    def row(self, line: str, **figures: Any) -> None:
        """Add a row, and print `line` about it."""
        self.found.rows.append(figures)
        self._write()
        self.say(line)

    def fail(self, sentence: str) -> None:
        """Note what is wrong."""
        self.found.failures.append(sentence)
        self._write()
        self.say(f"WRONG: {sentence}")

    def leave_out(self, sentence: str) -> None:
        """Note what cannot be done here."""
        self.found.left_out.append(sentence)
        self._write()
        self.say(f"left out: {sentence}")

    def skip(self, reason: str) -> None:
        """Note why the whole part cannot run."""
        self.found.skipped = reason
        self._write()
        self.say(f"skipped: {reason}")

    def finish(self, headline: str = "") -> None:
        """Note that the part came to its end."""
        self.found.finished, self.found.headline = True, headline or self.found.headline
        self._write()
        if headline:
            self.say(headline)

    def _write(self) -> None:
        self.found.seconds = time.monotonic() - self._start
        write(self.path, self.found)


def write(path: Path, found: Findings) -> None:
    """Write findings as JSON; the file is replaced at once."""
    text = json.dumps(asdict(found), indent=1) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def read(path: Path, part: str) -> Findings:
    """Read findings; empty ones where the part left none."""
    try:
        data = bounded_json.load_object(path.read_bytes(), str(path))
    except (OSError, ValueError):
        return Findings(part)
    known = Findings.__dataclass_fields__
    return Findings(**{name: value for name, value in data.items() if name in known})
