import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

for package in ("PIL", "webdataset", "rich", "numpy"):
    pytest.importorskip(package, reason="needs the train extra")

from PIL import Image  # noqa: E402

from oner_fast.data.dataset import PairDataset  # noqa: E402
from oner_fast.data.sources import pair_shards  # noqa: E402
from oner_fast.data.sources.concepts import concept, percentile  # noqa: E402
from oner_fast.data.sources.pairs import build_pairs  # noqa: E402

COLOURS = ("red", "green", "blue", "gold", "grey", "pink", "cyan", "brown", "black", "white")
THINGS = ("boat", "house", "lamp", "bird", "tower", "key")
CAPTIONS = [f"a {colour} {thing}" for colour in COLOURS for thing in THINGS]


def draw(path: Path, number: int, size: tuple[int, int] = (40, 30)) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (number, 255 - number, 77)).save(path)
    return path.read_bytes()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filepath", "title"])
        for i, caption in enumerate(CAPTIONS):
            name = f"img/{i}.{('jpg', 'png', 'webp')[i % 3]}"
            draw(tmp_path / name, i)
            writer.writerow([name, caption])
    return tmp_path / "pairs.csv"


def read(folder: Path, content: dict[str, Any]) -> dict[str, list[Any]]:
    found = {}
    for split in content["splits"]:
        data = PairDataset(folder, split)
        found[split] = [data.read(i) for i in range(len(data))]
    return found


def shas(content: dict[str, Any]) -> list[tuple[str, str]]:
    return [(shard["file"], shard["sha256"]) for split in content["splits"].values() for shard in split["shards"]]


def test_a_csv_keeps_image_bytes_and_is_split_by_concept(table: Path, tmp_path: Path) -> None:
    content = build_pairs(table, tmp_path / "out", licence="CC0-1.0", author="Ann", workers=1)
    found = read(tmp_path / "out", content)
    assert sorted(pair.caption for split in found.values() for pair in split) == sorted(CAPTIONS)
    for split, members in found.items():
        for pair in members:
            assert pair.image == (tmp_path / pair.meta["name"]).read_bytes()
            assert (percentile(concept(pair.caption)) < 8) == (split == "val")
            assert (pair.meta["licence"], pair.meta["author"]) == ("CC0-1.0", "Ann")
    assert found["val"] and content["splits"]["val"]["captions"] == len(found["val"])
    assert build_pairs(table, tmp_path / "out", licence="CC0-1.0", author="Ann") == content
    with pytest.raises(ValueError, match="resize None there, 16 asked for"):
        build_pairs(table, tmp_path / "out", licence="CC0-1.0", author="Ann", resize=16)


def test_columns_and_separator_can_be_named(tmp_path: Path) -> None:
    draw(tmp_path / "pictures" / "a.png", 1)
    for name, line in (("t.tsv", "{}\t{}\n"), ("s.csv", "{};{}\n")):
        (tmp_path / name).write_text("\ufeff" + line.format("image", "text, long") + line.format("a.png", "red,  old"))
        content = build_pairs(
            tmp_path / name,
            tmp_path / f"out-{name}",
            image_key="image",
            caption_key="text, long",
            separator=";" if name == "s.csv" else None,
            root=tmp_path / "pictures",
            validation_percent=0,
        )
        assert [pair.caption for pair in read(tmp_path / f"out-{name}", content)["train"]] == ["red, old"]


def test_a_folder_of_images_with_text_files(tmp_path: Path) -> None:
    for i, name in enumerate(("a.jpg", "sub/b.png", "c.webp", "alone.png", "empty.png")):
        draw(tmp_path / "in" / name, i)
    for name, text in (("a", "red\nboat"), ("sub/b", "old house"), ("c", "tall tower"), ("empty", " ")):
        (tmp_path / "in" / f"{name}.txt").write_text(text)
    content = build_pairs(tmp_path / "in", tmp_path / "out", validation_percent=0)
    captions = {pair.meta["name"]: pair.caption for pair in read(tmp_path / "out", content)["train"]}
    assert captions == {"a.jpg": "red boat", "sub/b.png": "old house", "c.webp": "tall tower"}
    assert content["dropped"]["named"] == ["alone.png: no alone.txt beside it", "empty.png: its caption is empty"]


def test_corrupt_and_missing_images_are_counted_and_named(table: Path, tmp_path: Path) -> None:
    cut = tmp_path / "img" / "1.png"
    cut.write_bytes(cut.read_bytes()[:-30])
    (tmp_path / "img" / "2.webp").write_text("no picture")
    (tmp_path / "img" / "3.jpg").unlink()
    with table.open("a") as file:
        file.write("img/4.png,\n,caption\n")
    content = build_pairs(table, tmp_path / "out", workers=1)
    dropped = content["dropped"]
    assert dropped["unreadable pictures"] == 3 and dropped["rows without a caption or picture"] == 2
    named = {line.split(":")[0] for line in dropped["named"]}
    assert named == {"img/1.png", "img/2.webp", "img/3.jpg", "row 62", "row 63"}
    assert "img/2.webp: not a readable image (of no known format)" in dropped["named"]  # no address
    assert sum(split["samples"] for split in content["splits"].values()) == len(CAPTIONS) - 3


