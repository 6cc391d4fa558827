"""The content of a page: sections of text, charts and tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from oner_fast.benchmarks.charts.colours import NARROW, WIDE
from oner_fast.benchmarks.drawing import Drawing


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows.

    Args:
        caption: what the table shows.
        columns: the heads.
        rows: the cells, as many as `columns`.
        ids: an anchor for each row, where links lead to the rows.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    ids: Sequence[str] = ()


@dataclass(frozen=True)
class Figure:
    """A chart at both widths, of which the page shows the one that fits, and its caption."""

    wide: Drawing
    narrow: Drawing
    caption: str

    @classmethod
    def of(cls, draw: Callable[[int], Drawing], caption: str) -> Figure:
        """Draw the chart at both widths; `draw` takes the width."""
        return cls(draw(WIDE), draw(NARROW), caption)


@dataclass(frozen=True)
class Detail:
    """A part that is closed until a reader opens it."""

    summary: str
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it, in this order."""

    id: str
    heading: str
    paragraphs: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    details: Sequence[Detail] = ()


@dataclass(frozen=True)
class Fact:
    """A fact about the run; `code` sets it in the font of a terminal."""

    name: str
    value: str
    code: bool = False


@dataclass(frozen=True)
class Page:
    """A page.

    Args:
        title: the heading.
        lead: the sentences below it.
        warning: a sentence that a reader must not miss; empty for none.
        facts: what, where and how.
        sections: the rest.
    """

    title: str
    lead: Sequence[str] = ()
    warning: str = ""
    facts: Sequence[Fact] = ()
    sections: Sequence[Section] = field(default_factory=list)
