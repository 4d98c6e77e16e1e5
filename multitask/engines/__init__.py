"""Engines: how the gradients of all workers meet. One function each, with the same arguments and result."""

from collections.abc import Callable

from multitask.engines import asynchronous, local
from multitask.engines.interface import Outcome, Watch
from multitask.job import Job

ENGINES: dict[str, Callable[[Job, Watch], Outcome]] = {"async": asynchronous.run, "local": local.run}

__all__ = ["ENGINES", "Outcome", "Watch"]
