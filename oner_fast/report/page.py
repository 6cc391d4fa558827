"""The report as one self-contained HTML file."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from oner_fast.evaluation.table import percent

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""Content-Security-Policy of the pages. They hold no script, so none may run; images and styles are inside."""


def render(content: dict[str, Any]) -> str:
    """Fill the template; a missing value is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html", "html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "thousands": lambda number: f"{number:,}"}
    return environment.get_template("template.html.j2").render(content, policy=POLICY)
