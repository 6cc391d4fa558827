"""The display of a training: a live table on a terminal, aligned lines elsewhere."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_log = logging.getLogger(__name__)
_PERCENT = "{:.0%}"
# metric -> (short name, format); losses stand before these, in the order they come.
_COLUMNS = {
    "lr": ("lr", "{:.1e}"),
    "grad_norm": ("grad", "{:.2f}"),
    "samples_per_second": ("smp/s", "{:.1f}"),
    "data_wait": ("wait", _PERCENT),
    "mfu": ("mfu", _PERCENT),
    "logit_scale": ("scale", "{:.1f}"),
    "gap/projection": ("gap", "{:.3f}"),
}
_OPTIONAL = ("logit_scale",)  # shown where it is learnt
_LOSS = "{:.4f}"
_WIDTH = 7
_WINDOW = 64


class Progress:
    """Shows the steps of a training.

    On a terminal, a bar shows step, total and time left. Below it, a table of two rows shows names and newest values:
    the loss and its parts, learning rate, gradient norm, samples a second, data wait, MFU and modality gap. Elsewhere
    it prints, every `every` steps and for the first and the last, one line `step  120/2000 loss 3.1416  ...` with the
    same values in fixed columns.

    Args:
        total: steps of the whole run.
        start: steps finished before, where a run is resumed.
        every: steps between two plain lines.
        title: text before the bar.
        console: where to write; stdout by default.
        enabled: False shows nothing; give `world.is_main`.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        every: int = 10,
        title: str = "train",
        console: Console | None = None,
        enabled: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if total < 1 or every < 1 or not 0 <= start <= total:
            raise ValueError(f"needs total >= 1, every >= 1, 0 <= start <= total, got {total=}, {every=}, {start=}")
        self.total, self.step, self.every, self.title = total, start, every, title
        self.console = console or Console()
        self.enabled = enabled
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal and not self.console.is_jupyter
        self._clock = clock
        self._times: deque[tuple[int, float]] = deque([(start, clock())], maxlen=_WINDOW)
        self._values: dict[str, Any] = {}
        self._first = True
        self._display: Live | None = None

    def __enter__(self) -> Progress:
        if self.enabled and self.live and self._display is None:
            self._display = Live(
                get_renderable=self._render, console=self.console, refresh_per_second=4, transient=False
            )
            self._display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show that `step` steps are finished.

        Args:
            step: finished steps.
            metrics: new values, by the names of `metrics.jsonl`; those not given keep their last value. Metrics without
                a column are ignored.
        """
        self.step = step
        self._times.append((step, self._clock()))
        # A new dict: the display's thread may be reading the old one.
        self._values = {**self._values, **metrics}
        if not self.enabled or self._display is not None:
            return
        if self._first or step % self.every == 0 or step >= self.total:
            self._first = False
            self._print(self.line())

    def note(self, text: str) -> None:
        """Print one line of text, above the bar on a terminal."""
        if self.enabled:
            self._print(text)

    def close(self) -> None:
        """Leave the last state on the screen and give the terminal back; a second call does nothing."""
        if self._display is not None:
            self._display.stop()
            self._display = None

    def line(self) -> str:
        """The present state as one plain line, without colour."""
        width = len(str(self.total))
        cells = [f"step {self.step:>{width}}/{self.total}"]
        cells += [f"{name} {value:>{_WIDTH}}" for name, value in self._cells()]
        return "  ".join([*cells, f"left {self._left()}"])

    def seconds_left(self) -> float | None:
        """Time to the last step at the pace of the last 64 updates; None before the second one."""
        (first, since), (last, until) = self._times[0], self._times[-1]
        if last <= first:
            return None
        return (until - since) / (last - first) * max(self.total - self.step, 0)

    def _cells(self) -> list[tuple[str, str]]:
        losses = [name for name in self._values if name == "loss" or name.startswith("loss/")]
        losses.sort(key=lambda name: name != "loss")
        cells = [(name.removeprefix("loss/"), _format(_LOSS, self._values[name])) for name in losses]
        columns = {name: column for name, column in _COLUMNS.items() if name in self._values or name not in _OPTIONAL}
        return cells + [(short, _format(form, self._values.get(name))) for name, (short, form) in columns.items()]

    def _left(self) -> str:
        seconds = self.seconds_left()
        if seconds is None:
            return "-:--:--"
        whole = math.ceil(seconds)
        return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"

    def _render(self) -> Group:
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(self.title, style="bold"),
            ProgressBar(total=self.total, completed=self.step, width=32),
            Text(f"{self.step}/{self.total}"),
            Text(f"left {self._left()}", style="cyan"),
        )
        cells = self._cells()
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False)
        for name, _ in cells:
            table.add_column(name, justify="right", min_width=5, no_wrap=True)
        table.add_row(*(value for _, value in cells))
        return Group(bar, table)

    def _print(self, text: str) -> None:
        if self.live:
            self.console.print(text, markup=False, highlight=False)
            return
        # Not through rich: it would wrap lines at 80 columns in a log.
        try:
            self.console.file.write(text + "\n")
            self.console.file.flush()
        except OSError as error:  # a display that nobody reads, or a log on a full disk, ends no run
            self.enabled = False
            _log.warning("the progress cannot be written, and the run goes on without: %s", error)


def _format(form: str, value: Any) -> str:
    return "-" if value is None else form.format(float(value))
