"""Read CSV and TSV tables strictly: a row is read whole, or named and left out, and a bad row costs no other row.

Python's csv reads each row with strict quotes. This module decides where a row ends. A quoted field may run over
several lines; where its quote does not close properly, the row is left out, and reading goes on at the line after its
first. Each line is parsed a bounded number of times, so that the time grows with the length of the table alone.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from oner_fast.data.budget import BUDGET

ROW = 2 * BUDGET.caption_bytes
"""Greatest length of a row, in characters. Our choice."""

FIELDS = "rows with more or fewer fields than the header"
QUOTES = "rows with a quote that is not closed or not doubled"
LENGTH = "rows that are too long"
NUL = "rows with a NUL byte"

SEPARATORS = {"comma": ",", "tab": "\t", "\\t": "\t", "semicolon": ";", "bar": "|", "space": " "}
_SNIFFED = ("\t", ",", ";", "|")

BeginsRow = Callable[[Sequence[str]], bool]


@dataclass(frozen=True)
class Row:
    """A whole row: the number of the line where it starts, from 1, and its fields, as many as the header has."""

    line: int
    fields: list[str]


@dataclass(frozen=True)
class BadRow:
    """A row that is left out: the number of the line where it starts, the rule that it breaks, and a reason."""

    line: int
    rule: str
    why: str


class Table:
    """The rows of a table with a header line.

    Attributes:
        header: names of the columns, without surrounding white space.
        separator: the character between fields.
    """

    def __init__(
        self, lines: Iterable[str], name: str, separator: str | None = None, wanted: Sequence[str] = ()
    ) -> None:
        """Read the header.

        Args:
            lines: the lines of the table, each with its line ending.
            name: the table's name in errors.
            separator: the character between fields. None chooses, of tab, comma, semicolon and bar, the first with
                which the header has every `wanted` column, or else the one that gives most columns.
            wanted: names of columns.

        Raises:
            ValueError: there is no header line, it cannot be read, or the text is not UTF-8.
        """
        self._lines = _Lines(lines, name)
        start = 0
        while (line := self._lines.get(start)) is not None and not line.text.strip():
            self._lines.forget(start)
            start += 1
        if line is None:
            raise ValueError(f"{name} has no header line: it is empty")
        found: list[tuple[list[str], _Rows]] = []
        why = ""
        for candidate in _SNIFFED if separator is None else (separator,):
            rows = _Rows(self._lines, start, candidate)
            first = rows.header()
            if isinstance(first, BadRow):
                why = why or first.why
            else:
                found.append(([field.strip() for field in first.fields], rows))
        if not found or (why and all(len(names) == 1 for names, _ in found)):
            raise ValueError(f"the header of {name} cannot be read: {why}")
        fitting = [each for each in found if set(wanted) <= set(each[0])] if wanted else []
        self.header, self._rows = fitting[0] if fitting else max(found, key=lambda each: len(each[0]))
        self.separator = self._rows.separator

    def rows(self, begins_row: BeginsRow | None = None) -> Iterator[Row | BadRow]:
        """Yield every row in order; blank lines are no rows. It can be called once.

        Args:
            begins_row: tells whether the fields of a line are those of a row. A quoted field that runs over such a line
                counts as one whose closing quote is missing.

        Raises:
            ValueError: the text is not UTF-8.
        """
        return self._rows.rest(len(self.header), begins_row)


def table_of(data: bytes, name: str = "table", separator: str | None = None, wanted: Sequence[str] = ()) -> Table:
    """Read a table from its bytes: UTF-8, with or without a byte order mark. Takes and raises as `Table`."""
    return Table(lines_of(io.BytesIO(data)), name, separator, wanted)


def lines_of(file: BinaryIO) -> Iterator[str]:
    """Yield the lines of a UTF-8 file with their endings: LF, CR or CRLF.

    A byte order mark is removed, a byte that is not UTF-8 becomes half a surrogate pair, which `Table` refuses, and a
    line over `ROW` characters is cut there. The file is closed at the end.
    """
    with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        while line := text.readline(ROW + 1):
            yield line
            while len(line) > ROW and not line.endswith(("\n", "\r")):
                line = text.readline(ROW + 1)


def separator_of(text: str) -> str:
    """Return the separator that a user named: one character, or tab (also as `\\t`), comma, semicolon, bar, space.

    Raises:
        ValueError: it is neither.
    """
    separator = SEPARATORS.get(text.lower(), text)
    if len(separator) != 1 or separator in '"\r\n\0':
        raise ValueError(f"--csv-separator {text!r} is not a separator; give one character, or {', '.join(SEPARATORS)}")
    return separator


@dataclass
class _Line:
    """A line, and its place in the table in characters.

    `before` is the number of separators between the start of the known chain and this line; see `_Rows`.
    """

    text: str
    start: int
    before: int = 0

    @property
    def end(self) -> int:
        return self.start + len(self.text)


class _Lines:
    """A window on the lines of a table, numbered from 0."""

    def __init__(self, lines: Iterable[str], name: str) -> None:
        self._source = iter(lines)
        self._name = name
        self._window: dict[int, _Line] = {}
        self._read = 0
        self._characters = 0

    def get(self, i: int) -> _Line | None:
        """Return line `i`, which has not been forgotten; None past the last."""
        while self._read <= i:
            text = next(self._source, None)
            if text is None:
                return None
            if not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError:
                    utf16 = not self._read and text.startswith(("\udcff\udcfe", "\udcfe\udcff"))
                    raise ValueError(
                        f"{self._name} is {'UTF-16, not UTF-8' if utf16 else f'not UTF-8 in line {self._read + 1}'}; "
                        f"save it as UTF-8, for instance with iconv -f {'utf-16' if utf16 else 'latin1'} -t utf-8"
                    ) from None
            self._window[self._read] = _Line(text, self._characters)
            self._characters += len(text)
            self._read += 1
        return self._window[i]

    def forget(self, i: int) -> None:
        """Drop line `i`, which is not read again."""
        self._window.pop(i, None)


class _Rows:
    """Find the rows between the lines.

    A line that begins within an open quote leaves it open, closes the row, or breaks the rules; this does not depend
    on where the quote was opened. A chain is a run of such lines, of which all but the last leave the quote open. It is
    kept, so that a row which starts inside it need not parse its lines again.
    """

    def __init__(self, lines: _Lines, start: int, separator: str) -> None:
        self.separator = separator
        self._lines = lines
        self._next = start
        self._chain = range(0)  # the lines of the known chain
        self._separators = 0  # how many the chain has
        self._outcome = ""  # "end", "bad", "eof", or "" while the quote is open

    def header(self) -> Row | BadRow:
        """Read the row at the current line as the header, whatever its number of fields. No line is forgotten."""
        row, self._next = self._row(self._next, None, None)
        return row

    def rest(self, width: int, begins_row: BeginsRow | None) -> Iterator[Row | BadRow]:
        """Yield the rows after the header; `width` is the number of fields of each."""
        self._chain = range(0)  # another separator's header may have changed its lines
        while (line := self._lines.get(self._next)) is not None:
            start = self._next
            if _is_blank(line.text, self.separator):
                self._advance(start + 1)
                continue
            row, after = self._row(start, width, begins_row)
            self._advance(after)
            yield row

    def _advance(self, i: int) -> None:
        for passed in range(self._next, i):
            self._lines.forget(passed)
        self._next = i

    def _row(self, start: int, width: int | None, begins_row: BeginsRow | None) -> tuple[Row | BadRow, int]:
        """Read the row at line `start`; returns it and the line where reading goes on."""
        fields, last, rule, why = self._fields(start, width, begins_row)
        if fields is None:
            return BadRow(start + 1, rule, why), start + 1
        return Row(start + 1, fields), last + 1

    def _fields(
        self, start: int, width: int | None, begins_row: BeginsRow | None
    ) -> tuple[list[str] | None, int, str, str]:
        """Return the fields of the row at line `start` and its last line, or None, the line, a rule and a reason."""
        line = self._line(start)
        if len(line.text) > ROW:
            return None, start, LENGTH, f"a line of more than {ROW:,} characters"
        fields, is_open, why = self._parse(line.text)
        if fields is None:
            return None, start, QUOTES, f"{why}; write a quote inside a quoted field twice"
        count, last = len(fields), start
        if is_open:
            end = self._close(start + 1, line.start)
            if isinstance(end, str):
                return None, start, QUOTES, f"a quote opens that is not closed {end}"
            count, last = count + end[1], end[0]
        if width is not None and count != width:
            return None, start, FIELDS, self._wrong_count(count, width)
        if is_open:
            inner = self._row_within(range(start + 1, last + 1), width, begins_row)
            if inner is not None:
                return None, start, QUOTES, f"a quote opens that is not closed before row {inner + 1} begins"
            fields = next(self._reader(self._line(i).text for i in range(start, last + 1)))
        if any("\0" in field for field in fields):
            return None, start, NUL, "it holds a NUL byte"
        return fields, last, "", ""

    def _line(self, i: int) -> _Line:
        line = self._lines.get(i)
        assert line is not None, "only lines that were there are asked for"
        return line

    def _wrong_count(self, count: int, width: int) -> str:
        found = f"{count} field{'s' * (count != 1)} where the header has {width}"
        return f"{found}; quote captions that contain {self.separator!r}" if count > width else found

    def _close(self, first: int, start: int) -> tuple[int, int] | str:
        """Find the line that ends the row whose quote is open at the start of line `first`.

        Returns that line and the number of separators from `first` to its end, or words that say where the quote should
        have been closed. `start` is the row's place in characters.
        """
        if first not in self._chain:
            self._chain, self._separators, self._outcome = range(first, first), 0, ""
        while not self._outcome:
            line = self._lines.get(self._chain.stop)
            if line is None:
                self._outcome = "eof"
                break
            if line.end - start > ROW:
                return f"within {ROW:,} characters"
            fields, is_open, _ = self._parse('"' + line.text)
            line.before = self._separators
            self._separators += len(fields) - 1 if fields is not None else 0
            self._chain = range(self._chain.start, self._chain.stop + 1)
            self._outcome = "bad" if fields is None else "" if is_open else "end"
        last = self._chain.stop - 1
        if self._outcome == "eof":
            return "before the end of the table"
        if self._outcome == "bad":
            return f"before line {last + 1}, which holds quotes of its own"
        return last, self._separators - self._line(first).before

    def _row_within(self, lines: range, width: int | None, begins_row: BeginsRow | None) -> int | None:
        """Return the first of the lines that is a row by itself, if any is."""
        if begins_row is None:
            return None
        for i in lines:
            fields, _, _ = self._parse(self._line(i).text)
            if fields is not None and len(fields) == width and begins_row(fields):
                return i
        return None

    def _parse(self, text: str) -> tuple[list[str] | None, bool, str]:
        """Parse one line: its fields, None where it breaks the rules; whether a quote stays open; and what is wrong."""
        is_open = False

        def lines() -> Iterator[str]:
            nonlocal is_open
            yield text
            is_open = True
            yield '"'

        try:
            return next(self._reader(lines()), []), is_open, ""
        except csv.Error as error:
            return None, is_open, str(error)

    def _reader(self, lines: Iterator[str]) -> Iterator[list[str]]:
        # A blank before a quote is read as none, so that the quote counts.
        blanks = self.separator != " "
        return csv.reader(lines, delimiter=self.separator, strict=True, skipinitialspace=blanks)


def _is_blank(text: str, separator: str) -> bool:
    return not text.strip("\r\n") or (text.isspace() and separator not in text)
