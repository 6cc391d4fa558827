"""TensorBoard's event file of a run, written in this thread: a disk that takes no more costs the events alone."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oner_fast.remedies import install_command

_log = logging.getLogger(__name__)
_VERSION = "brain.Event:2"


class Board:
    """Writes scalars to `folder/events.out.tfevents.*`.

    An event that cannot be written ends the file with one warning, and no run. (`SummaryWriter` writes in a thread of
    its own, where the error ends in a traceback.)

    Args:
        folder: made where needed.
        purge_step: scalars of this step and later, written before by another process, are no longer shown.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._events, self._summary = event_pb2, Summary
        self._records: Any = None
        try:
            folder.mkdir(exist_ok=True)
            name = f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{socket.gethostname()}.{os.getpid()}.0"
            self._records = RecordWriter(open(folder / name, "ab"))  # noqa: SIM115 (closed by close)
        except OSError as error:
            self._give_up(error)
        self._put(purge_step, file_version=_VERSION)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._put(purge_step, session_log=start)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write and flush the scalars of a step."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._put(step, summary=self._summary(value=values))

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        records, self._records = self._records, None
        if records is not None:
            try:
                records.close()
            except OSError as error:
                self._give_up(error)

    def _put(self, step: int, **content: Any) -> None:
        if self._records is None:
            return
        event = self._events.Event(wall_time=time.time(), step=step, **content)
        try:
            self._records.write(event.SerializeToString())
            self._records.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        _log.warning("TensorBoard's events cannot be written (%s); the run goes on without them", error)
        records, self._records = self._records, None
        try:
            if records is not None:
                records.close()
        except OSError:  # what is left in its buffer
            pass


def open_board(folder: Path, resume_step: int) -> Board | None:
    """Open the event file of a run that continues after `resume_step`; None where TensorBoard is not installed."""
    try:
        return Board(folder, resume_step + 1)
    except ImportError:
        _log.info("TensorBoard is not installed: metrics go to metrics.jsonl only (%s)", install_command("tensorboard"))
        return None
