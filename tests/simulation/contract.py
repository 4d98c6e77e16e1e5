"""The actors and the ranks of `test_contract`, which run on Ray and in the simulation."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import torch

from multitask.cluster.interface import Actor, Cluster


class OddError(ValueError):
    """An error that a method raises on purpose."""


class Notebook:
    """An actor that writes down what it is told."""

    def __init__(self, cluster: Cluster, first: str) -> None:
        self._cluster = cluster
        self._lines = [first]
        self._kept: list[Any] = []

    def write(self, line: Any) -> list[Any]:
        self._lines.append(line)
        return self._lines

    def process(self) -> int:
        return self._cluster.process_id()

    def me(self) -> Actor:
        return self._cluster.this_actor()

    def total(self, values: list[int], array: np.ndarray) -> tuple[int, bool]:
        """Return the sum of both, and whether the array may be written to."""
        return sum(values) + int(array.sum()), array.flags.writeable

    def fail(self) -> None:
        raise OddError("odd")

    def sleep(self, seconds: float) -> str:
        self._cluster.clock.sleep(seconds)
        return "slept"

    def store(self, value: Any) -> dict[str, Any]:
        return {"value": self._cluster.put(value)}

    def answer_with_stored(self, value: Any) -> tuple[str, list[dict[str, Any]]]:
        return "about", [{"a": self._cluster.put(value)}, {"b": self._cluster.put(value)}]

    def die_after(self, path: str) -> str:
        """Do something, and die before the answer is sent."""
        Path(path).write_text("done", encoding="utf-8")
        self._cluster.kill(self._cluster.this_actor())
        self._cluster.clock.sleep(60)
        return "never"


class Gate:
    """An actor with coroutines."""

    def __init__(self) -> None:
        self._event: asyncio.Event | None = None
        self._lines: list[str] = []

    async def pass_through(self, name: str) -> list[str]:
        """Wait until the gate opens; return what happened before."""
        self._event = self._event or asyncio.Event()
        self._lines.append(f"{name} waits")
        await self._event.wait()
        self._lines.append(f"{name} passes")
        await asyncio.sleep(0)
        return list(self._lines)

    async def ask(self, other: Actor, line: str) -> list[str]:
        """Wait for another actor's answer."""
        answer: list[str] = await other.write.remote(line)
        return answer

    async def note(self, line: str) -> None:
        self._lines.append(line)

    async def lines(self) -> list[str]:
        return list(self._lines)

    def open(self) -> list[str]:
        assert self._event is not None
        self._event.set()
        return list(self._lines)


class Leader:
    """The leader of a group of ranks."""

    def __init__(self) -> None:
        self._losses: list[str] = []
        self._results: dict[int, Any] = {}
        self._starts = 0

    async def lose(self, text: str) -> None:
        self._losses.append(text)

    async def count_start(self) -> int:
        self._starts += 1
        return self._starts

    async def starts(self) -> int:
        return self._starts

    async def report(self, rank: int, result: Any) -> None:
        self._results[rank] = result

    async def state(self) -> tuple[list[str], dict[int, Any]]:
        return self._losses, self._results


def rank_work(cluster: Cluster, leader: Actor) -> None:
    """Sum with the other rank. In the first group rank 1 dies before its second sum."""
    together = cluster.collectives()
    start = together.broadcast(cluster.get(leader.count_start.remote()) if together.rank == 0 else None)
    found = together.gather(f"rank {together.rank}")
    pair = together.members([0, 1])
    tensor = torch.tensor([1.0, 2.0]) * (1 + together.rank)
    pair.start_sum(tensor).wait()
    if start == 1 and together.rank == 1:
        cluster.kill(cluster.this_actor())
        cluster.clock.sleep(60)
    first, second = torch.tensor([float(together.rank)]), torch.tensor([10.0])
    sums = [pair.start_sum(first), pair.start_sum(second)]
    for each in sums:
        each.wait()
    cluster.get(leader.report.remote(together.rank, (start, found, tensor.tolist(), first.item(), second.item())))


def rank_without_an_end(cluster: Cluster, leader: Actor) -> None:
    """Work for ever."""
    cluster.get(leader.count_start.remote())
    while True:
        cluster.clock.sleep(1.0)
