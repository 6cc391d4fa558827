"""Parse a page as a browser would, and say what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html.parser import HTMLParser

import pytest

VOID = {"meta", "br", "img", "link", "input", "hr"}
REFERENCES = {"src", "href", "xlink:href", "srcset", "poster", "action", "data"}


class Parsed(HTMLParser):
    """The elements of a page; `faults` lists tags that do not match and attributes that stand twice."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.faults: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        self.faults += [f"<{tag}> is not closed" for tag in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open an element."""
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if len({name for name, _ in attrs}) < len(attrs):
            self.faults.append(f"<{tag}> has an attribute twice")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Add an element of SVG that closes itself."""
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        """Close the element that was opened last."""
        if not self._open or self._open.pop() != tag:
            self.faults.append(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        """Keep the text."""
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        """List the attributes of every element of a tag."""
        return [attributes for name, attributes in self.elements if name == tag]


def _problems(text: str) -> Iterator[str]:
    page = Parsed(text)
    yield from page.faults
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    if len(set(ids)) < len(ids):
        yield "an id stands twice"
    for tag, attributes in page.elements:
        for name in REFERENCES & attributes.keys():
            target = attributes[name]
            if not target.startswith("#"):
                yield f"<{tag} {name}> refers to {target!r}"
            elif target[1:] not in ids:
                yield f"no element has the id {target!r}"
        if tag in ("script", "iframe", "object", "embed", "link", "base", "form"):
            yield f"<{tag}> stands in the page"
        if tag == "svg" and not (attributes.get("role") == "img" and attributes.get("aria-label")):
            yield "a picture has no words"
        if any(name.startswith("on") for name in attributes):
            yield f"<{tag}> runs a script"
    tables = len(page.all("table"))
    if not tables == len(page.all("caption")) == len(page.all("thead")):
        yield "a table has no caption or no head"
    if any("scope" not in attributes for attributes in page.all("th")):
        yield "a head of a table does not say what it names"
    if "url(" in text or "@import" in text:
        yield "a style loads something"
    if len(page.all("h1")) != 1 or page.all("html")[0].get("lang") != "en":
        yield "the page has no single heading, or no language"


@pytest.fixture
def problems() -> Callable[[str], list[str]]:
    """List what makes a page invalid, depend on other files, or hard to read without seeing it."""
    return lambda text: list(_problems(text))


@pytest.fixture
def parsed() -> Callable[[str], Parsed]:
    """Parse a page."""
    return Parsed
