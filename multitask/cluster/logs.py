"""Logs of a run, with one JSON object per line: time, level, run, task, worker, step, event and measured numbers."""

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path

LOG = "log.jsonl"
ABOUT = ("run", "task", "worker", "step")
"""Keys that tell what a line is about. A logging call gives them as `extra`."""
NUMBERS = ("version", "top1", "top5", "loss")
"""Keys of what was measured: accuracies are in percent. A logging call gives them as `extra` too."""
PACKAGE = logging.getLogger("multitask")
"""Logger of this package."""


class JsonLines(logging.Formatter):
    """Formatter that writes a record as one line of JSON."""

    def __init__(self, about: Callable[[], Mapping[str, object]]) -> None:
        """Args:
        about: called for each line; returns values of the keys `ABOUT`, which the line's own `extra` overrides.
        """
        super().__init__()
        self._about = about

    def format(self, record: logging.LogRecord) -> str:
        about = {**self._about(), **vars(record)}
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            **{key: about[key] for key in ABOUT if key in about},
            "event": record.getMessage(),
            **{key: about[key] for key in NUMBERS if key in about},
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class LogFile(WatchedFileHandler):
    """A log file that the run can do without: lines that cannot be written are left out.

    If the file is removed, the next line begins it anew.
    """

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def log_to(path: Path, run: str) -> Iterator[None]:
    """Append the log records of this package to a file while the block runs. Warnings are still shown on stderr."""
    file = LogFile(path, encoding="utf-8")
    file.setFormatter(JsonLines(lambda: {"run": run}))
    handlers: list[logging.Handler] = [file]
    if not PACKAGE.hasHandlers():  # logging itself would have shown warnings; errors are raised too
        shown = logging.StreamHandler()
        shown.addFilter(lambda record: record.levelno == logging.WARNING)
        handlers.append(shown)
    level = PACKAGE.level
    PACKAGE.setLevel(logging.INFO)
    for handler in handlers:
        PACKAGE.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            PACKAGE.removeHandler(handler)
        PACKAGE.setLevel(level)
        file.close()


def log_to_stderr(about: Callable[[], Mapping[str, object]]) -> None:
    """Make this package write its log records as lines of JSON to stderr, and nowhere else.

    It is for processes that only serve a run: Ray keeps their stderr.

    Args:
        about: as for `JsonLines`.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines(about))
    PACKAGE.handlers = [handler]
    PACKAGE.setLevel(logging.INFO)
    PACKAGE.propagate = False
