"""Run `oner-fast` as `python -m oner_fast`."""

from oner_fast.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
