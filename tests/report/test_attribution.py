from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Environment

from oner_fast.benchmarks.page.content import Page
from oner_fast.benchmarks.page.render import render
from oner_fast.report import page
from oner_fast.report.attribution import credits_of, credits_of_data, web_address

HOSTILE = [
    "javascript:alert(1)", "JaVaScRiPt:alert(1)", "java\tscript:alert(1)", "java\nscript:alert(1)", "\x01javascript:a",
    " javascript:alert(1)", "javascript&colon;alert(1)", "&#106;avascript:alert(1)", "data:text/html,<b>x</b>",
    "vbscript:msgbox(1)", "file:///etc/passwd", "//example.org/x", "/x", "#x", "", "https:", "https://", "http:///path",
    "https:/example.org", "https:\\\\example.org", "https://exa\tmple.org", "https://example.org/a b",
    "ht\x00tp://a.org",
    "https://[half", "blob:https://example.org/x", "view-source:https://example.org", "feed:https://example.org",
    "http\u200bs://example.org", "https://example.org/\u0085", None, 7, ["https://example.org"], {"a": "b"},
    "https://example.org/\u202etxt", "https://example.org@evil.example",
]  # fmt: skip


@pytest.mark.parametrize("address", HOSTILE)
def test_only_web_addresses_become_links(address: Any) -> None:
    assert web_address(address) is None
    (credit,) = credits_of({"attribution": [{"url": address, "title": "<b>T</b>", "licence": ["MIT"], "samples": "x"}]})
    assert credit == {
        "title": "<b>T</b>", "author": "unknown", "licence": "unknown", "samples": 0, "url": None, "licence_page": None,
    }  # fmt: skip


@pytest.mark.parametrize("address", ["https://example.org", "HTTP://example.org/a?b=c#d", "https://u.example:8443/é"])
def test_web_addresses_stay(address: str) -> None:
    assert web_address(address) == address


@pytest.mark.parametrize("listed", [None, 3, "x", {}, [], [None, 3, "x", []]])
def test_other_attributions_are_left_out(listed: Any) -> None:
    assert credits_of({"attribution": listed}) == []


class Policies(HTMLParser):
    """Collect each Content-Security-Policy, and the tags that stand before the first."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.before: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if values.get("http-equiv") == "Content-Security-Policy":
            self.found.append(values.get("content") or "")
        elif not self.found:
            self.before.append(tag)


def allowed(policy: str) -> dict[str, str]:
    return {name: rest for name, _, rest in (part.strip().partition(" ") for part in policy.split(";"))}


@pytest.mark.parametrize("kind", ["report", "benchmarks"])
def test_the_policy_allows_no_script(kind: str) -> None:
    if kind == "report":
        template = Path(page.__file__).parent / "template.html.j2"
        head = template.read_text(encoding="utf-8").partition("<!doctype html>")[2]
        text = Environment(autoescape=True).from_string(head.partition("<title>")[0]).render(policy=page.POLICY)
    else:
        text = render(Page("A <script>", ["<script>"]))
    parser = Policies()
    parser.feed(text)
    assert len(parser.found) == 1 and set(parser.before) <= {"html", "head", "meta"}
    directives = allowed(parser.found[0])
    pictures = {"img-src": "data:"} if kind == "report" else {}  # those of a benchmark are drawn in the page itself
    assert directives == pictures | {
        "default-src": "'none'", "style-src": "'unsafe-inline'", "base-uri": "'none'", "form-action": "'none'",
    }  # fmt: skip
    assert "<script" not in text


def test_tars_and_several_sources_are_credited(tmp_path: Path) -> None:
    for name, title in (("a", "One"), ("b", "Two"), ("c", "One")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "val-000000.tar").touch()
        (tmp_path / name / "dataset.json").write_text(json.dumps({"attribution": [{"title": title}]}))
    for data in (
        f"{tmp_path}/a/val-000000.tar",
        f"{tmp_path}/a/val-*.tar",
        f"{tmp_path}/a",
        f"{tmp_path}/a::{tmp_path}/c",
    ):
        assert [one["title"] for one in credits_of_data(data)] == ["One"]
    assert [one["title"] for one in credits_of_data(f"{tmp_path}/b/val-{{0..3}}.tar::{tmp_path}/a")] == ["Two", "One"]
    assert credits_of_data(f"{tmp_path}/none::x.tar") == []
