"""The Ray that a run starts for itself."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from multitask.run.directory import write_spec
from multitask.spec.schema import JobSpec

PUTS = """
import resource
import time

import numpy as np
import ray

from multitask.cluster.session import ray_session

values = np.ones(3_500_000, np.float32)
with ray_session():
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        reference = ray.put(values)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        del reference
        time.sleep(0.1)  # another process frees it
"""
PROCESSES = """
import sys

import ray

from multitask.cluster.ray_cluster import RayCluster
from multitask.engines.crew import actors
from multitask.engines.decoding import decoders
from multitask.job.job import Job
from multitask.spec.reading import load_spec
from tests.conftest import store_of

def found(_):
    import sys
    return "torch._dynamo.eval_frame" not in sys.modules

job = Job(load_spec(sys.argv[1]))
cluster = RayCluster()
with cluster.session(), actors(cluster, job, store_of(job)) as crew:
    nodes = {name: ray.get(worker.node.remote()) for name, worker in crew.workers.items()}
    with decoders(cluster, job, nodes) as decoder_of:
        of_run = [crew.server, *crew.shards, *crew.workers.values(), *set(decoder_of.values())]
        print(ray.get([actor.__ray_call__.remote(found) for actor in of_run]))
"""


@pytest.mark.slow
def test_processes_of_a_run_start_without_torch_compile(make_spec: Callable[..., JobSpec], tmp_path: Path) -> None:
    tasks = {"pets_8": {"resolution": 8}, "pets_12": {"resolution": 12}}
    write_spec(tmp_path / "spec.yaml", make_spec(tasks, engine={"name": "async", "shards": 2}))
    command = [sys.executable, "-c", PROCESSES, str(tmp_path / "spec.yaml")]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str([True] * 5)  # server, shard, two workers, decoder


@pytest.mark.slow
def test_new_values_take_the_memory_of_those_that_nobody_needs_any_more() -> None:
    done = subprocess.run([sys.executable, "-c", PUTS], capture_output=True, text=True, check=True)
    new_pages = [int(line) for line in done.stdout.split()]
    # The first one shows what all of them would meet.
    assert new_pages[0] > 1000
    assert sum(new_pages[1:]) < 10 * new_pages[0]