def test_resize_shrinks_the_shorter_side_only_where_it_is_longer(tmp_path: Path) -> None:
    for name in ("big.jpg", "big.png"):
        draw(tmp_path / "in" / name, 1, (100, 50))
        (tmp_path / "in" / name).with_suffix(".txt").write_text("x")
    small = draw(tmp_path / "in" / "small.png", 2, (90, 20))
    (tmp_path / "in" / "small.txt").write_text("y")
    (tmp_path / "in" / "big.txt").write_text("big thing")
    content = build_pairs(tmp_path / "in", tmp_path / "out", resize=20, validation_percent=0)
    found = {pair.meta["name"]: pair.image for pair in read(tmp_path / "out", content)["train"]}
    assert found["small.png"] == small
    for name, kind in (("big.jpg", "JPEG"), ("big.png", "PNG")):
        image = Image.open(io.BytesIO(found[name]))
        assert (image.size, image.format) == ((40, 20), kind)


def test_a_validation_image_is_never_trained_on(tmp_path: Path) -> None:
    val = next(caption for caption in CAPTIONS if percentile(concept(caption)) < 8)
    train = next(caption for caption in CAPTIONS if percentile(concept(caption)) >= 8)
    draw(tmp_path / "a.png", 1)
    draw(tmp_path / "b.png", 2)
    (tmp_path / "p.csv").write_text(f"filepath,title\na.png,{val}\na.png,{train}\nb.png,{train}\n")
    content = build_pairs(tmp_path / "p.csv", tmp_path / "out")
    found = read(tmp_path / "out", content)
    names = {split: [pair.meta["name"] for pair in members] for split, members in found.items()}
    assert names == {"train": ["b.png"], "val": ["a.png"]}
    assert content["dropped"]["training captions of validation pictures"] == 1


def test_same_bytes_for_any_workers_and_after_an_interruption(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_shards, "SHARD", 16)
    whole = build_pairs(table, tmp_path / "one", workers=1)
    assert len(whole["splits"]["train"]["shards"]) >= 3
    assert shas(build_pairs(table, tmp_path / "two", workers=2)) == shas(whole)
    count = 0
    real = pair_shards._read_image

    def interrupted(path: Path, resize: int | None) -> tuple[bytes, str]:
        nonlocal count
        count += 1
        if count == 20:
            raise KeyboardInterrupt
        return real(path, resize)

    monkeypatch.setattr(pair_shards, "_read_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_pairs(table, tmp_path / "cut", workers=1)
    assert [path.name for path in (tmp_path / "cut").glob("*.tar*")] == ["train-000000.tar"]
    assert shas(build_pairs(table, tmp_path / "cut", workers=1)) == shas(whole)
    assert count == 20 + len(CAPTIONS) - 16


def test_splitting_by_caption(table: Path, tmp_path: Path) -> None:
    content = build_pairs(table, tmp_path / "out", split_by="caption", validation_percent=20)
    for split, members in read(tmp_path / "out", content).items():
        assert all((percentile(pair.caption) < 20) == (split == "val") for pair in members)


def test_bad_input_is_named(table: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no column 'caption' in .*; it has filepath, title"):
        build_pairs(table, tmp_path / "out", caption_key="caption")
    with pytest.raises(ValueError, match="no such file or folder"):
        build_pairs(tmp_path / "absent.csv", tmp_path / "out")
    with pytest.raises(ValueError, match="validation_percent is 95"):
        build_pairs(table, tmp_path / "out", validation_percent=95)
    with pytest.raises(ValueError, match="resize is 2"):
        build_pairs(table, tmp_path / "out", resize=2)
    (tmp_path / "latin.csv").write_bytes("filepath,title\na.png,caf\u00e9\n".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.csv is not UTF-8"):
        build_pairs(tmp_path / "latin.csv", tmp_path / "out")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no pairs in .*none"):
        build_pairs(tmp_path / "none", tmp_path / "out")
    (tmp_path / "lost.csv").write_text("filepath,title\nlost.png,red boat\n")
    with pytest.raises(ValueError, match="no image of .* can be read: lost.png: No such file"):
        build_pairs(tmp_path / "lost.csv", tmp_path / "lost")


def test_dataset_json_is_complete(table: Path, tmp_path: Path) -> None:
    build_pairs(table, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert content["name"] == "pairs" and content["format"] == 1 and content["image_size"] is None
    assert content["attribution"][0]["samples"] == len(CAPTIONS)
    assert not (tmp_path / "out" / ".build").exists()
