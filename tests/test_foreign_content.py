"""Name what a file is, by its first bytes."""

import bz2
import gzip
import lzma
from collections.abc import Callable

import pytest

from oner_fast.foreign_content import compression, is_lfs_pointer, web_page


@pytest.mark.parametrize(("pack", "name"), [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz")])
def test_compressed_content_is_named(pack: Callable[[bytes], bytes], name: str) -> None:
    found = compression(pack(b"content"))
    assert found is not None and found.name == name and found.command.startswith(name)
    assert compression(b"content") is None and compression(b"") is None


@pytest.mark.parametrize(
    "start", [b"<!DOCTYPE html>", b" \n<HTML lang=en>", b"\xef\xbb\xbf<html>", b"<!-- x --><html>"]
)
def test_pages_are_named(start: bytes) -> None:
    assert web_page(start) == "an HTML page"
    assert web_page(b"<?xml version='1.0'?>") == "an XML text"
    assert web_page(b"a < b") == web_page(b"") == ""


def test_pointers_are_told() -> None:
    assert is_lfs_pointer(b"version https://git-lfs.github.com/spec/v1\noid sha256:00")
    assert not is_lfs_pointer(b"version 2") and not is_lfs_pointer(b"")
