"""Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 as a request to save and stop after the step."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from oner_fast.train.engine.distributed import World, sum_over_ranks

_log = logging.getLogger(__name__)
STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
"""The signals that stop a training: a terminal's, a scheduler's, a closed session's, and the warning of SLURM's
`--signal=USR1@90`."""
_NOTE = b"\nstopping after this step, with a checkpoint; Ctrl-C again stops at once, without one\n"


class StopRequest:
    """A request to stop, made by the signals received so far.

    Attributes:
        requested: None, or the name of the first signal that came to this process.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._interrupts = 0
        self._process = os.getpid()

    def agree(self, world: World) -> str | None:
        """Agree over all ranks: None to go on, else the name of a signal that some rank received.

        Every rank must call it at the same step; all get the same answer, the first in the order of `STOPPING`, and
        `requested` becomes it. In a single process the answer is `requested`.
        """
        if world.size > 1:
            votes = torch.tensor([self.requested == name for name in STOPPING], dtype=torch.int32)
            # On the CPU, so that no GPU is waited for.
            counts = sum_over_ranks(votes).tolist()
            agreed = next((name for name, count in zip(STOPPING, counts, strict=True) if count), None)
            # A signal that arrives during this exchange is handled in the next one.
            self.requested = agreed or self.requested
            return agreed
        return self.requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if os.getpid() != self._process:
            # A forked child inherits the handler, but only its parent saves. SIGTERM is how the parent ends it.
            if name == "SIGTERM":
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if name == "SIGINT":
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
            if os.environ.get("RANK", "0") == "0":
                # A buffered stream may be in the middle of a write here.
                os.write(2, _NOTE)
        if self.requested is None:
            self.requested = name


def exit_status(name: str) -> int:
    """Return the exit status of a process that a signal ended, as shells count it: 143 for SIGTERM."""
    return 128 + signal.Signals[name]


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """While inside, the signals in `STOPPING` only set `requested`; a second SIGINT raises KeyboardInterrupt.

    SIGHUP stays ignored where it was, as `nohup` asks. The handlers that were there before come back at the end.
    Outside the main thread, where Python allows no handlers, the request stays None and a warning says so.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        _log.warning("not in the main thread: Ctrl-C and other signals will not save a checkpoint")
        yield request
        return
    numbers = [signal.Signals[name] for name in STOPPING]
    before = {number: signal.getsignal(number) for number in numbers}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]
    try:
        for number in before:
            signal.signal(number, request._handle)
        yield request
    finally:
        for number, handler in before.items():
            # None: it was set outside Python, and only the default can be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
