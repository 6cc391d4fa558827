import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for package in ("PIL", "webdataset", "rich", "numpy"):
    pytest.importorskip(package, reason="needs the train extra")

from PIL import Image  # noqa: E402

from oner_fast.data.dataset import CorruptSample, PairDataset  # noqa: E402
from oner_fast.data.images import decode  # noqa: E402
from oner_fast.data.sources import pair_shards  # noqa: E402
from oner_fast.data.sources.cli import main  # noqa: E402
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
    assert dropped["unreadable pictures"] == 3 and dropped["pictures without a caption"] == 1
    assert dropped["captions without a picture"] == 1
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


def resized_kinds() -> dict[str, tuple[Image.Image, dict[str, Any]]]:
    down, across = np.mgrid[:48, :64]
    colour = Image.fromarray(np.stack([across * 4, 255 - across * 4, down * 5], 2).astype(np.uint8))
    kinds: dict[str, tuple[Image.Image, dict[str, Any]]] = {}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for suffix in ("jpg", "webp", "png", "tif", "avif"):
            kinds[f"turned{orientation}.{suffix}"] = (colour, {"exif": exif})
    alpha = colour.convert("RGBA")
    alpha.putalpha(colour.convert("L"))
    return kinds | {
        "grey16.png": (Image.fromarray((across * 1000).astype(np.uint16)), {}),
        "grey16.tif": (Image.fromarray((across * 1000).astype(np.uint16)), {}),
        "grey16.pgm": (Image.fromarray((across * 1000).astype(np.uint16)), {}),
        "float.tif": (Image.fromarray((across / 64).astype(np.float32)), {}),
        "cmyk.jpg": (colour.convert("CMYK"), {}),
        "grey.jpg": (colour.convert("L"), {}),
        "bits.png": (colour.convert("1"), {}),
        "alpha.png": (alpha, {}),
        "alpha.webp": (alpha, {}),
        "grey alpha.png": (alpha.convert("LA"), {}),
        "colour key.png": (Image.new("RGB", (64, 48), (200, 30, 30)), {"transparency": (200, 30, 30)}),
        "palette.gif": (colour.quantize(64), {"transparency": 1}),
        "flat.bmp": (colour, {}),
        "flat.ppm": (colour, {}),
    }


def test_resize_stores_what_the_loader_shows_only_smaller(tmp_path: Path) -> None:
    kinds = resized_kinds()
    for name, (image, options) in kinds.items():
        image.save(tmp_path / name, **options)
    (tmp_path / "p.csv").write_text("filepath,title\n" + "".join(f"{name},{name}\n" for name in kinds))
    build_pairs(tmp_path / "p.csv", tmp_path / "out", resize=16, validation_percent=0, workers=1)
    data = PairDataset(tmp_path / "out")
    assert len(data) == len(kinds)
    for i in range(len(data)):
        name = data.caption(i)
        stored = Image.open(io.BytesIO(data.picture(i)))
        shown = decode((tmp_path / name).read_bytes())
        expected = shown.resize(stored.size, Image.Resampling.BICUBIC)
        error = np.abs(np.asarray(decode(data.picture(i))).astype(int) - np.asarray(expected).astype(int))
        assert min(stored.size) == 16 and (stored.width > stored.height) == (shown.width > shown.height), name
        if stored.format == "PNG":
            assert error.max() == 0, name
            assert (stored.mode == "L") == name.startswith(("grey16", "float", "bits")), name
        else:
            assert error.mean() < 4, (name, stored.format)


