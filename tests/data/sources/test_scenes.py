import io
import json
from pathlib import Path
from typing import Any

import pytest

for package in ("PIL", "webdataset", "rich"):
    pytest.importorskip(package, reason="needs the demo extra")

from PIL import Image, ImageChops  # noqa: E402

from oner_fast.data.dataset import PairDataset  # noqa: E402
from oner_fast.data.sources.building import Build  # noqa: E402
from oner_fast.data.sources.concepts import concept  # noqa: E402
from oner_fast.data.sources.scene_plans import plan_scene  # noqa: E402
from oner_fast.data.sources.scenes import build_scenes  # noqa: E402
from oner_fast.data.sources.writer import Sample, split_record, write_shard  # noqa: E402

NAMES = {"train": ["cat", "dog", "red arrow", "arrow left", "house"], "val": ["boat", "tree", "boat sail", "sun"]}
OPTIONS: dict[str, Any] = {"train": 6, "held_out": 5, "size": 64, "workers": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set whose pictures are black rectangles on white."""
    folder = tmp_path_factory.mktemp("source") / "data"
    build = Build(folder, "shapes", {})
    build.begin()
    splits = {}
    for split, names in NAMES.items():
        samples = []
        for number, name in enumerate(names):
            picture = Image.new("RGB", (32, 32), "white")
            picture.paste((0, 0, 0), (4, 8, 28, 12 + 4 * number))
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            made_by = {"set": split, "name": name, "licence": f"L-{number % 2}", "author": "Ann"}
            samples.append(Sample(f"{split}-{number}", buffer.getvalue(), "png", {"caption": name, **made_by}))
        shard = write_shard(folder / f"{split}-000000.tar", samples)
        splits[split] = split_record([shard], len(names), len(names))
    build.finish({"splits": splits, "attribution": [{"set": split, "licence": "L"} for split in (*NAMES, "absent")]})
    return folder


def test_scenes_name_their_things_and_know_their_boxes(source: Path, tmp_path: Path) -> None:
    content = build_scenes(source, tmp_path / "a", **OPTIONS)
    assert [entry["set"] for entry in content["attribution"]] == ["train", "val"]
    assert content["attribution"][1]["samples"] == 5
    for split, count in (("train", 6), ("val", 5)):
        data = PairDataset(tmp_path / "a", split)
        assert len(data) == content["splits"][split]["samples"] == count
        for i in range(count):
            pair = data.read(i)
            image = Image.open(io.BytesIO(pair.image)).convert("RGB")
            assert image.size == (64, 64) and pair.meta["width"] == pair.meta["height"] == 64
            objects = pair.meta["objects"]
            assert 2 <= len(objects) <= 4
            words = [word for one in objects for word in one["concept"].split()]
            assert len(words) == len(set(words))  # each name means one picture
            blank = image.copy()
            for one in objects:
                assert one["phrase"] in NAMES[split] and one["concept"] == concept(one["phrase"])
                assert pair.caption[slice(*one["span"])] == one["phrase"]
                left, top, width, height = one["box"]
                corners = (left, top, left + width, top + height)
                apart = ImageChops.difference(image.crop(corners), Image.new("RGB", (width, height), "white"))
                assert apart.convert("L").point([0] * 11 + [255] * 245).getbbox() == (0, 0, width, height)
                blank.paste("white", corners)
            assert min(low for low, _ in blank.getextrema()) >= 255 - 10  # the boxes hold all of the ink
            assert set(pair.meta["licence"].split(" AND ")) == {one["licence"] for one in objects}


def test_the_seed_decides_the_bytes(source: Path, tmp_path: Path) -> None:
    def shas(folder: str, **changed: Any) -> list[str]:
        content = build_scenes(source, tmp_path / folder, **(OPTIONS | changed))
        return [shard["sha256"] for split in content["splits"].values() for shard in split["shards"]]

    assert shas("a") == shas("b", workers=2) != shas("c", seed=1)
    assert (tmp_path / "a" / "dataset.json").read_bytes() == (tmp_path / "b" / "dataset.json").read_bytes()
    (tmp_path / "a" / "val-000000.tar").unlink()
    assert shas("a") == shas("b")  # an interrupted build continues
    with pytest.raises(ValueError, match="holds another build"):
        build_scenes(source, tmp_path / "a", **(OPTIONS | {"seed": 2}))
    assert list(json.loads((tmp_path / "a" / "dataset.json").read_text())["splits"]) == ["train", "val"]
    assert list(build_scenes(source, tmp_path / "d", **(OPTIONS | {"train": 0}))["splits"]) == ["val"]


def test_planned_pictures_do_not_overlap() -> None:
    concepts = [(name, [number]) for number, name in enumerate("abcdefgh")]
    for seed in range(40):
        placed = plan_scene(concepts, 6, 40, str(seed))
        assert 2 <= len(placed) <= 6 and len({one.picture for one in placed}) == len(placed)
        cells = [
            (x, y)
            for one in placed
            for x in range(one.left, one.left + one.side)
            for y in range(one.top, one.top + one.side)
        ]
        assert len(cells) == len(set(cells)) and max(map(max, cells)) < 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"most": 1}, r"--most must be at least 2 \(pictures in a scene\), got 1"),
        ({"size": 16}, r"--size must be at least 32 \(pixels a side\), got 16"),
        ({"held_out": 0}, "--held-out must be at least 1 .*, got 0"),
        ({"train": -1}, "--train must be at least 0 .*, got -1"),
    ],
)
def test_impossible_options_are_refused(source: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_scenes(source, tmp_path / "new", **(OPTIONS | options))


def test_other_sources_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no dataset\.json"):
        build_scenes(tmp_path, tmp_path / "new")
    with pytest.raises(ValueError, match="a folder of their own"):
        build_scenes(source, source)
    build_scenes(source, tmp_path / "scenes", **(OPTIONS | {"train": 0, "held_out": 2}))
    with pytest.raises(ValueError, match="holds scenes already .*; give --source a dataset of single pictures"):
        build_scenes(tmp_path / "scenes", tmp_path / "again", **(OPTIONS | {"train": 0}))
    with pytest.raises(ValueError, match="without a common word"):
        plan_scene([("arrow left", [0]), ("arrow right", [1])], 4, 64, "0")
