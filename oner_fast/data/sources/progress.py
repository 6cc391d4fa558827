"""Show the progress of long work: a bar on a terminal, elsewhere a line every few seconds."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 5.0


class Advance(Protocol):
    """Called with the number of items just done."""

    def __call__(self, items: int = 1) -> None: ...


def say(line: str) -> None:
    """Print one line to standard error at once."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """Show how much of `total` is done; yields the function to call as items are done."""
    if sys.stderr.isatty():
        with _bar() as bar:
            task = bar.add_task(title, total=total)

            def advance_bar(items: int = 1) -> None:
                bar.advance(task, items)

            yield advance_bar
        return
    done, start = 0, time.monotonic()
    spoken = start

    def advance_lines(items: int = 1) -> None:
        nonlocal done, spoken
        done += items
        now = time.monotonic()
        if now - spoken >= LINE_SECONDS and done < total:
            spoken = now
            say(f"{title}: {done:,} of {total:,}, {now - start:.0f} s")

    yield advance_lines
    say(f"{title}: {done:,} of {total:,} in {time.monotonic() - start:.1f} s")


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