def test_an_image_over_the_budget_is_left_out_and_named(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", 1)
    Image.new("L", (1, 1001)).save(tmp_path / "long.png")
    (tmp_path / "p.csv").write_text("filepath,title\na.png,a\nlong.png,b\n")
    content = build_pairs(tmp_path / "p.csv", tmp_path / "out", validation_percent=0, workers=1)
    assert content["dropped"]["named"] == ["long.png: over the budget of one sample: aspect 1,001, at most 1,000"]


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


def small(folder: Path, *names: str, size: tuple[int, int] = (6, 4)) -> None:
    """Draw an image of another colour for each name."""
    for name in names:
        draw(folder / name, sum(name.encode("utf-8", "surrogateescape")) % 250, size)


def test_bad_rows_are_named_and_cost_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small(tmp_path, *(f"{i}.png" for i in range(9)))
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "p.csv").write_text(
        'filepath , title\n0.png,a cat, black\n1.png,"a cat\n2.png,a dog\n3.png,nan\n4.png,None\n,a fox\n'
        f'5.png,"two\nlines"\nNaN,a hen\n6.png,{"word " * 20_000}\n7.png,Null and void\nempty.png,gone\n'
    )
    content = build_pairs(tmp_path / "p.csv", tmp_path / "out", validation_percent=0, workers=1)
    captions = {pair.meta["name"]: pair.caption for pair in read(tmp_path / "out", content)["train"]}
    assert captions == {"2.png": "a dog", "5.png": "two lines", "7.png": "Null and void"}
    assert {rule: count for rule, count in content["dropped"].items() if rule != "named"} == {
        "captions over 65,536 bytes": 1,
        "captions without a picture": 2,
        "pictures without a caption": 2,
        "rows with a quote that is not closed or not doubled": 1,
        "rows with more or fewer fields than the header": 1,
        "training captions of pictures nearly equal to a validation picture": 0,
        "training captions of validation pictures": 0,
        "unreadable pictures": 1,
    }
    lines = (tmp_path / "out" / "left-out.txt").read_text().splitlines()
    assert len(lines) == len(content["dropped"]["named"]) == 8
    assert "pictures without a caption: row 5: no caption" in lines
    assert "unreadable pictures: empty.png: it is empty: it has no bytes" in lines
    said = capsys.readouterr().err
    assert "row 2: 3 fields where the header has 2; quote captions that contain ','" in said
    assert "left out, pictures without a caption: 2" in said


def test_columns_called_otherwise_twice_or_the_same(tmp_path: Path) -> None:
    small(tmp_path, "a.png")
    (tmp_path / "p.csv").write_text("image,text,text\na.png,one,two\n")
    with pytest.raises(ValueError, match=r"it has image, text, text: name .* --csv-img-key and --csv-caption-key"):
        build_pairs(tmp_path / "p.csv", tmp_path / "out")
    with pytest.raises(ValueError, match="p.csv has 2 columns 'text'; rename all but one"):
        build_pairs(tmp_path / "p.csv", tmp_path / "out", image_key="image", caption_key="text")
    with pytest.raises(ValueError, match="column 'image' is named for images and captions"):
        build_pairs(tmp_path / "p.csv", tmp_path / "out", image_key="image", caption_key="image")
    with pytest.raises(ValueError, match="--csv-separator 'tabs' is not a separator"):
        build_pairs(tmp_path / "p.csv", tmp_path / "out", separator="tabs")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["\\t", "tab", "\t"])
def test_a_tab_has_names(name: str, tmp_path: Path) -> None:
    small(tmp_path, "a.png")
    (tmp_path / "p.tsv").write_text("filepath\ttitle\na.png\tred, old\n")
    content = build_pairs(tmp_path / "p.tsv", tmp_path / "out", separator=name, validation_percent=0)
    assert [pair.caption for pair in read(tmp_path / "out", content)["train"]] == ["red, old"]


