"""Run commands in forked children of one process that has imported everything, each with one fault to meet.

Started by `faults.Server` with the shim preloaded. Reads one JSON request a line from standard input, writes one JSON
answer a line to standard output.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

SHIM = ctypes.CDLL(None)
SHIM.faults_call.restype = SHIM.faults_path.restype = ctypes.c_char_p


def load(run: str) -> int:
    """Load a run as a library user does, and print what it embeds."""
    import oner_fast

    loaded = oner_fast.load(run)
    print(loaded.encode_text(["a red picture", "blue"]).double().sum().item())
    return 0


def main() -> None:
    """Answer requests until the input ends."""
    imported()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def imported() -> None:
    """Import what the commands import, and leave out measurements that take time and touch no file."""
    import importlib

    import matplotlib.backends.backend_agg
    import matplotlib.backends.backend_svg
    import torch.utils.tensorboard
    import webdataset.writer

    import oner_fast.data.sources.commands
    import oner_fast.data.sources.pairs
    import oner_fast.evaluation.cli
    import oner_fast.report.cli
    import oner_fast.report.content
    import oner_fast.report.gallery
    import oner_fast.report.page
    import oner_fast.train.oner.training
    from oner_fast.train.engine import launch, loop

    assert matplotlib and torch and webdataset and oner_fast and launch
    loop.gemm_rate = lambda *given, **named: 1e9
    importlib.import_module("torch._inductor")  # what the switch to deterministic algorithms imports
    torch.set_num_threads(1)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run one request in a child."""
    said, calls = Path(request["scratch"]) / "said", Path(request["scratch"]) / "calls"
    child = os.fork()
    if child == 0:
        run(request, said, calls)
    limit = time.monotonic() + request["seconds"]
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid or time.monotonic() > limit:
            break
        time.sleep(0.002)
    if not pid:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return {"code": None, "said": said.read_text(errors="replace"), "calls": []}
    return {
        "code": os.waitstatus_to_exitcode(status),
        "said": said.read_text(errors="replace"),
        "calls": json.loads(calls.read_text()) if calls.exists() and request["victim"] < 0 else [],
    }


def run(request: dict[str, Any], said: Path, calls: Path) -> None:
    """Be the child: run the command with its output in a file, and end without the interpreter's farewell."""
    os.setpgid(0, 0)
    calls.unlink(missing_ok=True)
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    words = request["argv"]
    SHIM.faults_arm(request["prefix"].encode(), request["victim"], request["how"])
    from oner_fast import cli
    from oner_fast.boundary import guarded

    try:
        code = guarded("oner-fast load", lambda: load(words[1])) if words[0] == "load" else cli.main(words)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 70
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70
    SHIM.faults_disarm()
    if request["victim"] < 0:
        seen = [(SHIM.faults_call(i).decode(), SHIM.faults_path(i).decode()) for i in range(SHIM.faults_calls())]
        calls.write_text(json.dumps(seen))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
