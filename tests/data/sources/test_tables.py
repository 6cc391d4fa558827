import csv
import io
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oner_fast.data.sources import tables
from oner_fast.data.sources.tables import FIELDS, LENGTH, NUL, QUOTES, ROW, BadRow, Row, separator_of, table_of

HEADER = "filepath,title\n"


def is_row(fields: list[str]) -> bool:
    return fields[0].endswith(".jpg")


def read(text: str, header: str = HEADER, separator: str | None = ",") -> tuple[dict[int, list[str]], dict[int, str]]:
    """Return the rows and the rules of the bad rows, by line."""
    rows = list(table_of((header + text).encode(), separator=separator).rows(is_row))
    good = {row.line: row.fields for row in rows if isinstance(row, Row)}
    return good, {row.line: row.rule for row in rows if isinstance(row, BadRow)}


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ("0.jpg,a cat, black\n1.jpg,dog\n", {3: ["1.jpg", "dog"]}, {2: FIELDS}),
        ("0.jpg\n1.jpg,dog\n", {3: ["1.jpg", "dog"]}, {2: FIELDS}),
        ('0.jpg,"a \\"big\\" cat, black"\n1.jpg,dog\n', {3: ["1.jpg", "dog"]}, {2: QUOTES}),
        ("0.jpg,'a cat, black'\n1.jpg,dog\n", {3: ["1.jpg", "dog"]}, {2: FIELDS}),
        ('0.jpg, "a cat, black"\n', {2: ["0.jpg", "a cat, black"]}, {}),
        ('0.jpg,a 10" pizza\n', {2: ["0.jpg", 'a 10" pizza']}, {}),
        ('0.jpg,"a ""big"" cat"\n', {2: ["0.jpg", 'a "big" cat']}, {}),
        ('0.jpg,"a cat\nblack, white\n\nand ""old"""\n1.jpg,x\n',
         {2: ["0.jpg", 'a cat\nblack, white\n\nand "old"'], 6: ["1.jpg", "x"]}, {}),
        # an unclosed quote costs no other row, whatever closes it
        ('0.jpg,"a cat\n1.jpg,dog\n2.jpg,fox\n', {3: ["1.jpg", "dog"], 4: ["2.jpg", "fox"]}, {2: QUOTES}),
        ('0.jpg,"a cat\n1.jpg,"dog"\n2.jpg,fox\n', {3: ["1.jpg", "dog"], 4: ["2.jpg", "fox"]}, {2: QUOTES}),
        ('0.jpg,"a cat\n1.jpg,dog\n2.jpg,fox"\n', {3: ["1.jpg", "dog"], 4: ["2.jpg", 'fox"']}, {2: QUOTES}),
        ('0.jpg,"\n1.jpg,"\n', {}, {2: QUOTES, 3: QUOTES}),
        ('"0.jpg,a cat\n"1.jpg","dog"\n', {3: ["1.jpg", "dog"]}, {2: QUOTES}),
        ('0.jpg,"a cat", black\n1.jpg,"x","y\nz"\n2.jpg,q\n', {5: ["2.jpg", "q"]}, {2: FIELDS, 3: FIELDS, 4: FIELDS}),
        ("0.jpg,a\0b\n1.jpg,x\n", {3: ["1.jpg", "x"]}, {2: NUL}),
        (f"0.jpg,{'a' * ROW}\n1.jpg,x\n", {3: ["1.jpg", "x"]}, {2: LENGTH}),
        ("\n0.jpg,x\n   \n\r\n1.jpg,y", {3: ["0.jpg", "x"], 6: ["1.jpg", "y"]}, {}),
        ("0.jpg,x\r\n1.jpg,y\r2.jpg,z", {2: ["0.jpg", "x"], 3: ["1.jpg", "y"], 4: ["2.jpg", "z"]}, {}),
        ("0.jpg,a\u2028b\x0bc\x85d\n", {2: ["0.jpg", "a\u2028b\x0bc\x85d"]}, {}),
    ],
)  # fmt: skip
def test_a_row_is_whole_or_named(text: str, good: dict[int, list[str]], bad: dict[int, str]) -> None:
    assert read(text) == (good, bad)


def test_reasons_say_what_to_do() -> None:
    rows = list(table_of((HEADER + '0.jpg,a, b\n1.jpg\n2.jpg,"x" y\n3.jpg,"x\n').encode()).rows())
    assert [row.why for row in rows if isinstance(row, BadRow)] == [
        "3 fields where the header has 2; quote captions that contain ','",
        "1 field where the header has 2",
        "',' expected after '\"'; write a quote inside a quoted field twice",
        "a quote opens that is not closed before the end of the table",
    ]


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12) | st.text('",\n\r;\t x', max_size=8)


