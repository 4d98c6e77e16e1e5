"""Workers on nodes that differ: they land where their task's resources and labels are; and on nodes that come later."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from multitask.job.job import Job
from multitask.run.directory import write_spec
from multitask.spec.schema import JobSpec
from tests.conftest import run_engine
from tests.integration.placed import values_hash

MakeSpec = Callable[..., JobSpec]
LONG = {"steps": 100_000, "evaluate_every": 100_000}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_land_where_they_belong_also_on_nodes_that_come_later_and_no_bit_changes(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    """On a cluster of nodes with one CPU: a plain one, then one with a label, then one with a resource."""
    growing = {"pets": {"workers": 2, "min_workers": 1}}
    dropout = {"options": {"dropout": 0.5}}  # its random numbers are the process's own
    # They fill the cluster: had the first a place before the others, it could be the only one of theirs.
    bound = {"food": {}, "pets": {"resources": {"data_pets": 1}}, "cars": {"labels": {"zone": "west"}}}
    two = {"pets": {}, "cars": {}}
    half, one = {"cpus_per_worker": 0.5}, {"cpus_per_worker": 1}
    west = {"labels": {"zone": "west"}}
    specs = {
        "growing": make_spec(growing, engine={"name": "sync"}, resources=one, backbone=dropout, **LONG),
        "bound": make_spec(bound, engine={"name": "async"}),
        "pack": make_spec(two, engine={"name": "sync"}, resources={**half, "placement": "pack"}),
        "spread": make_spec(two, engine={"name": "async", "shards": 2}, resources={**half, "placement": "spread"}),
        "allreduce": make_spec(two, engine={"name": "allreduce"}, task_defaults=west),
        "too_many": make_spec(
            {"pets": {"workers": 2, "resources": {"data_pets": 1}}, "cars": {}}, engine={"name": "async"}
        ),
    }
    for name, spec in specs.items():
        write_spec(tmp_path / f"{name}.yaml", replace(spec, directory=str(tmp_path / name)))

    command = [sys.executable, "-m", "tests.integration.placed", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)

    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())

    # A worker without a place is a guest until a node comes that has one; every step is made once, with the same bits.
    grown = found["growing"]
    assert grown["places"] == {"pets/0": ["plain"], "pets/1": ["plain", "west"]}
    guest, host = grown["processes"]["pets/1"], set(grown["processes"]["pets/0"])
    assert {guest[0]} == host
    assert {guest[-1]} != host
    assert grown["losses"] == 0
    assert all(steps == list(range(len(steps))) for steps in grown["made"].values())
    changes = {**LONG, "steps": len(grown["made"]["pets/0"]), "backbone": dropout, "resources": one}
    alone = run_engine(Job(make_spec(growing, engine={"name": "local", "schedule": "rounds"}, **changes)))
    last = alone.job.checkpoint(alone.progress, alone.outcome.versions["last"].groups)
    assert grown["final"] == values_hash(last)

    expected = {"food/0": "plain", "pets/0": "data", "cars/0": "west"}
    assert found["bound"] == {"places": expected, "again": expected}
    assert len(set(found["pack"].values())) == 1
    assert len(set(found["spread"].values())) == 2
    assert found["allreduce"] == {"pets/0": 4, "cars/0": 4}
    error = found["too_many"]
    assert error.startswith("Task 'pets' needs 2 workers of 1 CPU, 1 data_pets. The cluster has room for 1 of 2: ")
    assert "1 node with 1 CPU, 1 data_pets for 1, 1 node with 0 CPU, 0 data_pets for 0, 2 nodes with 1 CPU" in error
