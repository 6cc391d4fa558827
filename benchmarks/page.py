"""A Markdown report as one HTML page that needs nothing beside it: styles and images are inside.

Only the Markdown that `oner_fast.benchmarks.report` writes is understood: headings, tables, lists, paragraphs, images,
`code` and **bold**.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 90rem; padding: 1rem; }
table { border-collapse: collapse; display: block; margin: 1rem 0; max-width: 100%; overflow-x: auto; }
th, td { border: 1px solid #8886; padding: .25rem .6rem; text-align: left; }
th { background: #8882; }
img { background: #fff; display: block; height: auto; margin: 1rem 0; max-width: 100%; }
:root { color-scheme: light dark; }
"""
# The page holds no script, so none may run; its images and styles are inside.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_IMAGE = re.compile(r"!\[(.*)\]\((.*)\)")


def page(markdown: str, folder: Path) -> str:
    """Return the HTML page of a report; its images are read from `folder`.

    Raises OSError where an image that the report shows cannot be read.
    """
    lines = markdown.splitlines()
    title = next((line.removeprefix("# ") for line in lines if line.startswith("# ")), "Report")
    body = "\n".join(_blocks(lines, folder))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n<title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _blocks(lines: list[str], folder: Path) -> Iterator[str]:
    for kind, group in groupby(lines, _kind):
        block = list(group)
        if kind == "heading":
            for line in block:
                marks, text = line.split(" ", 1)
                yield f"<h{len(marks)}>{_inline(text)}</h{len(marks)}>"
        elif kind == "table":
            yield _table(block)
        elif kind == "list":
            yield "\n".join(["<ul>", *(f"<li>{_inline(line[2:])}</li>" for line in block), "</ul>"])
        elif kind == "image":
            yield from (_image(line, folder) for line in block)
        elif kind == "paragraph":
            yield f"<p>{_inline(' '.join(block))}</p>"


def _kind(line: str) -> str:
    if re.match(r"#+ ", line):
        return "heading"
    if line.startswith("|"):
        return "table"
    if line.startswith("* "):
        return "list"
    if _IMAGE.fullmatch(line):
        return "image"
    return "paragraph" if line else "blank"


def _table(block: list[str]) -> str:
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block)
    lines = ["<table>", f"<tr>{''.join(f'<th>{_inline(cell)}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])


def _image(line: str, folder: Path) -> str:
    found = _IMAGE.fullmatch(line)
    assert found is not None
    name, file = found.groups()
    data = base64.b64encode((folder / file).read_bytes()).decode()
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'


def _inline(text: str) -> str:
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
