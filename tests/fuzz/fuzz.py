"""Fuzz every reader of files from elsewhere, guided by coverage, within bounds of time and memory.

    python tests/fuzz/fuzz.py [--seconds 20] [--jobs 1] [--findings FOLDER] [READER ...]

Prints a JSON line for each reader: executions, edges covered, peak memory above the start, findings. An input that
raises, runs longer than 10 s or takes more than 500 MB is written to the folder of findings, and the status is 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import resource
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from readers import READERS

INPUT_SECONDS = 10
MEMORY_MB = 500
INPUT_BYTES = 16384
_COVERED = re.compile(r"cov: (\d+)")


def child(name: str, corpus: str, seconds: int, findings: str) -> None:
    """Fuzz one reader in this process, which libFuzzer ends."""
    import atheris

    logging.disable(logging.WARNING)

    reader = READERS[name]
    with atheris.instrument_imports(include=["oner_fast"]):
        for seed in reader.seeds():  # imports what the reader needs
            reader.check(seed)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"start_mb: {start}", file=sys.stderr, flush=True)
    dictionary = Path(corpus).parent / f"{name}.dict"
    dictionary.write_text("".join(f'"{word}"\n' for word in reader.dictionary))
    options = {
        "max_total_time": seconds,
        "timeout": INPUT_SECONDS,
        "rss_limit_mb": start + MEMORY_MB,
        "max_len": INPUT_BYTES,
        "print_final_stats": 1,
        "artifact_prefix": f"{findings}/{name}-",
        "dict": dictionary,
    }
    atheris.Setup([name, *(f"-{key}={value}" for key, value in options.items()), corpus], reader.check)
    atheris.Fuzz()


def fuzz(name: str, seconds: int, findings: Path) -> dict[str, Any]:
    """Fuzz one reader in a process of its own; returns what its JSON line says."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(READERS[name].seeds()):
            (corpus / f"seed-{number}").write_bytes(seed)
        before = set(findings.glob(f"{name}-*"))
        command = [sys.executable, __file__, "--child", name, str(corpus), str(seconds), str(findings)]
        log = findings / f"{name}.log"
        with log.open("w+", errors="replace") as out:
            status = subprocess.run(command, stdout=out, stderr=out, check=False).returncode
            out.seek(0)
            text = out.read()
        numbers = {key: int(value) for key, value in re.findall(r"(?:stat::)?(\w+): +(\d+)$", text, re.MULTILINE)}
        covered = [int(edges) for edges in _COVERED.findall(text)]
        found = sorted(path.name for path in set(findings.glob(f"{name}-*")) - before)
        if not found and status == 0:
            log.unlink()
        return {
            "reader": name,
            "seconds": seconds,
            "executions": numbers.get("number_of_executed_units", 0),
            "edges": max(covered, default=0),
            "peak_mb_above_start": numbers.get("peak_rss_mb", 0) - numbers.get("start_mb", 0),
            "findings": found,
            "status": status,
        }


def main() -> int:
    """Fuzz the readers that the command line names; returns 1 where one of them failed."""
    if sys.argv[1:2] == ["--child"]:
        name, corpus, seconds, findings = sys.argv[2:]
        child(name, corpus, int(seconds), findings)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=20, help="for each reader")
    parser.add_argument("--jobs", type=int, default=1, help="readers at a time")
    parser.add_argument("--findings", type=Path, default=Path("build/fuzz"))
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"of {', '.join(READERS)}; all by default")
    options = parser.parse_args()
    unknown = sorted(set(options.readers) - READERS.keys())
    if unknown:
        parser.error(f"unknown reader {unknown[0]!r}; known: {', '.join(READERS)}")
    findings = options.findings.resolve()
    findings.mkdir(parents=True, exist_ok=True)
    failed = False
    with ThreadPoolExecutor(options.jobs) as pool:
        for line in pool.map(lambda name: fuzz(name, options.seconds, findings), options.readers or list(READERS)):
            print(json.dumps(line), flush=True)
            failed |= line["status"] != 0 or bool(line["findings"])
    if failed:
        print(f"findings and logs are in {findings}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
