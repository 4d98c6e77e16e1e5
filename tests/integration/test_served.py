"""Engines `async`, `bounded` and `sync` with real actors."""

import os
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from multitask.cluster.interface import Process
from multitask.cluster.places import PlacementError
from multitask.cluster.ray_cluster import RayCluster
from multitask.data import write_table
from multitask.engines.crew import actors
from multitask.engines.decoding import DecodeActor, batches_from, decoders
from multitask.errors import TrainingError
from multitask.job.job import Job
from multitask.server.messages import Evaluation, StepRecord
from multitask.spec.reading import load_spec
from multitask.spec.schema import JobSpec
from tests.conftest import EngineRun, png, run_engine, store_of

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
MakeSpec = Callable[..., JobSpec]
SYNC = {"name": "sync"}
BOUNDED_0 = {"name": "bounded", "staleness": 0}
ROUNDS = {"name": "local", "schedule": "rounds"}


def run(spec: JobSpec) -> tuple[dict[str, Evaluation], dict[str, int], list[StepRecord]]:
    ran = run_engine(Job(spec))
    return ran.outcome.versions, {record.worker: record.pid for record in ran.records}, ran.records


def imports_torch_compile(_: object) -> bool:
    """Return whether this process has imported the machinery of torch.compile."""
    import sys

    return "torch._dynamo.eval_frame" in sys.modules


class Holder:
    """Another job's actor."""

    def here(self) -> None: ...


def all_values(snapshot: Evaluation) -> dict[str, bytes]:
    return {name: group.values.tobytes() + group.counters.tobytes() for name, group in snapshot.groups.items()}


@pytest.mark.slow
def test_one_worker_with_a_step_in_flight_equals_local_with_a_delay_of_one_bit_for_bit(make_spec: MakeSpec) -> None:
    """Shards change no bit. With nothing in flight the same is shown under `sync` below."""
    changes = {"steps": 6, "schedule": {"name": "cosine"}}
    local, _, local_records = run(make_spec({"pets": {}}, engine={"name": "local", "delay": 1}, **changes))
    engine = {"name": "async", "in_flight": 1, "shards": 2}
    remote, processes, records = run(make_spec({"pets": {}}, engine=engine, **changes))

    assert processes["pets/0"] != os.getpid()
    assert [record.loss for record in records] == [record.loss for record in local_records]
    assert [record.staleness for record in records] == [record.staleness for record in local_records]
    for version in ("best", "last"):
        assert all_values(remote[version]) == all_values(local[version])
        assert remote[version].metrics == local[version].metrics
    assert len({record.loss for record in records}) == 6


def test_three_tasks_train_in_processes_of_their_own(make_spec: MakeSpec) -> None:
    versions, processes, records = run(make_spec({"pets": {}, "cars": {}, "food": {}}, engine={"name": "async"}))

    assert len({*processes.values(), os.getpid()}) == 4
    assert {record.task: record.step for record in records} == {"pets": 3, "cars": 3, "food": 3}
    assert sorted(record.version for record in records) == list(range(1, 13))
    assert all(0 <= record.staleness < 12 for record in records)
    assert set(versions["last"].metrics) == {"pets", "cars", "food"}


def test_a_side_task_pushes_no_bytes(make_spec: MakeSpec) -> None:
    """The server holds nothing that its pushes could carry, and counts its steps."""
    small = {"image_size": 8, "patch_size": 4, "num_layers": 2, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 16}
    vit = {"name": "vit_b_16", "num_classes": 4, "options": small}
    joint = Job(make_spec({"pets": {}}, engine={"name": "async"}))
    job = Job(make_spec({"pets": {"method": "dtl"}}, backbone=vit, train_shared=False, engine={"name": "async"}))
    for of in (joint, job):
        _, gradients, _ = of.make_worker("pets/0", of.make_batches("pets/0")).compute()
        assert sum(gradient.nbytes for gradient in gradients.values()) == of.pushed_bytes("pets")
    assert joint.pushed_bytes("pets") > 0
    assert job.pushed_bytes("pets") == 0

    ran = run_engine(job)

    assert [(record.step, record.rejected) for record in ran.records] == [(step, None) for step in range(4)]
    [learned] = [group for group in job.groups.values() if group.layout.pushed]
    values = ran.outcome.versions["last"].groups[learned.name].values
    assert learned.private
    assert not np.array_equal(values, learned.values[: learned.layout.pushed].numpy())