@given(
    st.lists(st.lists(CELLS, min_size=2, max_size=2), max_size=8),
    st.sampled_from(",;\t|"),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.booleans(),
)
def test_what_csv_writes_is_read_back(rows: list[list[str]], separator: str, quoting: int, bom: bool) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=separator, quoting=quoting)  # type: ignore[arg-type]
    writer.writerow(["filepath", "title"])
    writer.writerows(rows)
    data = file.getvalue().encode("utf-8-sig" if bom else "utf-8")
    table = table_of(data, wanted=("filepath", "title"))
    assert (table.header, table.separator) == (["filepath", "title"], separator)
    found = list(table.rows())
    assert all(isinstance(row, Row) for row in found)
    # a blank before an unquoted field is read as none
    expected = rows if quoting == csv.QUOTE_ALL else [[cell.lstrip(" ") for cell in row] for row in rows]
    plain = [row.fields if quoting == csv.QUOTE_ALL else [cell.lstrip(" ") for cell in row.fields] for row in found]  # type: ignore[union-attr]
    assert plain == expected


@given(st.text(st.sampled_from('",\n\r\0 ax.jpg'), max_size=200))
def test_any_text_is_read_and_every_line_is_accounted_for(text: str) -> None:
    lines = io.StringIO(text, newline="").readlines()
    seen = set()
    for row in table_of((HEADER + text).encode()).rows(is_row):
        count = 1 if isinstance(row, BadRow) else 1 + len(io.StringIO("\n".join(row.fields), newline="").readlines())
        seen |= set(range(row.line, row.line + count))
    assert {i + 2 for i, line in enumerate(lines) if line.strip("\r\n ")} <= seen


@pytest.mark.parametrize("line", ['x","z\n', '0.jpg,"a cat\n', '0.jpg,a "" x,"\n', '0,"""\n', '"\n', '",\n', '0,"\r'])
def test_the_time_grows_with_the_table_alone(line: str) -> None:
    start = time.process_time()
    count = sum(1 for _ in table_of((HEADER + line * 50_000).encode()).rows(is_row))
    assert count >= 24_000 and time.process_time() - start < 10


def test_a_caption_over_many_lines_is_whole_up_to_the_limit() -> None:
    caption = "\n".join(["word " * 20] * 600)
    good, bad = read(f'0.jpg,"{caption}"\n1.jpg,x\n')
    assert good[2] == ["0.jpg", caption] and len(good) == 2 and not bad
    caption = "\n".join(["word"] * (ROW // 5))
    good, bad = read(f'0.jpg,"{caption}"\n1.jpg,x\n')
    assert ["1.jpg", "x"] in good.values() and bad[2] == QUOTES


@pytest.mark.parametrize(
    ("header", "names", "separator"),
    [
        ("filepath,title\n", ["filepath", "title"], ","),
        ("filepath\ttitle, long\ttitle\n", ["filepath", "title, long", "title"], "\t"),
        ("a,b;filepath;title\n", ["a,b", "filepath", "title"], ";"),
        (" filepath |title \r\n", ["filepath", "title"], "|"),
        ("\n\nfilepath,title\n", ["filepath", "title"], ","),
        ('"filepath","title"\n', ["filepath", "title"], ","),
        ("path;text;more\n", ["path", "text", "more"], ";"),
    ],
)
def test_the_separator_is_found_from_the_header(header: str, names: list[str], separator: str) -> None:
    table = table_of(header.encode(), wanted=("filepath", "title"))
    assert (table.header, table.separator) == (names, separator)
    assert list(table.rows()) == []


def test_headers_and_encodings_that_cannot_be_read() -> None:
    for data in (b"", b"\n\r\n  \n"):
        with pytest.raises(ValueError, match="pairs.csv has no header line"):
            table_of(data, "pairs.csv")
    with pytest.raises(ValueError, match="the header of pairs.csv cannot be read: a quote opens"):
        table_of(b'filepath,"title\n0.jpg,x\n', "pairs.csv")
    with pytest.raises(ValueError, match="pairs.csv is UTF-16, not UTF-8;"):
        table_of("filepath,title\n".encode("utf-16"), "pairs.csv")
    with pytest.raises(ValueError, match="pairs.csv is not UTF-8 in line 3; .*iconv"):
        list(table_of(b"filepath,title\n0.jpg,x\n1.jpg,caf\xe9\n", "pairs.csv").rows())


def test_separators_have_names() -> None:
    names = {"tab": "\t", "\\t": "\t", "\t": "\t", "Comma": ",", "semicolon": ";", "bar": "|", "space": " ", ":": ":"}
    assert {name: separator_of(name) for name in names} == names
    for wrong in ("", "ab", '"', "\n", "\0", "tabs"):
        with pytest.raises(
            ValueError, match="--csv-separator .* is not a separator; give one character, or comma, tab"
        ):
            separator_of(wrong)


def test_a_table_is_read_line_by_line() -> None:
    taken = 0

    def lines() -> Iterator[str]:
        nonlocal taken
        yield HEADER
        for i in range(1000):
            taken = i
            yield f"{i}.jpg,x\n"

    rows = tables.Table(lines(), "endless").rows()
    assert next(rows) == Row(2, ["0.jpg", "x"]) and taken < 3
