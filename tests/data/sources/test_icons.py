import base64
import hashlib
import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

for package in ("resvg_py", "PIL", "webdataset", "rich"):
    pytest.importorskip(package, reason="needs the demo extra")

from oner_fast.data.dataset import PairDataset  # noqa: E402
from oner_fast.data.sources import icons, npm, npm_lock  # noqa: E402

RECT = '<path fill="{colour}" d="M{x} 2h4v8h-4z"/>'
EMOJI = [
    {"label": "thumbs up", "hexcode": "1F44D", "tags": ["good", "Yes"]},
    {"label": "aerial tramway", "hexcode": "1F6A1", "tags": ["cable"]},
    {"label": "flag: Albania", "hexcode": "1F1E6-1F1F1", "tags": ["AL"]},
    {"label": "red heart", "hexcode": "2764-FE0F", "tags": ["love"]},
]


def package(cache: Path, name: str, drawings: dict[str, dict[str, Any]], licence: str = "MIT", **more: Any) -> None:
    info = {"name": name.title(), "author": {"name": "Ann", "url": "https://example.org"}, "license": {"spdx": licence}}
    tar(
        cache / npm.tarball(f"@iconify-json/{name}", icons.SETS[name]),
        {
            "icons.json": {"prefix": name, "icons": drawings, "width": 16, "height": 12, **more.get("extra", {})},
            "info.json": info,
            "chars.json": more.get("chars", {}),
        },
    )


