"""A tiny data set for the runs of a study."""

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with a train and a val split of coloured squares."""
    folder = tmp_path_factory.mktemp("ablation") / "pairs"
    folder.mkdir()
    colours = ["red", "green", "blue", "grey", "pink", "teal", "gold", "navy"]
    for split, count in (("train", 96), ("val", 16)):
        with tarfile.open(folder / f"{split}-000000.tar", "w") as tar:
            for i in range(count):
                png = io.BytesIO()
                Image.new("RGB", (24, 24), colours[i % 8]).save(png, "PNG")
                caption = f"a {colours[i % 8]} picture number {i}"
                for name, data in ((f"{i:04d}.png", png.getvalue()), (f"{i:04d}.txt", caption.encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder
