"""The server's log: one JSON object a line on stderr, for people and log collectors."""

import contextlib
import datetime
import json
import logging
import os
import queue
import threading
import time

# What a record may carry beside its message, by `extra=`.
_FIELDS = ("event", "model", "version", "method", "code")
# Lines that wait to be written. If nobody reads stderr, further ones are dropped.
_MAX_WAITING = 1000
# How long the end of the process waits for them.
_FLUSH_SECONDS = 1


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        entry = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "message": record.getMessage(),
        }
        entry |= {field: getattr(record, field) for field in _FIELDS if hasattr(record, field)}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class _Handler(logging.Handler):
    """Writes in a separate thread: a full pipe or disk delays no request."""

    def __init__(self):
        super().__init__()
        self._lines: queue.Queue[str] = queue.Queue(_MAX_WAITING)
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(self.format(record) + "\n")

    def flush(self) -> None:
        deadline = time.monotonic() + _FLUSH_SECONDS
        while self._lines.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.01)

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            # A full disk may have room again for a later line.
            with contextlib.suppress(OSError):
                os.write(2, line.encode())
            self._lines.task_done()


def set_up() -> None:
    """Sends what this process logs, from level INFO on, to stderr."""
    handler = _Handler()
    handler.setFormatter(_Formatter())
    logging.basicConfig(handlers=[handler], level=logging.INFO)
