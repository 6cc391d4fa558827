"""The commands of `oner-fast data`: one function each, whose signature and docstring make the command's help."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


def pictograms(
    output: Path = Path("data/pictograms"),
    size: int = 64,
    workers: int | None = None,
    limit: int | None = None,
    overwrite: bool = False,
) -> None:
    """Build about 11,000 captioned images from PyPI packages: coloured emoji and one-colour icons.

    Args:
        output: Folder of the dataset.
        size: Pixels a side.
        workers: Processes that draw; one for each processor by default. The bytes do not depend on it.
        limit: Take only this many drawings, evenly from all sets.
        overwrite: Replace another build in the folder.
    """
    from oner_fast.data.sources.pictograms import build_pictograms

    build_pictograms(output, size=size, workers=workers, limit=limit, overwrite=overwrite)


def icons(
    output: Path = Path("data/icons"),
    size: int = 64,
    workers: int | None = None,
    style: str | None = None,
    sets: tuple[str, ...] | None = None,
    cache: Path | None = None,
    limit: int | None = None,
    overwrite: bool = False,
) -> None:
    """Build about 30,000 captioned images from npm packages; needs npm on the PATH.

    Args:
        output: Folder of the dataset.
        size: Pixels a side.
        workers: Processes that draw; one for each processor by default. The bytes do not depend on it.
        style: Set that makes the split "style" and is never trained on; fxemoji by default.
        sets: Sets to take; all by default.
        cache: Folder that keeps the fetched packages; npm-cache beside the output by default.
        limit: Take only this many drawings, evenly from all sets.
        overwrite: Replace another build in the folder.
    """
    from oner_fast.data.sources.icons import SETS, STYLE, build_icons

    build_icons(
        output,
        size=size,
        workers=workers,
        style=STYLE if style is None else style,
        sets=tuple(SETS) if sets is None else sets,
        cache=cache,
        limit=limit,
        overwrite=overwrite,
    )


def scenes(
    source: Path = Path("data/pictograms"),
    output: Path = Path("data/scenes"),
    train: int = 8192,
    held_out: int = 1024,
    most: int = 4,
    size: int = 128,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
) -> None:
    """Compose scenes from another dataset: several pictures on one canvas, with a caption that names them, and boxes.

    Args:
        source: Folder of a dataset of pictures on white. Its splits are kept: a scene shows pictures of one split.
        output: Folder of the new dataset.
        train: Scenes of the split "train"; 0 for none.
        held_out: Scenes of each other split.
        most: Greatest number of pictures in a scene; the fewest are two.
        size: Pixels a side.
        seed: Decides pictures, sides and places.
        workers: Processes that compose; one for each processor by default. The bytes do not depend on it.
        overwrite: Replace another build in the folder.
    """
    from oner_fast.data.sources.scenes import build_scenes

    build_scenes(
        source,
        output,
        train=train,
        held_out=held_out,
        most=most,
        size=size,
        seed=seed,
        workers=workers,
        overwrite=overwrite,
    )


def pairs(
    source: Positional[Path],
    output: Path,
    val: Path | None = None,
    csv_img_key: Annotated[str, arg(aliases=["--image-column"])] = "filepath",
    csv_caption_key: Annotated[str, arg(aliases=["--caption-column"])] = "title",
    csv_separator: str | None = None,
    root: Path | None = None,
    resize: int | None = None,
    validation_percent: int | None = None,
    split_by: Literal["concept", "caption"] = "concept",
    licence: str = "unspecified",
    author: str = "unspecified",
    workers: int | None = None,
    limit: int | None = None,
    overwrite: bool = False,
) -> None:
    """Pack your own images and captions: a CSV or TSV file, or a folder with a .txt of the same name beside each image.

    Args:
        source: A CSV or TSV file with a header line, or a folder.
        output: Folder of the dataset.
        val: File or folder of the validation pairs; all others are then trained on, but for images that are in both.
        csv_img_key: Column of image paths.
        csv_caption_key: Column of captions.
        csv_separator: Character between columns, or tab (also as \\t), comma, semicolon, bar or space; by default the
            one with which the header line has both columns.
        root: Folder where relative image paths start; the folder of the file by default.
        resize: Shrink images to this shorter side, in pixels; smaller images keep their bytes.
        validation_percent: Share of concepts (or captions) that go to "val" and are never trained on; 8 by default. Not
            with --val.
        split_by: "concept" keeps the same thing in other words out of training, "caption" only the same caption.
        licence: Written into every sample.
        author: Written into every sample.
        workers: Processes that read and check images; one for each processor by default.
        limit: Take only this many pairs of each source, the first ones.
        overwrite: Replace another build in the folder.
    """
    from oner_fast.data.sources.pairs import build_pairs

    build_pairs(
        source,
        output,
        val=val,
        image_key=csv_img_key,
        caption_key=csv_caption_key,
        separator=csv_separator,
        root=root,
        resize=resize,
        validation_percent=validation_percent,
        split_by=split_by,
        licence=licence,
        author=author,
        workers=workers,
        limit=limit,
        overwrite=overwrite,
    )


def index(tars: Positional[tuple[Path, ...]]) -> None:
    """Write the index `<tar>.index.npz` beside each tar in webdataset's or img2dataset's format.

    Args:
        tars: The tars, or folders of tars.
    """
    from oner_fast.data.sources.building import index_tars

    index_tars(tars)


def verify(
    paths: Positional[tuple[Path, ...]],
    workers: int | None = None,
    named: int = 20,
    damage_list: Path | None = None,
) -> None:
    """Check recorded checksums and indexes, and that every image, caption and json of a dataset can be read.

    The exit status is 1 where anything is damaged. Nothing is written, except the file of --damage-list.

    Args:
        paths: Folders of datasets, or tars.
        workers: Processes that read and decode; one for each processor by default.
        named: Damaged places to print.
        damage_list: File that takes every damaged place, one a line.
    """
    from oner_fast.data.sources.verification import verify as verify_paths

    verify_paths(paths, workers, named, damage_list)
