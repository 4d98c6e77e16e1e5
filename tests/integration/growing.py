"""Runs a job on a simulated cluster of one node, to which another is added once the job trains.

`python -m tests.integration.growing SPEC FOUND` writes one JSON object to the file FOUND: `places` (worker -> names of
the nodes where it was, in that order), `made` (worker -> its steps, in the order in which they counted), `processes`
(worker -> the process of each of them), `losses` (times that something was lost) and `final` (SHA-256 of the values in
the last checkpoint). Some steps after two processes have trained the job stops: how fast nodes and processes start
decides nothing.
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

from multitask.job.checkpoint import Checkpoint
from multitask.job.job import Job
from multitask.server.messages import StepRecord
from multitask.spec.reading import load_spec
from multitask.startup import RUN_PROCESS
from tests.conftest import EngineRun, run_engine, store_of
from tests.integration.placed import Places


class Nodes:
    """The cluster, which changes as the job goes on."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.names = {cluster.add_node(num_cpus=1).node_id: "first"}
        self._made: Counter[int] = Counter()
        """Process -> steps made there."""

    def __call__(self, records: list[StepRecord]) -> None:
        """Look at the steps that were made."""
        self._made.update(record.pid for record in records)
        if len(self.names) == 1 and self._made:
            self.names[self._cluster.add_node(num_cpus=1).node_id] = "added"

    def done(self) -> bool:
        return len(self._made) == 2 and min(self._made.values()) > 20


def main() -> None:
    os.environ[RUN_PROCESS] = "1"  # as a run sets it that starts Ray
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = Nodes(cluster)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        places = Places(nodes.names)
        logging.getLogger("multitask").setLevel(logging.INFO)
        logging.getLogger("multitask").addHandler(places)
        ran = run_engine(Job(load_spec(Path(sys.argv[1]))), wants_pause=nodes.done, watch=nodes)
        Path(sys.argv[2]).write_text(json.dumps(said(ran, places)))
    finally:
        ray.shutdown()
        cluster.shutdown()


def said(ran: EngineRun, places: Places) -> dict[str, Any]:
    checkpoint = store_of(ran.job).latest()
    assert checkpoint is not None
    mine = {name: [record for record in ran.records if record.worker == name] for name in ran.job.workers}
    return {
        "places": places.all,
        "made": {name: [record.step for record in records] for name, records in mine.items()},
        "processes": {name: [record.pid for record in records] for name, records in mine.items()},
        "losses": len(ran.outcome.recoveries),
        "final": values_hash(checkpoint),
    }


def values_hash(checkpoint: Checkpoint) -> str:
    found = hashlib.sha256()
    for name in sorted(checkpoint.tensors):
        if name.startswith("values/"):
            found.update(checkpoint.tensors[name].numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    main()
