"""Runs a job on a simulated cluster of one node, to which another is added once the job trains.

`python -m tests.integration.growing SPEC FOUND [lose]` writes one JSON object to the file FOUND: `places`
(worker -> names of the nodes where it was, in that order), `made` (worker -> its steps, in the order in which they
counted), `processes` (worker -> the process of each of them), `losses` (times that something was lost) and `final`
(SHA-256 of the values in the last checkpoint). With `lose` the first node is lost once a worker trains on the added
one. When all this has happened the job stops: how fast nodes and processes start decides nothing.
"""

import hashlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from multitask.checkpoint import Checkpoint
from multitask.job import Job
from multitask.server.messages import StepRecord
from multitask.spec import load_spec
from tests.conftest import EngineRun, run_engine, store_of
from tests.integration.placed import Places

# A killed node is taken for dead after five seconds, not fifteen.
HEAD = {"num_cpus": 0, "include_dashboard": False, "_system_config": {"health_check_period_ms": 1000}}


class Nodes:
    """The cluster, which changes as the job goes on."""

    def __init__(self, cluster: Cluster, lose_first: bool) -> None:
        self._cluster, self._lose_first = cluster, lose_first
        self._first = cluster.add_node(num_cpus=1)
        self.names = {self._first.node_id: "first"}
        self._processes: set[int] = set()
        self._since: dict[str, int] = {}
        """Worker -> steps made since the last thing happened."""

    def __call__(self, records: list[StepRecord]) -> None:
        """Look at the steps that were made."""
        more = {record.process for record in records} - self._processes
        self._processes |= more
        for record in records:
            self._since[record.worker] = 1 + (0 if more else self._since.get(record.worker, 0))
        if len(self.names) == 1 and self._processes:
            self.names[self._cluster.add_node(num_cpus=1).node_id] = "added"
        if self._lose_first and len(self._processes) > 1:
            self._cluster.remove_node(self._first, allow_graceful=False)
            self._lose_first = False
            self._since = {}

    def done(self) -> bool:
        """Two processes have trained, or, after a loss, both workers again."""
        made = [self._since.get(worker, 0) for worker in ("pets/0", "pets/1")]
        return len(self._processes) > 1 and not self._lose_first and min(made) > 20


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    try:
        nodes = Nodes(cluster, lose_first=sys.argv[3:] == ["lose"])
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
        "processes": {name: [record.process for record in records] for name, records in mine.items()},
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
