"""A worker that computes nothing: it pushes a fixed gradient, pulls the values, and counts. It imports no torch."""

import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import ray

TIMEOUT_S = 300
Actor = Any


class Trip(NamedTuple):
    """One push and its reply: moments in seconds of the machine's monotonic clock."""

    begun: float
    sent: float
    """When the gradient is in the object store."""
    arrived: float
    """When the server's method begins."""
    applied: float
    """When the server's method ends."""
    answered: float
    """When the worker has the references to the values."""
    fetched: float
    """When the values are mapped into the worker's process."""
    copied: float
    """When the values are in the worker's own buffer."""
    check_s: float
    update_s: float
    publish_s: float
    """Parts of the server's method, in its own process: look for what is not finite, apply, put the values."""


class ShardShell:
    """A shard's actor. A process that gets its handle loads this class, which itself imports no torch."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._held = make()

    def begin(self, job: Any, number: int) -> int:
        return self._held.begin(job, number)

    def stash(self, key: Any, gradients: Any, names: Any) -> str | None:
        return self._held.stash(key, gradients, names)

    def follow(self, number: int, method: str, *arguments: Any) -> None:
        self._held.follow(number, method, *arguments)

    def read(self, names: Any) -> Any:
        return self._held.read(names)


class ServerShell:
    """The server's actor, wrapped as in `ShardShell`."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._held = make()

    async def begin(self, job: Any, shards: Sequence[Any], *incarnations: int) -> None:
        self._held.begin(job, shards, *incarnations)

    async def push_numbers(self, *arguments: Any) -> Any:
        return await self._held.push_numbers(*arguments)

    async def call(self, method: str) -> Any:
        return await self._held.call(method)


class Pusher:
    """A worker's communication, as in `multitask.engines.remote.RemoteServer`, without a model."""

    def __init__(
        self,
        name: str,
        ranges: Sequence[tuple[int, int]],
        group: str,
        server: Actor,
        shards: Sequence[Actor],
    ) -> None:
        """Args:
        ranges: start and stop of each shard's part of the gradient, in floats.
        group: the group's name.
        """
        self._name, self._ranges, self._group = name, list(ranges), group
        self._server, self._shards = server, list(shards)
        random = np.random.default_rng(0)
        self._gradient = random.standard_normal(ranges[-1][1], np.float32) * np.float32(1e-3)
        self._buffer = np.zeros_like(self._gradient)  # never empty pages: the first copy would pay for them
        self._buffer.fill(1.0)
        self._step = self._version = 0

    def imports_torch(self) -> bool:
        return "torch" in sys.modules

    def memcpy_s(self, repeats: int) -> float:
        """Return the median seconds of one copy of the buffer from memory to memory."""
        times = []
        for _ in range(repeats):
            start = time.monotonic()
            np.copyto(self._buffer, self._gradient)
            times.append(time.monotonic() - start)
        return median(times)

    def run(self, until: float) -> list[Trip]:
        """Push and pull in turns until a moment of the monotonic clock."""
        trips = []
        while time.monotonic() < until:
            trips.append(self._push_and_pull())
        return trips

    def _push_and_pull(self) -> Trip:
        begun = time.monotonic()
        parts = [{self._group: self._gradient[start:stop]} for start, stop in self._ranges]
        problems = [
            shard.stash.remote((self._name, 0, self._step), part, [self._group])
            for shard, part in zip(self._shards, parts[1:], strict=True)
        ]
        waiting = self._server.push_numbers.remote(self._name, self._step, self._version, parts[0], *problems)
        sent = time.monotonic()
        (version, rejected), refs, moments = ray.get(waiting, timeout=TIMEOUT_S)
        assert rejected is None, rejected
        answered = time.monotonic()
        values = ray.get([of_shard[self._group] for of_shard in refs], timeout=TIMEOUT_S)
        fetched = time.monotonic()
        for (start, stop), (part, _) in zip(self._ranges, values, strict=True):
            np.copyto(self._buffer[start:stop], part)
        copied = time.monotonic()
        self._step, self._version = self._step + 1, version
        arrived, applied, check_s, update_s, publish_s = moments
        return Trip(
            begun, sent, arrived, applied, answered, fetched, copied, check_s=check_s, update_s=update_s,
            publish_s=publish_s,
        )  # fmt: skip
