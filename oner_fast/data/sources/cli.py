"""`oner-fast data pictograms | icons | scenes | pairs | index | verify`: build, index and verify datasets."""

import sys

from oner_fast.boundary import guarded

NAMES = ("pictograms", "icons", "scenes", "pairs", "index", "verify")


def main(argv: list[str]) -> int:
    """Run the subcommand that `argv` names; returns the exit code: 0, 1 for a failure, 2 for a wrong command line.

    An interruption returns 130 and keeps every complete file; the same command continues from there.
    """
    if argv and not argv[0].startswith("-") and argv[0] not in NAMES:
        print(f"oner-fast data: unknown name {argv[0]!r}; known: {', '.join(NAMES)}", file=sys.stderr)
        return 2
    return guarded(
        "oner-fast data",
        lambda: _run(argv),
        extra="demo",
        interrupted="interrupted; complete files are kept, and the same command continues from there",
    )


def _run(argv: list[str]) -> int:
    import tyro

    from oner_fast.data.sources import commands

    named = {name: getattr(commands, name) for name in NAMES}
    try:
        tyro.extras.subcommand_cli_from_dict(named, args=argv, prog="oner-fast data")
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
