"""`python -m oner_fast` is `oner-fast`."""

from oner_fast.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