def test_every_file_of_a_folder_is_taken_or_named(tmp_path: Path) -> None:
    source, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    raw = os.fsdecode(b"caf\xe9.png")
    small(source, "a.jpg", "a.png", "B.JPG", "c.v2.webp", "d.tif", "e.bmp", "f.gif", "sub/g.png", raw, "u.png", "w.png")
    small(source, "long.png", ".hidden.png", ".git/x.png", "x.ppm", "dir.png/in.png")
    small(elsewhere, "h.jpeg")
    for stem in ("a", "c.v2", "d", "e", "f", "sub/g", os.fsdecode(b"caf\xe9"), "alone", ".hidden", "x", "dir.png/in"):
        (source / f"{stem}.txt").write_text(f"caption {len(stem)}")
    (source / "B.TXT").write_text("\ufeffupper case", encoding="utf-8")
    (source / "u.txt").write_bytes("caption".encode("utf-16"))
    (source / "w.txt").write_text("None")
    (source / "long.txt").write_text("word " * 40_000)
    (elsewhere / "h.txt").write_text("linked")
    (source / "notes.md").write_text("")
    (source / "Makefile").write_text("")
    (source / "link").symlink_to(elsewhere)
    (source / "again").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(source)
    (source / "self").symlink_to(source / "self")
    os.mkfifo(source / "fifo.png")
    os.mkfifo(source / "B.txt")
    content = build_pairs(source, tmp_path / "out", validation_percent=0, workers=1)
    captions = {pair.meta["name"]: pair.caption for pair in read(tmp_path / "out", content)["train"]}
    assert captions == {
        "a.jpg": "caption 1",
        "a.png": "caption 1",
        "B.JPG": "upper case",
        "c.v2.webp": "caption 4",
        "caf\\xe9.png": "caption 4",
        "d.tif": "caption 1",
        "dir.png/in.png": "caption 10",
        "e.bmp": "caption 1",
        "f.gif": "caption 1",
        "again/h.jpeg": "linked",
        "sub/g.png": "caption 5",
        "x.ppm": "caption 1",
    }
    lines = (tmp_path / "out" / "left-out.txt").read_text().splitlines()
    assert lines == [
        "captions over 65,536 bytes: long.png: a caption over 65,536 bytes",
        "captions without a picture: alone.txt: no image beside it",
        "files and folders that cannot be read: B.txt: not a regular file",
        "files and folders that cannot be read: fifo.png: not a regular file",
        "files and folders that cannot be read: self: a broken link",
        "files that are neither images nor captions: Makefile: no suffix",
        "files that are neither images nor captions: notes.md: .md",
        "folders reached twice: again/loop: its files are read under another name",
        "folders reached twice: link: its files are read under another name",
        "hidden files and folders: .git: its name begins with a dot",
        "hidden files and folders: .hidden.png: its name begins with a dot",
        "hidden files and folders: .hidden.txt: its name begins with a dot",
        "pictures without a caption: u.png: its caption is not UTF-8",
        "pictures without a caption: w.png: its caption is empty",
    ]


