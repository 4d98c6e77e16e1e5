"""Stopping a run from outside: Ctrl-C, and SIGTERM, which docker, Slurm and Kubernetes send."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class Stopped(KeyboardInterrupt):
    """Training stopped on Ctrl-C or SIGTERM and left a checkpoint. The message says how to go on."""

    exit_status = 128 + signal.SIGINT
    """Exit status of a command that ends with this exception: 130 after Ctrl-C, 143 after SIGTERM."""


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does while the block runs, and note it in a `Stopped` that leaves the block."""
    arrived = False

    def handle(_number: int, _frame: FrameType | None) -> None:
        nonlocal arrived
        arrived = True
        signal.raise_signal(signal.SIGINT)

    try:
        with _handled(signal.SIGTERM, handle):
            yield
    except Stopped as stop:
        if arrived:
            stop.exit_status = 128 + signal.SIGTERM
        raise


@contextlib.contextmanager
def first_interrupt(call: Callable[[], None]) -> Iterator[None]:
    """Handle the first Ctrl-C by calling a function. The next Ctrl-C has its usual effect.

    A shell lets its background jobs ignore Ctrl-C. There, the next one raises KeyboardInterrupt too, because a second
    SIGTERM arrives as a Ctrl-C.
    """

    def handle(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before if callable(before) else signal.default_int_handler)
        call()

    with _handled(signal.SIGINT, handle) as before:
        yield


@contextlib.contextmanager
def _handled(number: int, handle: Callable[[int, FrameType | None], None]) -> Iterator[Any]:
    """Set a signal handler while the block runs, and yield the handler before; only the main thread can do that."""
    if threading.current_thread() is not threading.main_thread():
        yield None
        return
    before = signal.signal(number, handle)
    try:
        yield before
    finally:
        signal.signal(number, before)
