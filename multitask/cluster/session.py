"""Connections to Ray: an existing session, a cluster, or a Ray that the run starts on this machine."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import ray

from multitask.startup import RUN_PROCESS

RAY_STARTS = 3
"""Number of attempts to start Ray on this machine."""
RUNTIME_ENV = {"env_vars": {RUN_PROCESS: "1"}}
"""Runtime environment of the processes that a run starts. Each actor asks for it too, because the session may be one
that the user has opened."""
OPTIONS: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "runtime_env": RUNTIME_ENV}
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
    if address == "local":
        # By default Ray keeps up to a hundred unused objects for a second. Meanwhile it puts new gradients and values
        # into memory that was never used before, with a page fault for every 4 KiB.
        os.environ.setdefault("RAY_free_objects_batch_size", "1")
        start_ray()
    else:
        ray.init(address=address, **OPTIONS)
    try:
        yield
    finally:
        ray.shutdown()


def start_ray(**options: Any) -> None:
    """Start Ray on this machine, with several attempts.

    Ray gives its own processes half a minute to start, which is not always enough on a busy machine.

    Args:
        options: further options of `ray.init`.
    """
    for tries_left in reversed(range(RAY_STARTS)):
        try:
            ray.init(address="local", include_dashboard=False, **OPTIONS, **options)
            break
        except Exception as error:  # Ray raises no type of its own
            ray.shutdown()
            if not tries_left:
                raise
            log.warning("Ray did not start on this machine and is started again. (%s)", error)
