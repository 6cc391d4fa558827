"""The one place where a command's failure becomes a sentence on standard error and an exit status.

Exit statuses: 0 done, 1 failed, 2 a wrong command line, 130 interrupted, 141 the reader of the output has gone.
"""

from __future__ import annotations

import io
import os
import select
import sys
import time
import traceback
from collections.abc import Callable

from oner_fast.failures import TRACEBACK, sentence

INTERRUPTED = 130
READER_GONE = 141  # 128 + SIGPIPE, as a shell reports it of other tools
_AFTER_RANK_0 = 0.3  # seconds that the other ranks wait, so that rank 0's sentence is the first


def guarded(
    prog: str,
    run: Callable[[], int | None],
    *,
    extra: str | None = None,
    interrupted: str = "interrupted",
) -> int:
    """Call `run` and return the exit status. An exception ends in one line on standard error.

    `ONER_FAST_TRACEBACK=1` prints the traceback before that line. SystemExit, which parsers of command lines raise,
    passes on.

    Args:
        prog: the command's name, which begins the line.
        run: the command; None and 0 mean success.
        extra: the extra of this package that holds what the command needs.
        interrupted: the line after Ctrl-C.
    """
    _print_every_character()
    try:
        try:
            code = int(run() or 0)
        except SystemExit:
            _flush()
            raise
        _flush()
        return code
    except KeyboardInterrupt:
        _say(f"{prog}: {interrupted}")
        return INTERRUPTED
    except Exception as error:
        if _after_an_interrupt(error):
            _say(f"{prog}: {interrupted}")
            return INTERRUPTED
        if isinstance(error, BrokenPipeError) and _reader_gone():
            _silence()
            return READER_GONE
        code = _fail(prog, error, extra)
    try:
        _flush()
    except OSError:  # the sentence about the failure itself stands
        _silence()
    return code


def _print_every_character() -> None:
    """Let standard output show a character that its encoding lacks as an escape, as standard error does."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _after_an_interrupt(error: BaseException) -> bool:
    """Whether `error` was raised while a KeyboardInterrupt unwound, as by `torch.save` in the middle of a file."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, KeyboardInterrupt):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _fail(prog: str, error: Exception, extra: str | None) -> int:
    rank = os.environ.get("RANK", "0")
    if rank != "0" and os.environ.get("WORLD_SIZE", "1") != "1":
        prog = f"{prog}, rank {rank}"
        time.sleep(_AFTER_RANK_0)
    if os.environ.get(TRACEBACK, "") not in ("", "0"):
        _say("".join(traceback.format_exception(error)).rstrip())
    _say(f"{prog}: {sentence(error, extra)}")
    return 1


def _flush() -> None:
    """Write out what was printed, so that a full disk or a closed pipe is met here and not at the interpreter's end."""
    try:
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _silence()
        raise OSError(error.errno, error.strerror, "standard output") from error


def _reader_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(events & select.POLLERR for _, events in poll.poll(0))
    except (AttributeError, OSError, ValueError):
        return False


def _silence() -> None:
    """Send the rest of standard output nowhere: the interpreter flushes it once more at its end."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (AttributeError, OSError, ValueError):
        pass


def _say(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):  # nobody can be told
        pass
