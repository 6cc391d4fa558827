from pathlib import Path

import pytest

for package in ("resvg_py", "PIL", "webdataset", "rich"):
    pytest.importorskip(package, reason="needs the demo extra")

from oner_fast.data.dataset import PairDataset  # noqa: E402
from oner_fast.data.sources import drawings  # noqa: E402
from oner_fast.data.sources.building import Build  # noqa: E402
from oner_fast.data.sources.concepts import split_of  # noqa: E402
from oner_fast.data.sources.drawings import Drawing, IconSet, build_drawings  # noqa: E402

ONE = IconSet("one", "Set One", "Ann", "MIT", "https://example.org")
TWO = IconSet("two", "Set Two", "Bob", "CC-BY-4.0", "https://example.org")


def square(x: int, colour: str = "#000") -> str:
    path = f'<path fill="{colour}" d="M{x} {x}h4v4h-4z"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">{path}</svg>'


DRAWINGS = [
    Drawing(ONE, "cat", square(1), "cat", ("pet",)),
    Drawing(ONE, "kitten", square(1), "kitten"),
    Drawing(TWO, "puss", square(1), "puss"),
    Drawing(ONE, "nothing", square(1, "#fff"), "nothing"),
    Drawing(ONE, "broken", "<svg", "broken"),
    Drawing(ONE, "dog.v2", square(5), "dog"),
    Drawing(TWO, "dog", square(5, "#00f"), "dog"),
]


def test_blank_equal_and_broken_drawings_are_dropped_and_counted(tmp_path: Path) -> None:
    content = build_drawings(Build(tmp_path, "test", {}), DRAWINGS, 16, 1)
    dropped = {"blank": 1, "equal pixels": 2, "not drawable": 1, drawings.NEAR: 0}
    assert content["dropped"] | {"failed": 0} == dropped | {"failed": 0}
    assert content["dropped"]["failed"][0].startswith("one broken: ")
    lines = (tmp_path / "left-out.txt").read_text().splitlines()
    assert lines[:3] == [
        "equal pixels: one kitten, as one cat",
        "equal pixels: two puss, as one cat",
        "blank: one nothing",
    ]
    assert len(lines) == 4 and lines[3].startswith("not drawable: one broken: ")
    assert [(entry["set"], entry["samples"]) for entry in content["attribution"]] == [("one", 2), ("two", 1)]
    data = PairDataset(tmp_path, "train")
    metas = {data.read(i).key: data.read(i).meta for i in range(len(data))}
    assert metas.keys() == {"one-cat", "one-dog-v2", "two-dog"}
    assert metas["one-cat"]["also"] == ["kitten", "puss"] and metas["one-cat"]["tags"] == ["pet"]
    assert metas["two-dog"]["licence"] == "CC-BY-4.0" and metas["two-dog"]["author"] == "Bob"


def test_a_style_set_is_a_split_of_its_own(tmp_path: Path) -> None:
    content = build_drawings(Build(tmp_path, "test", {}), DRAWINGS, 16, 1, frozenset({"two"}))
    style = PairDataset(tmp_path, "style")
    assert content["splits"]["style"]["samples"] == len(style) == 1
    assert style.read(0).meta["set"] == "two"


def test_nothing_drawable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none of 1 drawings gave an image: one broken"):
        build_drawings(Build(tmp_path, "test", {}), [DRAWINGS[4]], 16, 1)


def test_a_drawing_nearly_equal_to_a_validation_drawing_is_not_trained_on(tmp_path: Path) -> None:
    names = [f"thing {letter}{other}" for letter in "abcdefgh" for other in "xyz"]
    val = next(name for name in names if split_of(name) == "val")
    first, second, third = [name for name in names if split_of(name) == "train"][:3]
    shown = {val: (4, "#000"), first: (4, "#010203"), second: (4, "#0a0"), third: (9, "#000")}
    made = [Drawing(TWO if name == third else ONE, name, square(*look), name) for name, look in shown.items()]
    content = build_drawings(Build(tmp_path / "a", "test", {}), made, 32, 1)
    assert content["dropped"][drawings.NEAR] == 1  # another colour or place is another drawing
    assert {PairDataset(tmp_path / "a", "train").caption(i) for i in range(2)} == {second, third}
    assert (tmp_path / "a" / "left-out.txt").read_text() == f"{drawings.NEAR}: one {first}, as one {val}\n"
    assert sum(entry["samples"] for entry in content["attribution"]) == 3
    # A style set is held out too.
    made.append(Drawing(TWO, "copy", square(9, "#030201"), "copy"))
    styled = build_drawings(
        Build(tmp_path / "b", "test", {}),
        [*made[:3], Drawing(ONE, "t", square(9), third), made[4]],
        32,
        1,
        frozenset({"two"}),
    )
    assert styled["dropped"][drawings.NEAR] == 2 and styled["splits"]["style"]["samples"] == 1