def test_equal_inputs_in_other_folders_build_equal_bytes(tmp_path: Path) -> None:
    for place, workers in (("one", 1), ("two", 2)):
        source = tmp_path / place / "in"
        small(source, "a.png", "b.jpg", "c.webp", "sub/d.png")
        for stem in ("a", "b", "c", "sub/d", "t", "h"):
            (source / f"{stem}.txt").write_text(f"caption {stem}")
        (source / "t.png").write_bytes(b"<html>" * 9)
        (source / "h.png").write_bytes(b"")
        build_pairs(source, tmp_path / place / "out", workers=workers)
    files = sorted(path.name for path in (tmp_path / "one" / "out").iterdir())
    assert {"dataset.json", "left-out.txt", "train-000000.tar"} <= set(files)
    for name in files:
        one, two = (tmp_path / place / "out" / name for place in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
        assert b"0x" not in one.read_bytes() or name.endswith((".tar", ".npz"))


def test_validation_pairs_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small(tmp_path, "a.png", "b.png", "c.png", "d.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "c.png").read_bytes())
    (tmp_path / "train.csv").write_text("image,text\na.png,one\nb.png,two\nd.png,three\ncopy.png,four\nlost.png,five\n")
    (tmp_path / "val.csv").write_text("image,text\nc.png,six\nb.png,seven\nb.png\n")
    command = ["pairs", str(tmp_path / "train.csv"), "--val", str(tmp_path / "val.csv")]
    command += ["--csv-img-key", "image", "--csv-caption-key", "text", "--output", str(tmp_path / "out")]
    assert main(command) == 0
    content = json.loads((tmp_path / "out" / "dataset.json").read_text())
    found = read(tmp_path / "out", content)
    assert {split: sorted(pair.caption for pair in pairs) for split, pairs in found.items()} == {
        "train": ["one", "three"],
        "val": ["seven", "six"],
    }
    assert {pair.meta["set"] for pair in found["val"]} == {"val"}
    assert len({pair.key for pairs in found.values() for pair in pairs}) == 4
    assert content["dropped"]["training captions of validation pictures"] == 2
    assert content["dropped"]["unreadable pictures"] == 1
    assert "val.csv: row 4: 1 field where the header has 2" in content["dropped"]["named"]
    assert [entry["title"] for entry in content["attribution"]] == ["train.csv", "val.csv"]
    assert content["given"] == {
        "train": "train.csv",
        "val": "val.csv",
        "csv_img_key": "image",
        "csv_caption_key": "text",
        "csv_separator": None,
        "limit": None,
    }
    assert main(command) == 0
    assert "was complete already" in capsys.readouterr().err
    assert main([*command, "--validation-percent", "8"]) == 1
    assert "--validation-percent would draw others: give only one" in capsys.readouterr().err


def test_folders_of_training_and_validation(tmp_path: Path) -> None:
    for split, names in (("train", "abcd"), ("val", "ex")):
        for name in names:
            small(tmp_path / split, f"{name}.png")
            (tmp_path / split / f"{name}.txt").write_text(f"caption {name}")
    (tmp_path / "val" / "x.png").write_bytes((tmp_path / "train" / "d.png").read_bytes())
    content = build_pairs(tmp_path / "train", tmp_path / "out", val=tmp_path / "val", workers=1)
    found = read(tmp_path / "out", content)
    captions = {split: sorted(pair.caption[-1] for pair in pairs) for split, pairs in found.items()}
    assert captions == {"train": ["a", "b", "c"], "val": ["e", "x"]}
    with pytest.raises(ValueError, match="no image of .*train can be trained on: a.png: 'caption a' is not"):
        build_pairs(tmp_path / "train", tmp_path / "none", val=tmp_path / "train")
    with pytest.raises(ValueError, match="no pairs at .*absent"):
        build_pairs(tmp_path / "train", tmp_path / "none", val=tmp_path / "absent")
    (tmp_path / "val" / "e.png").write_bytes(b"")
    (tmp_path / "val" / "x.png").write_bytes(b"")
    with pytest.raises(ValueError, match="no image of .*val can be read: .*e.png: it is empty"):
        build_pairs(tmp_path / "train", tmp_path / "none", val=tmp_path / "val")
    assert not (tmp_path / "none").exists()


def test_no_memory_address_is_recorded(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pair_shards._read_image

    def failing(path: Path, resize: int | None) -> tuple[bytes, str]:
        if path.name == "4.png":
            raise CorruptSample("4.png", "cannot read <_io.BytesIO object at 0x7f33a1b2c3d0>")
        return real(path, resize)

    monkeypatch.setattr(pair_shards, "_read_image", failing)
    content = build_pairs(table, tmp_path / "out", workers=1)
    assert content["dropped"]["named"] == ["img/4.png: cannot read <_io.BytesIO object>"]


def test_a_caption_with_a_nul_byte_is_left_out(tmp_path: Path) -> None:
    small(tmp_path / "in", "a.png", "b.png", "c.png")
    (tmp_path / "in/a.txt").write_bytes("a cat".encode("utf-16-le"))
    (tmp_path / "in/b.txt").write_bytes(b"a\0cat")
    (tmp_path / "in/c.txt").write_text("a dog")
    build_pairs(tmp_path / "in", tmp_path / "out", validation_percent=0, workers=1)
    named = (tmp_path / "out/left-out.txt").read_text()
    assert named.count("its caption holds a NUL byte") == 2
    assert "a.png" in named and "b.png" in named


def test_a_copy_or_link_of_a_validation_image_is_not_trained_on(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", 1)
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "hard.png").hardlink_to(tmp_path / "a.png")
    (tmp_path / "link.png").symlink_to("a.png")
    (tmp_path / "sub").mkdir()
    draw(tmp_path / "other.png", 2)
    captions = [f"thing {chr(97 + i)}{chr(97 + i)}" for i in range(26)]
    held = next(text for text in captions if percentile(concept(text)) < 50)
    kept = [text for text in captions if percentile(concept(text)) >= 50][:5]
    files = ["copy.png", "hard.png", "link.png", "sub/../a.png", "other.png"]
    rows = [("a.png", held), *zip(files, kept, strict=True)]
    (tmp_path / "t.csv").write_text("filepath,title\n" + "".join(f"{path},{text}\n" for path, text in rows))
    content = build_pairs(tmp_path / "t.csv", tmp_path / "out", validation_percent=50, workers=1)
    assert [content["splits"][split]["samples"] for split in ("train", "val")] == [1, 1]
    assert content["dropped"]["training captions of validation pictures"] == 4


def test_a_picture_nearly_equal_to_a_validation_picture_is_not_trained_on(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3), dtype=np.uint8)
    photo, other = (Image.fromarray(one).resize((90, 90), Image.Resampling.BICUBIC) for one in pixels)
    photo.save(tmp_path / "photo.png")
    photo.resize((180, 180), Image.Resampling.BICUBIC).save(tmp_path / "larger.jpg", quality=80)
    other.save(tmp_path / "other.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "photo.png").read_bytes()[:900])
    rows = [("larger.jpg", "a cat"), ("other.png", "a dog"), ("torn.png", "a cow")]
    (tmp_path / "train.csv").write_text("filepath,title\n" + "".join(f"{path},{text}\n" for path, text in rows))
    (tmp_path / "val.csv").write_text("filepath,title\nphoto.png,a horse\n")
    content = build_pairs(tmp_path / "train.csv", tmp_path / "out", val=tmp_path / "val.csv", workers=1)
    assert {pair.caption for pair in read(tmp_path / "out", content)["train"]} == {"a dog"}
    assert content["dropped"]["training captions of pictures nearly equal to a validation picture"] == 1
    why = "larger.jpg: 'a cat' is not trained on, since its image resembles photo.png in val"
    assert why in (tmp_path / "out" / "left-out.txt").read_text()


def test_sources_that_are_no_table_are_called_what_they_are(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="it is a device or pipe; save the table to a file first"):
        build_pairs(tmp_path / "pipe", tmp_path / "out")
    for order in ("utf-16", "utf-16-be"):
        mark = b"" if order == "utf-16" else b"\xfe\xff"
        (tmp_path / "wide.csv").write_bytes(mark + "filepath,title\na.png,a cat\n".encode(order))
        with pytest.raises(ValueError, match=r"wide\.csv is UTF-16, not UTF-8; .* iconv -f utf-16 -t utf-8"):
            build_pairs(tmp_path / "wide.csv", tmp_path / "out")


def test_an_error_names_the_first_of_many_columns(tmp_path: Path) -> None:
    (tmp_path / "wide.csv").write_text(",".join(f"c{i}" for i in range(9999)) + "\n")
    with pytest.raises(ValueError, match="it has c0, c1, .*, c49 and 9,949 more: name its columns") as error:
        build_pairs(tmp_path / "wide.csv", tmp_path / "out")
    assert len(str(error.value)) < 1000
