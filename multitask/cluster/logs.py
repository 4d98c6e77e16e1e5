"""What happens in a run, one JSON object a line: when, how grave, of which run, task, worker and step, and what."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

LOG = "log.jsonl"
ABOUT = ("run", "task", "worker", "step")
"""What a line may say of itself; a call gives it as `extra`."""
PACKAGE = logging.getLogger("multitask")


class JsonLines(logging.Formatter):
    """A record as one line of JSON."""

    def __init__(self, about: Callable[[], Mapping[str, object]]) -> None:
        """Args:
        about: what is true of every line at its moment, where the line itself does not say otherwise.
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
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


@contextlib.contextmanager
def log_to(path: Path, run: str) -> Iterator[None]:
    """Append what this package notes to a file while the block runs; warnings are still shown."""
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(JsonLines(lambda: {"run": run}))
    handlers: list[logging.Handler] = [file]
    if not PACKAGE.hasHandlers():  # then logging itself would have shown warnings; errors are raised as well
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
    """For a process of a run's own, whose stderr Ray keeps: from now on this package writes lines of JSON there alone.

    Args:
        about: as `JsonLines` takes it.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines(about))
    PACKAGE.handlers = [handler]
    PACKAGE.setLevel(logging.INFO)
    PACKAGE.propagate = False