def test_a_worker_that_raises_ends_the_run_with_its_name_task_and_traceback(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    """The cause is an image that cannot be decoded; the process that decodes for both workers names it."""
    rows = [(png(row, row % 4), row % 4) for row in range(16)]
    for split in ("train", "validation"):
        broken = [(b"no image", 3)] if split == "train" else []
        write_table(tmp_path / "data" / split, rows + broken, [f"class {label}" for label in range(4)])
    tasks = {f"pets_{size}": {"resolution": size, "data": str(tmp_path / "data")} for size in (8, 12)}

    with pytest.raises(TrainingError) as caught:
        run(make_spec(tasks, engine={**SYNC, "shards": 2}, steps=6))

    message = str(caught.value)
    assert re.search(r"Worker '(pets_\d+)/0' of task '\1' failed after \d steps?: ", message)
    assert "shard-00000.parquet, row 16" in message
    # Ray gives the lines of the worker's own stack.
    assert "in compute" in message


@pytest.mark.slow
def test_workers_whose_places_others_hold_are_named(make_spec: MakeSpec) -> None:
    spec = make_spec(engine={"name": "async"}, resources={"cpus_per_worker": 1.0, "start_timeout_s": 4})
    holder = ray.remote(num_cpus=1)(Holder).remote()
    ray.get(holder.here.remote())
    try:
        with pytest.raises(TrainingError, match=r"Workers \['.*/0'\] did not start within 4 s.*'CPU': 2"):
            run(spec)
    finally:
        ray.kill(holder)


def test_workers_that_no_node_could_hold_are_refused_before_any_starts(make_spec: MakeSpec) -> None:
    spec = make_spec({"pets": {"workers": 2}}, engine={"name": "async"}, resources={"cpus_per_worker": 1.5})

    with pytest.raises(PlacementError, match=r"2 workers of 1\.5 CPU\. .* room for 1 of 2: 1 node with 2 CPU for 1\."):
        run(spec)


@pytest.mark.slow
def test_resolutions_of_one_data_set_share_one_decode_and_no_bit_changes(make_spec: MakeSpec) -> None:
    tasks = {"pets_8": {"resolution": 8}, "pets_12": {"resolution": 12, "mean": (0.1, 0.2, 0.3)}}
    changes = {"train_shared": False, "task_defaults": {"augment": "crop_flip", "shuffle_window": 9}, "steps": 6}
    job = Job(make_spec(tasks, engine={"name": "async", "shards": 2}, **changes))
    with actors(RayCluster(), job, store_of(job)) as crew:
        ray.get(crew.begin())
        workers = crew.workers
        nodes = {name: ray.get(worker.node.remote()) for name, worker in workers.items()}
        with decoders(RayCluster(), job, nodes) as decoder_of:
            assert len(set(decoder_of.values())) == 1
            ray.get([worker.prepare.remote(decoder_of[name]) for name, worker in workers.items()])
            ray.get([worker.train.remote() for worker in workers.values()])
            decoded = ray.get(decoder_of["pets_8/0"].decoded.remote())
            processes = [crew.server, *crew.shards, *workers.values(), *set(decoder_of.values())]
            compilers = ray.get([process.__ray_call__.remote(imports_torch_compile) for process in processes])
        together = {name: ray.get(worker.private_state.remote()) for name, worker in workers.items()}
    # Six steps and two asked for ahead; each of the two workers alone would have decoded as many.
    assert 6 <= decoded < 2 * 8
    # The server, a shard, two workers and the decoder: none of the processes of a run imports what it does not use.
    assert compilers == [False] * 5
    for name, own in tasks.items():
        alone = run_engine(Job(make_spec({name: own}, **changes)))
        _, private = alone.job.state(alone.outcome.versions["last"].groups)
        assert all(torch.equal(tensor, private[name][key]) for key, tensor in together[f"{name}/0"].items())


@pytest.mark.slow
def test_a_worker_decodes_for_itself_when_its_decoder_is_lost(make_spec: MakeSpec) -> None:
    """No image is left out or seen twice: it draws the batches that a stream of its own would have given."""
    tasks = {"pets_8": {"resolution": 8}, "pets_12": {"resolution": 12}}
    defaults = {"augment": "crop_flip", "shuffle_window": 9}
    cluster = RayCluster()
    job = Job(make_spec(tasks, engine={"name": "async"}, train_shared=False, task_defaults=defaults))
    decoder = cluster.start(DecodeActor, [cluster, job, list(job.workers)], Process())
    batches = batches_from(cluster, decoder, job, "pets_8/0")

    found = list(islice(batches, 5))
    cluster.kill(decoder)
    found += islice(batches, 15)

    stream = job.make_stream(["pets_8/0"])
    for drawn, expected in zip(found, [stream.next("pets_8/0") for _ in found], strict=True):
        assert drawn.position == expected.position
        assert np.array_equal(drawn.labels, expected.labels)
        assert np.array_equal(drawn.pixels[8], expected.pixels[8])


# Engine `sync`, shards.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tasks", "engine"),
    [
        ({"pets": {"weight": 2.0}, "cars": {}}, BOUNDED_0),
        ({"pets": {"workers": 2}, "cars": {}}, {**SYNC, "shards": 2}),
    ],
)
def test_sync_equals_local_by_rounds_bit_for_bit(make_spec: MakeSpec, tasks: dict, engine: dict) -> None:
    """2 and 3 workers; 1 and 2 shards.

    Two workers of one task hold one patch: the losses of both are those of `local`.
    """
    changes = {"steps": 50, "evaluate_every": 25, "schedule": {"name": "cosine"}}
    local = run_engine(Job(make_spec(tasks, engine=ROUNDS, **changes)))
    remote = run_engine(Job(make_spec(tasks, engine=engine, **changes)))

    def losses(ran: EngineRun) -> dict[tuple[str, int], float]:
        return {(record.worker, record.step): record.loss for record in ran.records}

    assert losses(remote) == losses(local)
    assert len(losses(remote)) == 50 * len(remote.job.workers)
    assert {record.staleness for record in remote.records} == {0}
    for version in ("best", "last"):
        assert all_values(remote.outcome.versions[version]) == all_values(local.outcome.versions[version])
    assert remote.outcome.versions["last"].version == 50


