"""Records on their way to MLflow: a file keeps them until they are sent, and a thread sends them."""

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from multitask.run.records import Record, from_line, to_line
from patches.files import write_atomic

OUTBOX = "tracking.jsonl"
"""File in the run directory with the records that MLflow does not have yet, a line of JSON each."""
TAKEN_BYTES = 1 << 16
"""Size of the part of the file that is sent at once, which is about a thousand numbers."""
PAUSE_S = 1.0
"""Time between two looks for new records."""
LONGEST_PAUSE_S = 60.0
"""Longest time between two attempts while MLflow cannot be reached."""
AGAIN_S = 0.5
"""Time between two attempts while somebody waits for them; otherwise the first of doubling times."""

log = logging.getLogger(__name__)


class Outbox:
    """A file of records, in the order in which they were added. It exists only while records wait in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._unwritten: list[bytes] = []
        self._sent = 0  # bytes at the start of the file whose records are sent
        self._closed = False
        if path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self._unwritten.append(b"\n")  # ends the half line of a process that was killed

    def add(self, *records: Record) -> None:
        """Append records. If the disk is full they are kept in memory, and written later."""
        with self._lock:
            self._unwritten += map(to_line, records)
            self._write()

    def take(self) -> tuple[list[Record], int] | None:
        """Return the next records that are not sent, and the place in the file behind them; None if none waits.

        A damaged line is left out with a warning.
        """
        with self._lock:
            self._write()
            if not self.path.is_file():
                self._sent = 0
                return None
            with open(self.path, "rb") as file:
                file.seek(self._sent)
                lines = file.readlines(TAKEN_BYTES)
        if not lines:
            return None
        records = []
        for line in lines:
            try:
                records.append(from_line(line))
            except ValueError:
                if line.strip():
                    log.warning("%s: a damaged line is left out: %.100r", self.path, line)
        return records, self._sent + sum(map(len, lines))

    def sent(self, place: int) -> None:
        """Forget the records before a place that `take` returned."""
        with self._lock:
            if self._closed or not self.path.is_file():
                return
            self._sent = place
            size = self.path.stat().st_size
            if place >= size:
                self.path.unlink()
                self._sent = 0
            elif 2 * place >= size:  # otherwise a file that never becomes empty would grow for ever
                with open(self.path, "rb") as file:
                    file.seek(place)
                    rest = file.read()
                with contextlib.suppress(OSError):  # the disk may be full
                    write_atomic(self.path, rest)
                    self._sent = 0

    def waiting(self) -> int:
        """Return the number of records that are not sent."""
        with self._lock:
            written = 0
            if self.path.is_file():
                with open(self.path, "rb") as file:
                    file.seek(self._sent)
                    written = sum(1 for _ in file)
            return written + len(self._unwritten)

    def close(self) -> None:
        """Leave the file as it is from now on: it belongs to whoever sends it later."""
        with self._lock:
            self._write()
            self._closed = True

    def _write(self) -> None:
        if not self._unwritten or self._closed:
            return
        content = b"".join(self._unwritten)
        try:
            with open(self.path, "ab", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                if file.write(content) < len(content):
                    file.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            log.debug("%s cannot be written now: %s", self.path, error)
        else:
            self._unwritten.clear()


class Sender:
    """Sends the records of an outbox from a thread of its own, so that training never waits for MLflow."""

    def __init__(self, outbox: Outbox, send: Callable[[Sequence[Record]], None]) -> None:
        """Args:
        send: sends records, also an empty list. An exception means that they have to be sent again.
        """
        self._outbox, self._send = outbox, send
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._asked: list[threading.Event] = []
        self._trouble: Exception | None = None
        self._parts = 0  # sent so far
        self._warned = False
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def flush(self, timeout_s: float) -> Exception | None:
        """Send what waits now, and return the error that prevents it, or None.

        Args:
            timeout_s: longest time without any part of it being sent.
        """
        done, parts = threading.Event(), self._parts
        with self._lock:
            self._asked.append(done)
        self._wake.set()
        while not done.wait(timeout_s):
            if parts == self._parts:
                return TimeoutError(f"it has not answered for {timeout_s:.0f} seconds")
            parts = self._parts
        return self._trouble

    def settle(self, timeout_s: float, again_s: float) -> Exception | None:
        """Send what waits now, with several attempts, and return the error that prevents it, or None.

        Args:
            timeout_s: as for `flush`.
            again_s: time in which a failed attempt is repeated.
        """
        deadline = time.monotonic() + again_s
        while (trouble := self.flush(timeout_s)) is not None and time.monotonic() < deadline:
            time.sleep(AGAIN_S)
        return trouble

    def warn(self, trouble: Exception) -> None:
        """Say once that records cannot be sent now."""
        if not self._warned and not self._stopped:
            self._warned = True
            log.warning(
                "MLflow cannot be reached (%s). Training does not wait for it: the records are kept in %s and sent "
                "later.",
                in_short(trouble),
                self._outbox.path,
            )

    def stop(self) -> None:
        """End the thread after its present attempt. The outbox stays as it is."""
        self._stopped = True
        self._outbox.close()
        self._wake.set()

    def _work(self) -> None:
        failures = 0
        while not self._stopped:
            self._wake.clear()
            with self._lock:
                asked, self._asked = self._asked, []
            trouble = self._attempt()
            if trouble is not None and not asked:  # who asks warns himself
                self.warn(trouble)
            elif trouble is None and self._warned:
                self._warned = False
                log.warning("MLflow can be reached again, and has all records.")
            self._trouble = trouble
            for event in asked:
                event.set()
            failures = 0 if trouble is None else failures + 1
            self._wake.wait(min(AGAIN_S * 2.0 ** min(failures, 10), LONGEST_PAUSE_S) if failures else PAUSE_S)

    def _attempt(self) -> Exception | None:
        """Send everything that waits, and return the error that prevents it, or None."""
        try:
            self._send([])  # connects, so that a store that cannot be used is known from the start
            while not self._stopped and (taken := self._outbox.take()) is not None:
                records, place = taken
                self._send(records)
                self._outbox.sent(place)
                self._parts += 1
        except Exception as error:  # of any kind: the store's, the network's, the disk's
            return error
        return None


def in_short(error: Exception) -> str:
    """Return the text of an error on one line of at most 200 characters."""
    text = " ".join(str(error).split()) or repr(error)
    return text if len(text) <= 200 else text[:197] + "..."