def tar(path: Path, files: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as out:
        for name, content in files.items():
            data = json.dumps(content).encode()
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(data)
            out.addfile(entry, io.BytesIO(data))


def body(x: int, colour: str = "#f00", **more: Any) -> dict[str, Any]:
    return {"body": RECT.format(x=x, colour=colour), **more}


def publish(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Take the tarballs in the cache as the published ones."""
    packages = {f"@iconify-json/{name}": release for name, release in icons.SETS.items()} | dict([icons.EMOJI_NAMES])
    paths = {f"{name}@{release}": cache / npm.tarball(name, release) for name, release in packages.items()}
    known = {name: npm.digest(path) for name, path in paths.items() if path.exists()}
    monkeypatch.setattr(npm_lock, "INTEGRITY", known)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "npm-cache"
    tar(
        folder / npm.tarball(*icons.EMOJI_NAMES),
        {"en/data.json": EMOJI, "en/shortcodes/joypixels.json": {"2764": ["heart", "love_it"]}},
    )
    package(
        folder,
        "noto",
        {
            "thumbs-up": body(1),
            "thumbs-up-dark-skin-tone": body(2),
            "thumbs-up-toned": body(3),
            "old": body(4, hidden=True),
            "strange-thing": body(5),
        },
        "Apache-2.0",
        chars={"1f44d": "thumbs-up", "1f44d-1f3ff": "thumbs-up-toned"},
        extra={"aliases": {"like-it": {"parent": "thumbs-up"}, "turned": {"parent": "thumbs-up", "hFlip": True}}},
    )
    package(folder, "fxemoji", {"aerialtramway": body(6), "loveit": body(7), "unreadablename": body(8)}, "Apache-2.0")
    package(folder, "flag", {"al-4x3": body(9), "es-ct-4x3": body(10), "gb-wls-1x1": body(11), "lang-en-4x3": body(1)})
    inboxes = {"inbox-2-flat": body(2, "currentColor"), "inbox-3": body(3, "#0f0")}
    package(folder, "streamline-color", inboxes, "CC-BY-4.0")
    publish(monkeypatch, folder)
    return folder


SETS = ("noto", "fxemoji", "flag", "streamline-color")


def test_icons_from_tarballs(tmp_path: Path, cache: Path) -> None:
    content = icons.build_icons(tmp_path / "icons", size=16, workers=1, sets=SETS)
    found = {}
    for split in content["splits"]:
        data = PairDataset(tmp_path / "icons", split)
        for i in range(len(data)):
            pair = data.read(i)
            found[pair.key] = (split == "style", pair.caption, pair.meta["licence"], pair.meta.get("tags"))
    assert found == {
        "noto-thumbs-up": (False, "thumbs up", "Apache-2.0", ["good", "yes", "like it"]),
        "noto-strange-thing": (False, "strange thing", "Apache-2.0", None),
        "fxemoji-aerialtramway": (True, "aerial tramway", "Apache-2.0", ["cable"]),
        "fxemoji-loveit": (True, "red heart", "Apache-2.0", ["love"]),
        "flag-al-4x3": (False, "flag albania", "MIT", None),
        "flag-gb-wls-1x1": (False, "flag wales", "MIT", None),
        "streamline-color-inbox-2-flat": (False, "inbox", "CC-BY-4.0", None),
        "streamline-color-inbox-3": (False, "inbox", "CC-BY-4.0", None),
    }
    assert {entry["author"] for entry in content["attribution"]} == {"Ann"}
    assert icons.build_icons(tmp_path / "icons", size=16, sets=SETS) == content


def test_a_set_with_another_licence_is_refused(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(cache, "noto", {"a": body(1)}, "CC-BY-NC-4.0")
    publish(monkeypatch, cache)
    with pytest.raises(ValueError, match="set noto is under CC-BY-NC-4.0"):
        icons.build_icons(tmp_path / "icons", size=16, workers=1, sets=SETS)


def test_unknown_sets_and_damaged_tarballs(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown set 'apple'; known: noto, "):
        icons.build_icons(tmp_path / "icons", sets=("apple",))
    path = cache / npm.tarball("@iconify-json/noto", icons.SETS["noto"])
    path.write_bytes(path.read_bytes()[:100])
    publish(monkeypatch, cache)
    with pytest.raises(npm.NpmError, match="noto.*is damaged.*remove it"):
        icons.build_icons(tmp_path / "icons", size=16, workers=1, sets=SETS)


def sri(data: bytes) -> str:
    return "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()


EMPTY, FETCHED = sri(b""), sri(b"fetched\n")


def test_npm_is_needed_only_for_what_is_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(npm.NpmError, match=r"2 packages.*npm, which is not on the PATH.*nodejs.org.*pictograms"):
        npm.fetch({"a": "1", "@b/c": "2"}, tmp_path / "cache", {"a@1": EMPTY, "@b/c@2": EMPTY})
    for name in ("a-1.tgz", "b-c-2.tgz"):
        (tmp_path / "cache").mkdir(exist_ok=True)
        (tmp_path / "cache" / name).write_bytes(b"")
    assert npm.fetch({"@b/c": "2"}, tmp_path / "cache", {"@b/c@2": EMPTY}) == {"@b/c": tmp_path / "cache" / "b-c-2.tgz"}


def test_npm_fetches_and_its_failure_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    script = tools / "npm"
    script.write_text(
        "#!/bin/sh\n"
        'case "$2" in gone@1) echo "npm error 404 Not Found - gone" >&2; exit 1;; esac\n'
        'while [ $# -gt 1 ]; do shift; done; echo fetched > "$1/good-1.tgz"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    cache = tmp_path / "cache"
    known = {"good@1": FETCHED, "gone@1": FETCHED}
    assert npm.fetch({"good": "1"}, cache, known)["good"].read_text() == "fetched\n"
    with pytest.raises(npm.NpmError, match="could not fetch gone@1: 404 Not Found"):
        npm.fetch({"good": "1", "gone": "1"}, cache, known)
    assert [path.name for path in cache.iterdir()] == ["good-1.tgz"]
    # a tarball that was changed in the cache is fetched again
    (cache / "good-1.tgz").write_text("changed\n")
    assert npm.fetch({"good": "1"}, cache, known)["good"].read_text() == "fetched\n"
    # what npm fetches is used only where it is what was published
    (cache / "good-1.tgz").unlink()
    with pytest.raises(
        npm.NpmError, match=f"fetched good@1 with the integrity {re.escape(FETCHED)}, and .* was published; it is no"
    ):
        npm.fetch({"good": "1"}, cache, {"good@1": EMPTY})
    with pytest.raises(npm.NpmError, match="no integrity is known of good@2"):
        npm.fetch({"good": "2"}, cache, known)
    assert not list(cache.iterdir())


def test_every_set_is_named_with_a_fixed_version() -> None:
    assert icons.STYLE in icons.SETS and {"game-icons", *icons.EMOJI_SETS, *icons.FLAG_SETS} <= icons.SETS.keys()
    assert all(version.count(".") == 2 for version in icons.SETS.values())
    wanted = {f"@iconify-json/{name}@{release}" for name, release in icons.SETS.items()} | {"@".join(icons.EMOJI_NAMES)}
    assert npm_lock.INTEGRITY.keys() == wanted
    assert all(len(base64.b64decode(one.removeprefix("sha512-"), validate=True)) == 64
               for one in npm_lock.INTEGRITY.values())  # fmt: skip
    assert not [name for name in icons.SETS if "apple" in name or "facebook" in name]
