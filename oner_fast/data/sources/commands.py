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
    """About 11,000 captioned images out of PyPI packages: emoji in colour and one-colour icons.

    Args:
        output: The dataset's folder.
        size: Pixels a side.
        workers: Processes that draw; every processor unless told. The bytes do not depend on it.
        limit: Only so many drawings, evenly from every set.
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
    """About 30,000 captioned images out of npm packages; needs npm on the PATH.

    Args:
        output: The dataset's folder.
        size: Pixels a side.
        workers: Processes that draw; every processor unless told. The bytes do not depend on it.
        style: The set that is never trained on and makes the split "style"; fxemoji unless told.
        sets: Which sets to take; all unless told.
        cache: Where the fetched packages are kept; the folder npm-cache beside the output unless told.
        limit: Only so many drawings, evenly from every set.
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


def pairs(
    source: Positional[Path],
    output: Path,
    csv_img_key: Annotated[str, arg(aliases=["--image-column"])] = "filepath",
    csv_caption_key: Annotated[str, arg(aliases=["--caption-column"])] = "title",
    csv_separator: str | None = None,
    root: Path | None = None,
    resize: int | None = None,
    validation_percent: int = 8,
    split_by: Literal["concept", "caption"] = "concept",
    licence: str = "unspecified",
    author: str = "unspecified",
    workers: int | None = None,
    limit: int | None = None,
    overwrite: bool = False,
) -> None:
    """Your own images and captions: a CSV or TSV file, or a folder of images with a .txt of the same name each.

    Args:
        source: A CSV or TSV file with a header line, or a folder.
        output: The dataset's folder.
        csv_img_key: The column of image paths.
        csv_caption_key: The column of captions.
        csv_separator: What separates columns; a tab unless the header line has only commas.
        root: Where relative image paths start; the folder of the file unless told.
        resize: Shrink images whose shorter side is longer, in pixels; the others keep their bytes.
        validation_percent: Share of concepts (or captions) that validate and are never trained on.
        split_by: "concept" keeps the same thing in other words out of training; "caption" only the same caption.
        licence: Written into every sample.
        author: Written into every sample.
        workers: Processes that read and check images; every processor unless told.
        limit: Only the first so many pairs.
        overwrite: Replace another build in the folder.
    """
    from oner_fast.data.sources.pairs import build_pairs

    build_pairs(
        source,
        output,
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
    """Write the index of tars in webdataset's or img2dataset's format, `<tar>.index.npz` beside each.

    Args:
        tars: The tars, or folders of tars.
    """
    from oner_fast.data.sources.building import index_tars

    index_tars(tars)
