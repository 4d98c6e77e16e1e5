"""Connections to Ray: the session that exists, a cluster, or a Ray of the run's own."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import ray

from multitask.startup import RUN_PROCESS

RAY_STARTS = 3
"""Times that a Ray of the run's own is tried to start."""
OPTIONS: dict[str, Any] = {
    "log_to_driver": False,
    "logging_level": logging.ERROR,
    "runtime_env": {"env_vars": {RUN_PROCESS: "1"}},
}
"""Options of `ray.init` for every connection that a run makes."""

log = logging.getLogger(__name__)


@contextlib.contextmanager
def ray_session() -> Iterator[None]:
    """Ray for a run: the session that exists, the cluster that RAY_ADDRESS names, or one in this process."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    if address == "local":
        # Ray would keep up to a hundred objects that nobody needs any more for a second, and meanwhile put gradients
        # and values into memory never touched before, with a page fault for every 4 KiB.
        os.environ.setdefault("RAY_free_objects_batch_size", "1")
        start_ray()
    else:
        ray.init(address=address, **OPTIONS)
    try:
        yield
    finally:
        ray.shutdown()


def start_ray(**options: Any) -> None:
    """Start Ray on this machine, again where it fails: it gives its own processes half a minute, which is little where
    others keep the machine busy.

    Args:
        options: of `ray.init`.
    """
    for tries_left in reversed(range(RAY_STARTS)):
        try:
            ray.init(address="local", include_dashboard=False, **OPTIONS, **options)
            break
        except Exception as error:  # of no type of its own
            ray.shutdown()
            if not tries_left:
                raise
            log.warning("Ray did not start on this machine; it is tried again. (%s)", error)
