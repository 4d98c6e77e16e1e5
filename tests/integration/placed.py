"""Runs jobs on a simulated cluster to which nodes are added that differ, and says which worker was on which node.

`python -m tests.integration.placed FOLDER` reads job specs from the folder and writes what it found to `found.json`
there, as one JSON object with the names of the specs:

- `growing` trains while the cluster grows from one node to two. `places` (worker -> names of the nodes where it was, in
  that order), `made` (worker -> its steps, in the order in which they counted), `processes` (worker -> the process of
  each of them), `losses` (times that something was lost) and `final` (SHA-256 of the values in the last checkpoint).
  Some steps after two processes have trained the job stops: how fast nodes and processes start decides nothing.
- `bound` waits for a third node: `places` (worker -> name of its node) and `again` (the same of the processes that took
  the workers' places).
- `pack`, `spread`: worker -> name of the node where a place is reserved for it. No process starts.
- `allreduce`: worker -> steps made.
- `too_many`: the error.
"""

import hashlib
import json
import logging
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table, remove_placement_group

from multitask.cluster.places import PlacementError, demands, reserve
from multitask.cluster.ray_cluster import RayCluster
from multitask.engines.crew import actors
from multitask.job.checkpoint import Checkpoint
from multitask.job.job import Job
from multitask.server.messages import StepRecord
from multitask.spec.reading import load_spec
from multitask.startup import RUN_PROCESS
from tests.conftest import EngineRun, run_engine, store_of, wait_until


class Nodes:
    """The nodes beside the head: each has one CPU."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.names: dict[str, str] = {}
        """Ray's name of a node -> our name."""

    def add(self, name: str, **settings: Any) -> None:
        self.names[self._cluster.add_node(num_cpus=1, **settings).node_id] = name


class Growth:
    """Adds a node to the cluster once a job trains, and notes who trains."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._made: Counter[int] = Counter()
        """Process -> steps made there."""

    def __call__(self, records: list[StepRecord]) -> None:
        """Look at the steps that were made."""
        self._made.update(record.pid for record in records)
        if len(self._nodes.names) == 1 and self._made:
            self._nodes.add("west", labels={"zone": "west"})

    def done(self) -> bool:
        return len(self._made) == 2 and min(self._made.values()) > 20


class Places(logging.Handler):
    """Notes where workers start."""

    def __init__(self, nodes: Nodes) -> None:
        super().__init__()
        self._nodes = nodes
        self.all: dict[str, list[str]] = {}
        """Worker -> the nodes where it was, in that order."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("Started on node"):
            node = self._nodes.names[str(record.args[0])]  # type: ignore[index]
            self.all.setdefault(vars(record)["worker"], []).append(node)


def main() -> None:
    os.environ[RUN_PROCESS] = "1"  # as a run sets it that starts Ray
    folder = Path(sys.argv[1])
    jobs = {path.stem: Job(load_spec(path)) for path in folder.glob("*.yaml")}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = Nodes(cluster)
        nodes.add("plain")
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        found: dict[str, Any] = {"growing": grown(jobs["growing"], nodes)}
        found["bound"] = held(jobs["bound"], nodes)
        found |= {name: reserved(jobs[name], nodes) for name in ("pack", "spread")}
        ran = run_engine(jobs["allreduce"])
        found["allreduce"] = {name: worker.step for name, worker in ran.progress.workers.items()}
        try:
            run_engine(jobs["too_many"])
        except PlacementError as error:
            found["too_many"] = str(error)
        (folder / "found.json").write_text(json.dumps(found))
    finally:
        ray.shutdown()
        cluster.shutdown()


def grown(job: Job, nodes: Nodes) -> dict[str, Any]:
    growth, places = Growth(nodes), Places(nodes)
    logging.getLogger("multitask").setLevel(logging.INFO)
    logging.getLogger("multitask").addHandler(places)
    ran = run_engine(job, wants_pause=growth.done, watch=growth)
    checkpoint = store_of(job).latest()
    assert checkpoint is not None
    mine = records_of(ran)
    return {
        "places": places.all,
        "made": {name: [record.step for record in records] for name, records in mine.items()},
        "processes": {name: [record.pid for record in records] for name, records in mine.items()},
        "losses": len(ran.outcome.recoveries),
        "final": values_hash(checkpoint),
    }


def records_of(ran: EngineRun) -> dict[str, list[StepRecord]]:
    return {name: [record for record in ran.records if record.worker == name] for name in ran.job.workers}


def values_hash(checkpoint: Checkpoint) -> str:
    found = hashlib.sha256()
    for name in sorted(checkpoint.tensors):
        if name.startswith("values/"):
            found.update(checkpoint.tensors[name].numpy().tobytes())
    return found.hexdigest()


def held(job: Job, nodes: Nodes) -> dict[str, Any]:
    """Where the workers of a run start that waits for its third node, and where those start that take their places."""
    with actors(RayCluster(), job, store_of(job)) as crew:
        nodes.add("data", resources={"data_pets": 1})

        def where() -> dict[str, str]:
            return {name: nodes.names[ray.get(crew.call(name, "node"))] for name in job.workers}

        first = where()
        for name in job.workers:
            crew.replace(name)
        return {"places": first, "again": where()}


def reserved(job: Job, nodes: Nodes) -> dict[str, str]:
    # Nothing of the job before is left.
    wait_until(lambda: ray.available_resources().get("CPU") == len(nodes.names))
    cluster = RayCluster()
    group = reserve(cluster, job.spec, demands(job.spec, list(cluster.nodes().values())))[0].places
    try:
        assert group.wait(60)
        where = placement_group_table(group)["bundles_to_node_id"]
        # The places of the server's shards come first.
        return {name: nodes.names[where[job.shards + number]] for number, name in enumerate(job.workers)}
    finally:
        remove_placement_group(group)


if __name__ == "__main__":
    main()
