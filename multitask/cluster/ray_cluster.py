"""The cluster of `multitask.cluster.interface`, by Ray."""

import functools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import ray
import ray.util.metrics
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from multitask.cluster.arithmetic import Node
from multitask.cluster.collectives import Collectives, TorchCollectives
from multitask.cluster.interface import Actor, GroupRun, OnNode, Places, Process, Ranks, Ref, Reserved, Search, Value
from multitask.cluster.logs import log_to_stderr
from multitask.cluster.ray_ranks import start_ranks
from multitask.cluster.session import ray_session

STRATEGIES: Mapping[Search, str | None] = {Search.PARENT: None, Search.ANYWHERE: "DEFAULT", Search.SPREAD: "SPREAD"}
FETCHING = threading.Lock()
"""Held while a thread of this process fetches what an answer refers to."""


@functools.cache
def remote_class(kind: type) -> Any:
    """Return a class of actors; Ray sends it to the cluster once."""
    return ray.remote(kind)


class RayCluster:
    """The Ray cluster that this process is connected to."""

    clock = time
    metrics = ray.util.metrics

    def session(self) -> AbstractContextManager[None]:
        return ray_session()

    def can_grow(self) -> bool:
        return os.environ.get("RAY_ADDRESS", "local") != "local"

    def nodes(self) -> dict[str, Node]:
        return {node["NodeID"]: Node(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]}

    def free_resources(self) -> dict[str, float]:
        free: dict[str, float] = ray.available_resources()
        return free

    def this_node(self) -> str:
        name: str = ray.get_runtime_context().get_node_id()
        return name

    def this_actor(self) -> Actor:
        return ray.get_runtime_context().current_actor

    def process_id(self) -> int:
        return os.getpid()

    def log_to_stderr(self, about: Callable[[], Mapping[str, object]]) -> None:
        log_to_stderr(about)

    def reserve(
        self, bundles: Sequence[Mapping[str, float]], labels: Sequence[Mapping[str, str]], spread: bool
    ) -> Places:
        strategy = "SPREAD" if spread else "PACK"
        selectors = [dict(wanted) for wanted in labels]
        return placement_group([dict(bundle) for bundle in bundles], strategy=strategy, bundle_label_selector=selectors)

    def release(self, places: Places) -> None:
        remove_placement_group(places)

    def start(self, kind: type, arguments: Sequence[Any], process: Process) -> Actor:
        strategy: Any
        match process.place:
            case Reserved(places, number):
                strategy = PlacementGroupSchedulingStrategy(places, number)
            case OnNode(node):
                strategy = NodeAffinitySchedulingStrategy(node, soft=False)
            case search:
                strategy = STRATEGIES[search]
        return (
            remote_class(kind)
            .options(
                num_cpus=process.cpus,
                num_gpus=process.gpus,
                resources=dict(process.resources),
                label_selector=dict(process.labels) or None,
                scheduling_strategy=strategy,
                max_restarts=-1 if process.restarts else 0,
                max_concurrency=process.threads if process.threads > 1 else None,
            )
            .remote(*arguments)
        )

    def kill(self, actor: Actor, *, restart: bool = False) -> None:
        ray.kill(actor, no_restart=not restart)

    def put(self, value: Value) -> Ref[Value]:
        ref: Ref[Value] = ray.put(value)
        return ref

    def get(self, ref: Ref[Value], timeout_s: float | None = None) -> Value:
        value: Value = ray.get(cast(Any, ref), timeout=timeout_s)
        return value

    def fetch(self, answer: list[Ref[Any]]) -> Any:
        """See `Cluster.fetch`.

        Threads of one process fetch one after another. When a process gives up its last reference to an object, Ray
        (2.60.0) forgets the object in two steps. If another thread receives a reference between the two steps, Ray
        forgets this reference too, and a `get` of it never ends. So this method gives up all its references, the one to
        the answer included, before another thread may receive any.
        """
        ray.wait(answer)
        with FETCHING:
            about, parts = ray.get(cast(Any, answer.pop()))
            found = iter(ray.get([ref for part in parts for ref in part.values()]))
            values = [{name: next(found) for name in part} for part in parts]
            del parts
        return about, values

    def wait(
        self, refs: Sequence[Ref[Any]], *, count: int = 1, timeout_s: float | None = None
    ) -> tuple[list[Ref[Any]], list[Ref[Any]]]:
        ready, others = ray.wait(list(refs), num_returns=count, timeout=timeout_s)
        return ready, others

    def run_ranks(self, ranks: Ranks, work: Callable[..., None], leader: Actor) -> GroupRun:
        return start_ranks(self, ranks, work, leader)

    def collectives(self) -> Collectives:
        return TorchCollectives()
