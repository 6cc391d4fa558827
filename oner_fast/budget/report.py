"""The text of an estimate: a table of its parts, the hours that follow, and every assumption."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from oner_fast.budget.parts import Estimate, Setting
from oner_fast.budget.techniques import TECHNIQUES, State, techniques

WARNING = "ESTIMATE, +-30 %: counts and assumed rates; nothing was measured on a GPU"
ERROR = 0.3
BEGIN, END = "<!-- begin of the estimate -->", "<!-- end of the estimate -->"


@dataclass(frozen=True)
class Report:
    """The estimates of a recipe's step in every state."""

    recipe: str
    setting: Setting
    found: Mapping[State, Estimate]

    def head(self) -> str:
        """Describe what is estimated in two lines."""
        work, setting = self.setting.work, self.setting
        return (
            f"{self.recipe} on {setting.ranks} x {setting.machine.name}:\n{work.pairs} pairs a GPU, "
            f"{work.student.tokens:,} tokens of the student, {work.teacher.tokens:,} of the teacher"
        )

    def compared(self) -> str:
        """Return the table of all states for a terminal, with techniques and assumptions."""
        lines = [WARNING, self.head(), "", f"{'ms':<24}" + "".join(f"{state:>9}" for state in self.found)]
        for name, values in self._rows():
            lines.append(f"{name:<24}" + "".join(f"{value:>9}" for value in values))
        lines += ["", "techniques (x: the code has it now):"]
        now = techniques("now")
        lines += [f"  {'x' if name in now else ' '} {name:<17}{text}" for name, text in TECHNIQUES.items()]
        return "\n".join([*lines, "", *self._assumptions()])

    def detailed(self, state: State) -> str:
        """Return the parts of one state for a terminal, each with its count."""
        one = self.found[state]
        lines = [WARNING, f"{self.head()}, {state}", ""]
        lines += [f"{part.name:<24}{1e3 * part.seconds:8.1f} ms  {part.count}" for part in one.parts]
        lines += [f"{name:<24}{value}" for name, (value,) in self._totals([one])]
        return "\n".join([*lines, "", *self._assumptions()])

    def markdown(self) -> str:
        """Return the table of all states, the counts before and after, and the assumptions as Markdown."""
        before, after = self.found["before"], self.found["after"]
        lines = [
            f"**{WARNING}.**",
            "",
            *f"{self.head()}.".replace(": ", ":\n").splitlines(),
            "",
            "| ms | before | now | after |",
            "|---|---|---|---|",
        ]
        lines += [f"| {name} | {' | '.join(values)} |" for name, values in self._rows()]
        lines += ["", "| Part | Count before | Count after |", "|---|---|---|"]
        for first, last in zip(before.parts, after.parts, strict=True):
            lines.append(
                f"| {first.name} | {first.count} | {'the same' if last.count == first.count else last.count} |"
            )
        lines += ["", "| Technique | In the code | What it is |", "|---|---|---|"]
        now = techniques("now")
        lines += [f"| {name} | {'yes' if name in now else 'no'} | {text} |" for name, text in TECHNIQUES.items()]
        lines += ["", "Assumptions:", "", "| Name | Value |", "|---|---|"]
        lines += [f"| `{name}` | {value:.4g} |" for name, value in self._values()]
        return "\n".join(lines)

    def _rows(self) -> Iterator[tuple[str, list[str]]]:
        states = list(self.found.values())
        for parts in zip(*(one.parts for one in states), strict=True):
            yield parts[0].name, [f"{1e3 * part.seconds:.1f}" for part in parts]
        yield from self._totals(states)

    def _totals(self, states: Sequence[Estimate]) -> Iterator[tuple[str, list[str]]]:
        hours = [one.seconds * self.setting.work.config.optim.steps / 3600 for one in states]
        yield "a step, ms", [f"{1e3 * one.seconds:.0f}" for one in states]
        yield "MFU", [f"{one.mfu:.0%}" for one in states]
        yield "hours of all steps", [f"{one:.2f}" for one in hours]
        yield "GPU-hours", [f"{one * self.setting.ranks:.0f}" for one in hours]
        yield "GPU-hours, from", [f"{one * self.setting.ranks * (1 - ERROR):.0f}" for one in hours]
        yield "GPU-hours, to", [f"{one * self.setting.ranks * (1 + ERROR):.0f}" for one in hours]

    def _values(self) -> Iterator[tuple[str, float]]:
        machine = asdict(self.setting.machine)
        machine.pop("name")
        yield from machine.items()
        yield from asdict(self.setting.assumed).items()

    def _assumptions(self) -> Iterator[str]:
        yield "assumptions:"
        yield from (f"  {name:<27}{value:.4g}" for name, value in self._values())


def replaced(page: str, report: Report) -> str:
    """Return a page with `report` between its two marks.

    Raises ValueError where the page lacks a mark.
    """
    if BEGIN not in page or END not in page:
        raise ValueError(f"the page needs the lines {BEGIN!r} and {END!r}, between which the estimate is put")
    head, rest = page.split(BEGIN, 1)
    return f"{head}{BEGIN}\n\n{report.markdown()}\n\n{END}{rest.split(END, 1)[1]}"
