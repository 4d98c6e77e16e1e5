"""Connections to Ray: an existing session, a cluster, or a Ray that the run starts on this machine."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import ray

from multitask.startup import RUN_PROCESS

RAY_STARTS = 3
"""Number of attempts to start Ray on this machine."""
OPTIONS: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
"""Options of `ray.init` for every connection that a run makes."""

log = logging.getLogger(__name__)


@contextlib.contextmanager
def ray_session() -> Iterator[None]:
    """Connect to Ray while the block runs.

    It uses the session of this process if there is one, else the cluster that the environment variable RAY_ADDRESS
    names, else a Ray that it starts on this machine.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    with _own_sigterm_handler():
        _connect(address)
    try:
        yield
    finally:
        ray.shutdown()


def _connect(address: str) -> None:
    """Start Ray on this machine if the address is "local", else join the cluster at the address."""
    if address == "local":
        # By default Ray keeps up to a hundred unused objects for a second. Meanwhile it puts new gradients and values
        # into memory that was never used before, with a page fault for every 4 KiB.
        os.environ.setdefault("RAY_free_objects_batch_size", "1")
        start_ray()
    else:
        ray.init(address=address, runtime_env={"env_vars": {RUN_PROCESS: "1"}}, **OPTIONS)


def start_ray(**options: Any) -> None:
    """Start Ray on this machine, with several attempts.

    Ray gives its own processes half a minute to start, which is not always enough on a busy machine.

    Args:
        options: further options of `ray.init`.
    """
    for tries_left in reversed(range(RAY_STARTS)):
        try:
            # A runtime environment would set the variable too, but starts each process through a second Python.
            with _environment_variable(RUN_PROCESS, "1"):
                ray.init(address="local", include_dashboard=False, **OPTIONS, **options)
            break
        except Exception as error:  # Ray raises no type of its own
            ray.shutdown()
            if not tries_left:
                raise
            log.warning("Ray did not start on this machine and is started again. (%s)", error)


@contextlib.contextmanager
def _own_sigterm_handler() -> Iterator[None]:
    """Keep the handler of SIGTERM that a run has set. Ray sets one that ends its processes before a checkpoint."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _environment_variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for the processes that this process starts while the block runs."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
