"""The time of a whole step as stacked bars, one for each candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from oner_fast.benchmarks.charts.colours import KINDS, WIDE, Chart, text_width

REST = "everything else"
LEAST_SHARE = 0.025


@dataclass(frozen=True)
class Stack:
    """The bar of one candidate.

    Args:
        label: the candidate.
        seconds: seconds of each kind of operation.
        group: what was measured; bars of one group stand together.
        mark: seconds at which a line is drawn: what the machine's limit allows; None for no line.
    """

    label: str
    seconds: Mapping[str, float]
    group: str
    mark: float | None = None


def kinds(stacks: Sequence[Stack]) -> list[str]:
    """List the kinds that are large enough in some bar to have a colour of their own, largest first."""
    largest: dict[str, float] = {}
    for stack in stacks:
        whole = sum(stack.seconds.values())
        for kind, seconds in stack.seconds.items():
            largest[kind] = max(largest.get(kind, 0.0), seconds / whole)
    largest.pop("rest", None)
    ordered = sorted(largest, key=lambda kind: -largest[kind])
    return [kind for kind in ordered if largest[kind] >= LEAST_SHARE][:KINDS]


def stacked(stacks: Sequence[Stack], title: str, mark: str, width: int = WIDE) -> Chart:
    """Draw the bars on one scale of seconds; `mark` names the lines."""
    chart, wide = Chart(width, title), width >= 600
    coloured = kinds(stacks)
    left, right = (190, width - 74) if wide else (0, width - 2)
    longest = max(sum(stack.seconds.values()) for stack in stacks)
    longest = max([longest, *(stack.mark for stack in stacks if stack.mark)])
    unit = (right - left) / longest
    y = _legend(chart, coloured, mark if any(stack.mark for stack in stacks) else "", width) + 12
    group = ""
    for stack in stacks:
        if stack.group != group:
            y += 12 if group else 0
            chart.text(0, y + 13, stack.group, size=14, bold=True)
            y += 24
            group = stack.group
        whole = sum(stack.seconds.values())
        if wide:
            chart.text(left - 12, y + 18, stack.label, size=13, anchor="end")
            chart.text(left + unit * whole + 8, y + 18, f"{whole:.3g} s", size=13, bold=True)
        else:
            chart.text(0, y + 12, stack.label, size=12.5)
            chart.text(width, y + 12, f"{whole:.3g} s", size=12.5, anchor="end", bold=True)
            y += 18
        _bar(chart, stack, coloured, left, y, unit)
        if stack.mark:
            at = left + unit * stack.mark
            chart.line(at, y - 3, at, y + 29, "limit", width=2)
        y += 36
    chart.height = int(y + 2)
    return chart


def _bar(chart: Chart, stack: Stack, coloured: Sequence[str], left: float, y: float, unit: float) -> None:
    whole = sum(stack.seconds.values())
    parts = [(kind, f"kind{number}", stack.seconds.get(kind, 0.0)) for number, kind in enumerate(coloured)]
    parts.append((REST, "rest", whole - sum(seconds for *_, seconds in parts)))
    x = left
    for kind, colour, seconds in parts:
        if seconds <= 0:
            continue
        length = unit * seconds
        chart.rect(x, y, max(length - 1, 0.5), 26, colour, round=0)
        chart.note(f"{stack.label}: {kind} {seconds:.3g} s, {seconds / whole:.0%}")
        said = f"{seconds / whole:.0%}"
        if length > text_width(said, 12) + 12:
            chart.text(x + 6, y + 17.5, said, "ground", size=12)
        x += length


def _legend(chart: Chart, coloured: Sequence[str], mark: str, width: int) -> float:
    x, y = 0.0, 12.0
    names = [(f"kind{number}", kind) for number, kind in enumerate(coloured)] + [("rest", REST)]
    for colour, words in [*names, *([("mark", mark)] if mark else [])]:
        needed = 34 + text_width(words, 12.5)
        if x + needed > width + 16 and x > 0:
            x, y = 0.0, y + 19
        if colour == "mark":
            chart.line(x + 6, y - 11, x + 6, y + 3, "limit", width=2)
        else:
            chart.rect(x, y - 10, 12, 12, colour)
        chart.text(x + 18, y, words, "soft", size=12.5)
        x += needed
    return y
