"""Engines: how the gradients of all workers are combined into updates. Each engine is a function, with the same
arguments and result."""

from collections.abc import Callable

from multitask.engines import allreduce, local, served
from multitask.engines.interface import Driver, OnNews, Outcome
from multitask.job.job import Job

ENGINES: dict[str, Callable[[Job, Driver], Outcome]] = {
    "allreduce": allreduce.run,
    "async": served.run,
    "bounded": served.run,
    "local": local.run,
    "sync": served.run,
}

__all__ = ["ENGINES", "Driver", "OnNews", "Outcome"]
