"""Workers on nodes that differ: they land where their task's resources and labels are; and on nodes that come later."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from multitask.job.job import Job
from multitask.run.directory import write_spec
from multitask.spec.schema import JobSpec
from tests.conftest import run_engine
from tests.integration.growing import values_hash

pytestmark = [pytest.mark.ray, pytest.mark.slow]
MakeSpec = Callable[..., JobSpec]


def tried(specs: Mapping[str, JobSpec], folder: Path) -> dict[str, dict[str, Any]]:
    """What `tests.integration.placed` says of each spec."""
    for name, spec in specs.items():
        write_spec(folder / f"{name}.yaml", spec)
    command = [sys.executable, "-m", "tests.integration.placed", *(str(folder / f"{name}.yaml") for name in specs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(specs, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.timeout(900)
def test_workers_and_their_successors_land_where_their_tasks_resources_and_labels_are(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    """On three nodes of one CPU: one plain, one with a label, one with a resource."""
    # They fill the cluster: had the first a place before the others, it could be the only one of theirs.
    bound = {"food": {}, "pets": {"resources": {"data_pets": 1}}, "cars": {"labels": {"zone": "west"}}}
    two = {"pets": {}, "cars": {}}
    half = {"cpus_per_worker": 0.5}
    found = tried(
        {
            "bound": make_spec(bound, engine={"name": "async"}),
            "pack": make_spec(two, engine={"name": "sync"}, resources={**half, "placement": "pack"}),
            "spread": make_spec(two, engine={"name": "async", "shards": 2}, resources={**half, "placement": "spread"}),
            "allreduce": make_spec(two, engine={"name": "allreduce"}, task_defaults={"labels": {"zone": "west"}}),
            "too many": make_spec(
                {"pets": {"workers": 2, "resources": {"data_pets": 1}}, "cars": {}}, engine={"name": "async"}
            ),
        },
        tmp_path,
    )

    expected = {"food/0": "plain", "pets/0": "data", "cars/0": "west"}
    assert found["bound"]["places"] == found["bound"]["again"] == expected
    assert len(set(found["pack"]["places"].values())) == 1
    assert len(set(found["spread"]["places"].values())) == 2
    for name in ("bound", "pack", "spread", "allreduce"):
        assert set(found[name]["steps"].values()) == {4}
    error = found["too many"]["error"]
    assert error.startswith("Task 'pets' needs 2 workers of 1 CPU, 1 data_pets. The cluster has room for 1 of 2: ")
    assert "1 node with 1 CPU, 1 data_pets for 1, 1 node with 0 CPU, 0 data_pets for 0, 2 nodes with 1 CPU" in error


@pytest.mark.timeout(500)
def test_a_run_that_began_on_one_node_takes_up_a_node_added_later_and_no_bit_changes(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    tasks = {"pets": {"workers": 2, "min_workers": 1}}
    whole = {"steps": 100_000, "evaluate_every": 100_000, "resources": {"cpus_per_worker": 1}}
    found = grown(make_spec(tasks, engine={"name": "sync"}, **whole), tmp_path)

    assert found["places"] == {"pets/0": ["first"], "pets/1": ["first", "added"]}
    guest, host = found["processes"]["pets/1"], set(found["processes"]["pets/0"])
    assert {guest[0]} == host
    assert {guest[-1]} != host
    assert found["losses"] == 0
    assert all(steps == list(range(len(steps))) for steps in found["made"].values()), "every step once"
    whole["steps"] = len(found["made"]["pets/0"])
    alone = run_engine(Job(make_spec(tasks, engine={"name": "local", "schedule": "rounds"}, **whole)))
    last = alone.job.checkpoint(alone.progress, alone.outcome.versions["last"].groups)
    assert found["final"] == values_hash(last)


def grown(spec: JobSpec, folder: Path) -> dict[str, Any]:
    """What `tests.integration.growing` says of a job of two workers on a node for one, and another that comes later."""
    write_spec(folder / "spec.yaml", spec)
    result = folder / "found.json"
    command = [sys.executable, "-m", "tests.integration.growing", str(folder / "spec.yaml"), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(result.read_text())
    return found
