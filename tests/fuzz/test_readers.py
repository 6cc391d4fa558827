"""Every reader passes its check on its seeds, on cut and changed seeds, and on what the fuzzers found before."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import pytest

FINDINGS = Path(__file__).parent / "findings"


def _readers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readers", Path(__file__).with_name("readers.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["readers"] = module
    spec.loader.exec_module(module)
    return module


pytest.importorskip("PIL", reason="needs the train extra")
readers = _readers()


def changed(seed: bytes, draws: random.Random) -> bytes:
    """A seed with some bytes set, a part removed or a part doubled."""
    data = bytearray(seed)
    for _ in range(draws.randrange(1, 4)):
        place, length = draws.randrange(len(data) + 1), draws.choice((1, 4, 512))
        match draws.randrange(4):
            case 0:
                data[place : place + length] = draws.choice((b"\0", b"\xff", b"-1000", b"9" * 20)) * min(length, 64)
            case 1:
                del data[place : place + length]
            case 2:
                data[place:place] = data[place : place + length]
            case 3 if place < len(data):
                data[place] ^= 1 << draws.randrange(8)
    return bytes(data)


@pytest.mark.parametrize("name", readers.READERS)
def test_seeds_and_changed_seeds(name: str) -> None:
    reader, draws = readers.READERS[name], random.Random(name)
    seeds = reader.seeds()
    for seed in seeds:
        reader.check(seed)
    for _ in range(60):
        reader.check(changed(draws.choice(seeds), draws))


def test_what_was_found_stays_corrected() -> None:
    for file in sorted(FINDINGS.glob("*-*")):
        readers.READERS[file.name.split("-")[0]].check(file.read_bytes())


@pytest.mark.parametrize("error", [RecursionError("deep"), ValueError("names nothing"), MemoryError()])
def test_a_check_fails_where_its_reader_does(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("oner_fast.bounded_json.loads", fail)
    with pytest.raises((AssertionError, RecursionError, MemoryError)):
        readers.READERS["json"].check(b"{}")
