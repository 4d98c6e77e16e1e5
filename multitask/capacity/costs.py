"""Costs of a push at the parameter server, as laws that are fitted to the server's measured throughput."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Law:
    """Seconds of a push and its reply: a constant for each shard, plus a multiple of the time of one copy in memory."""

    shard_s: float
    """Seconds for each shard."""
    copies: float
    """Number of copies of the pushed bytes that take the remaining time."""

    def seconds(self, copy_s: float, shards: int = 1) -> float:
        """Return the seconds of a push.

        Args:
            copy_s: seconds of one copy of the pushed bytes in memory.
        """
        return self.shard_s * shards + self.copies * copy_s


@dataclass(frozen=True)
class ServerCosts:
    """Laws of the costs of a push."""

    trip: Law
    """Time from the gradient in the worker to the new values in the worker, if no other worker uses the server."""
    own: Law
    """Part of the trip in which the worker itself is busy: it stores the gradients, and maps and copies the values."""
    thread: Law
    """Time of one shard's thread for its part of the bytes: it looks for values that are not finite, updates and
    publishes."""
    check: Law
    """Part of the thread's time in which it looks for values that are not finite. Where the pushes of a round are
    applied together, this is done when a push arrives, and the rest at the end of the round."""
    cores: Law
    """Core seconds of all processes together, including those of Ray, on a machine whose cores are all in use."""


# The result of fit() on benchmarks/results/server_throughput_2cpu_2026-11-27.json, which
# `python -m benchmarks.server_throughput --out FILE` wrote. A test compares the two.
SERVER_COSTS = ServerCosts(
    trip=Law(shard_s=0.01613, copies=5.617),
    own=Law(shard_s=0.004677, copies=1.854),
    thread=Law(shard_s=0.006386, copies=3.068),
    check=Law(shard_s=0.00124, copies=0.6061),
    cores=Law(shard_s=0.02536, copies=8.746),
)


def fit(figures: Mapping[str, Any]) -> ServerCosts:
    """Fit the laws to the JSON of `benchmarks.server_throughput`, by least squares of relative errors.

    The fit reads the rows with the fewest and with the most workers. The fewest workers give the times of one push, and
    both give its core seconds.
    """
    rows = [row for row in figures["rows"] if "GB/s" in row]
    fewest, most = (choose(row["workers"] for row in rows) for choose in (min, max))
    stages = {(row["model"], row["shards"]): row for row in _stages(figures)}
    copies_s = copy_seconds(figures)
    points: dict[str, list[Point]] = {"trip": [], "own": [], "cores": []}
    for row in rows:
        stage, shards, push_s = stages[row["model"], row["shards"]], row["shards"], 1 / pushes_per_s(row, figures)
        copy_s = copies_s[row["model"]]
        if row["workers"] == fewest:
            points["trip"].append((shards, copy_s, fewest * push_s))
            points["own"].append((shards, copy_s, _seconds(stage, "put", "map", "copy")))
            points["cores"].append((shards, copy_s, row["cores"] * push_s))
        elif row["workers"] == most:
            points["cores"].append((shards, copy_s, figures["environment"]["cores"] * push_s))
    return ServerCosts(
        thread=fit_stages(figures, "check", "update", "publish"),
        check=fit_stages(figures, "check"),
        **{name: _fit_law(found) for name, found in points.items()},
    )


def fit_stages(figures: Mapping[str, Any], *names: str) -> Law:
    """Fit a law to some stages of a push in a shard's thread.

    The points come from runs with one shard and the fewest workers, in which the thread has a core to itself.
    """
    copies_s = copy_seconds(figures)
    return _fit_law(
        [(1, copies_s[row["model"]], _seconds(row, *names)) for row in _stages(figures) if row["shards"] == 1]
    )


def _stages(figures: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the rows with the stages of a push of the fewest workers."""
    fewest = min(row["workers"] for row in figures["rows"] if "GB/s" in row)
    return [row for row in figures["rows"] if row["table"].startswith(f"One push and pull in ms, {fewest} worker")]


Point = tuple[int, float, float]
"""Number of shards, seconds of a copy, and the seconds that were measured."""


def pushes_per_s(row: Mapping[str, Any], figures: Mapping[str, Any]) -> float:
    """Return the pushes per second of a row of `benchmarks.server_throughput`.

    The row counts the bytes of pushes and of replies.
    """
    floats = figures["settings"]["floats"][row["model"]]
    return float(row["GB/s"]) * 1e9 / (2 * FLOAT_BYTES * floats)


def copy_seconds(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return for each model the seconds of one copy of its bytes in memory, from `benchmarks.server_throughput`.

    They are the median of all sessions. A session times its copies at one moment only, while its pushes cover a long
    time in which the machine's speed changes, so one session's copies may be unusually slow or fast.
    """
    sessions: dict[str, list[float]] = {}
    for row in figures["rows"]:
        if "GB/s" in row:
            sessions.setdefault(row["model"], []).append(row["ms"] / row["memcpys"] / 1000)
    return {model: median(copies) for model, copies in sessions.items()}


def _seconds(stage: Mapping[str, Any], *names: str) -> float:
    """Return the sum of some stages of a push, which the JSON has in milliseconds."""
    return sum(stage[name] for name in names) / 1000


def _fit_law(points: Sequence[Point]) -> Law:
    """Fit a law by least squares of relative errors."""
    taken = np.array([point[:2] for point in points])
    found = np.array([point[2] for point in points])
    shard_s, copies = np.linalg.lstsq(taken / found[:, None], np.ones(len(points)), rcond=None)[0]
    return Law(shard_s=float(shard_s), copies=float(copies))
