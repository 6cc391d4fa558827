"""A page as one HTML file. It needs jinja2, which the extra `bench` installs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from oner_fast.benchmarks.charts.colours import DARK, LIGHT
from oner_fast.benchmarks.drawing import Drawing, rules
from oner_fast.benchmarks.page.content import Page

# The page holds no script, so none may run; its styles and pictures are inside.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_NUMBER = re.compile(r"[-<≤]?\d[\d.,]*(e[-+]?\d+)?( ?[x%])?( \(.*\))?")


def render(page: Page) -> str:
    """Return the page as HTML. Raises ModuleNotFoundError without jinja2."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
    from markupsafe import Markup

    def svg(drawing: Drawing) -> Markup:
        return Markup(drawing.inline())

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = svg
    environment.filters["is_number"] = _is_number
    environment.filters["has_numbers"] = _has_numbers
    template = environment.get_template("page.html.j2")
    return template.render(page=page, policy=POLICY, colours=Markup(rules(LIGHT, DARK)))


def _is_number(cell: str) -> bool:
    return _NUMBER.fullmatch(cell) is not None


def _has_numbers(rows: Sequence[Sequence[str]], column: int) -> bool:
    """Tell whether a column has numbers alone, beside its empty cells; the first column names the rows."""
    cells = [row[column] for row in rows if row[column]]
    return column > 0 and bool(cells) and all(map(_is_number, cells))