@pytest.mark.slow
def test_bounded_workers_stay_within_the_bound(make_spec: MakeSpec) -> None:
    spec = make_spec({"pets": {}, "cars": {"batch_size": 32}}, engine={"name": "bounded", "staleness": 2}, steps=20)
    ran = run_engine(Job(spec))
    made = {"pets": 0, "cars": 0}
    for record in ran.records:
        made[record.task] += 1
        assert abs(made["pets"] - made["cars"]) <= 2
    assert made == {"pets": 20, "cars": 20}


@pytest.mark.slow
def test_workers_in_processes_of_their_own_fill_and_read_one_cache(make_spec: MakeSpec, tmp_path: Path) -> None:
    """Under `sync`: the bits of training without a cache; and those of a second run, which reads the cache alone."""
    task = {"method": "last_layer", "workers": 2, "batch_size": 4}
    changes = {"train_shared": False, "steps": 9, "evaluate_every": 9}
    plain, _, expected = run(make_spec({"pets": task}, engine=ROUNDS, **changes))
    spec = make_spec({"pets": task | {"cache_features": str(tmp_path / "cache")}}, engine=SYNC, **changes)

    for engine in (SYNC, ROUNDS):
        cached, processes, records = run(load_spec(spec, {"engine": engine}))
        assert (os.getpid() in processes.values()) == (engine == ROUNDS)
        assert sorted((r.worker, r.step, r.loss) for r in records) == sorted(
            (r.worker, r.step, r.loss) for r in expected
        )
        assert all_values(cached["last"]) == all_values(plain["last"])
        assert Job(spec).caches["pets"].missing_bytes() == 0
