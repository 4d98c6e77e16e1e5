"""A cluster in the test's own process, whose calls are answered at once and whose clock stands still between sleeps."""

import asyncio
import contextlib
import itertools
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from types import SimpleNamespace
from typing import Any

import ray.util.metrics

from multitask.cluster.arithmetic import Node


class FakeClock:
    """A sleep sets the clock forward, and returns at once."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._ns = itertools.count(1)

    def monotonic(self) -> float:
        return self._now_s

    def time_ns(self) -> int:
        return next(self._ns)

    def sleep(self, seconds: float) -> None:
        self._now_s += seconds


class FakeActor:
    """A handle of an object in this process. A call is carried out when it is sent."""

    def __init__(self, of: Any) -> None:
        self._of = of

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=partial(self._send, method))

    def _send(self, method: str, *arguments: Any) -> "Future[Any]":
        answer: Future[Any] = Future()
        try:
            result = getattr(self._of, method)(*arguments_of(arguments))
            answer.set_result(asyncio.run(result) if asyncio.iscoroutine(result) else result)
        except Exception as error:
            answer.set_exception(error)
        return answer


def arguments_of(sent: Iterable[Any]) -> list[Any]:
    """The arguments that arrive: a value in the place of its reference."""
    return [argument.result() if isinstance(argument, Future) else argument for argument in sent]


class FakeCluster:
    """The methods of `multitask.cluster.interface.Cluster`. A reference is a Future, which is done from the start."""

    metrics = ray.util.metrics
    session = contextlib.nullcontext

    def __init__(self, nodes: Iterable[Node] = (Node({"CPU": 64.0}),), *, grows: bool = False) -> None:
        self._nodes, self._grows = list(nodes), grows
        self.clock = FakeClock()
        self.killed: list[Any] = []

    def can_grow(self) -> bool:
        return self._grows

    def nodes(self) -> dict[str, Node]:
        return {f"node {number}": node for number, node in enumerate(self._nodes)}

    def free_resources(self) -> dict[str, float]:
        return {}

    def this_node(self) -> str:
        return "node 0"

    def this_actor(self) -> None: ...

    def process_id(self) -> int:
        return os.getpid()

    def log_to_stderr(self, about: Any) -> None: ...

    def reserve(self, *_: Any, **__: Any) -> str:
        return "places"

    def release(self, places: Any) -> None: ...

    def start(self, kind: type, arguments: Sequence[Any], process: Any) -> Any:  # noqa: ARG002
        return FakeActor(kind(*arguments_of(arguments)))

    def kill(self, actor: Any, *, restart: bool = False) -> None:  # noqa: ARG002
        self.killed.append(actor)

    def put(self, value: Any) -> Any:
        stored: Future[Any] = Future()
        stored.set_result(value)
        return stored

    def get(self, ref: Any, timeout_s: float | None = None) -> Any:  # noqa: ARG002
        return ref.result()

    def fetch(self, answer: list[Any]) -> Any:
        about, parts = self.get(answer.pop())
        return about, [{name: self.get(ref) for name, ref in part.items()} for part in parts]

    def wait(self, refs: Sequence[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return list(refs), []

    # A test with ranks says what they do.

    def run_ranks(self, ranks: Any, work: Any, leader: Any) -> Any:
        raise NotImplementedError

    def collectives(self) -> Any:
        raise NotImplementedError
