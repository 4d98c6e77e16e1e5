"""Runs jobs on a simulated cluster of nodes that differ, and says which worker was on which node.

`python -m tests.integration.placed SPEC ...` prints one JSON object for each spec: `steps` (worker -> steps made),
`places` (worker -> name of its node) and, where a task has resources, `again` (the same of workers that took another's
place); or `error`.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from multitask.cluster.places import PlacementError
from multitask.cluster.ray_cluster import RayCluster
from multitask.engines.crew import actors
from multitask.job.job import Job
from multitask.spec.reading import load_spec
from multitask.startup import RUN_PROCESS
from tests.conftest import run_engine, store_of

NODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "west": {"labels": {"zone": "west"}},
    "data": {"resources": {"data_pets": 1}},
}


class Places(logging.Handler):
    """Notes where workers start."""

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__()
        self._names = names
        self.all: dict[str, list[str]] = {}
        """Worker -> the nodes where it was, in that order."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("Started on node"):
            node = self._names[str(record.args[0])]  # type: ignore[index]
            self.all.setdefault(vars(record)["worker"], []).append(node)


def main() -> None:
    os.environ[RUN_PROCESS] = "1"  # as a run sets it that starts Ray
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        names = {cluster.add_node(num_cpus=1, **settings).node_id: name for name, settings in NODES.items()}
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        logging.getLogger("multitask").setLevel(logging.INFO)
        for path in sys.argv[1:]:
            print(json.dumps(tried(Job(load_spec(Path(path))), names)), flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()


def tried(job: Job, names: dict[str, str]) -> dict[str, Any]:
    places = Places(names)
    logging.getLogger("multitask").addHandler(places)
    try:
        ran = run_engine(job)
    except PlacementError as error:
        return {"error": str(error)}
    steps = {name: worker.step for name, worker in ran.progress.workers.items()}
    result: dict[str, Any] = {"steps": steps, "places": {name: nodes[-1] for name, nodes in places.all.items()}}
    if any(task.resources for task in job.spec.tasks):
        with actors(RayCluster(), job, store_of(job)) as crew:
            for name in job.workers:
                crew.replace(name)
            again = {name: crew.call(name, "node") for name in job.workers}
            result["again"] = {name: names[ray.get(node)] for name, node in again.items()}
    return result


if __name__ == "__main__":
    main()
