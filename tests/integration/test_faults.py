"""What is lost comes back: workers, servers, shards. A run that loses one of each kind is in test_chaos.py."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import ray

from benchmarks._processes import own_actors
from multitask.engines.decoding import DecodeActor, batches_from
from multitask.errors import TrainingError
from multitask.job.job import Job
from multitask.run.directory import write_spec
from multitask.run.live import read_status
from multitask.server.messages import StepRecord
from multitask.spec.schema import JobSpec
from tests.conftest import EngineRun, run_engine, store_of, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
MakeSpec = Callable[..., JobSpec]
EACH_ROUND = {"every_rounds": 2, "every_minutes": None}


class Killer:
    """Kills a process once enough steps were made."""

    def __init__(self, *, title: str | None = None, worker: str | None = None, after: int = 6, number: int = 9) -> None:
        self._title, self._worker, self._after, self._number = title, worker, after, number
        self._seen = 0
        self.killed: int | None = None

    def __call__(self, records: list[StepRecord]) -> None:
        self._seen += len(records)
        mine = [record.pid for record in records if record.worker == self._worker]
        if self.killed is None and self._seen >= self._after and (self._title or mine):
            self.killed = own_actors(self._title)[0] if self._title else mine[-1]
            os.kill(self.killed, self._number)


def check_every_step_counts_once(ran: EngineRun) -> None:
    """Each step of each worker was applied, rejected, or lost with the server: nothing twice, nothing forgotten."""
    workers = ran.progress.workers
    assert {worker.step for worker in workers.values()} == {ran.job.spec.steps}
    made = sum(worker.step for worker in workers.values())
    assert ran.progress.version == made - sum(worker.lost + worker.rejected for worker in workers.values())


def test_a_killed_worker_is_replaced_while_the_others_go_on(make_spec: MakeSpec) -> None:
    tasks = {"pets": {}, "cars": {"workers": 2}}
    spec = make_spec(tasks, engine={"name": "async"}, steps=400, evaluate_every=10_000, checkpoints=EACH_ROUND)
    killer = Killer(worker="pets/0", after=60)
    ran = run_engine(Job(spec), watch=killer)

    assert killer.killed is not None
    check_every_step_counts_once(ran)
    assert len(ran.outcome.recoveries) == 1
    workers = ran.progress.workers
    assert workers["pets/0"].lost == workers["cars/0"].redone == workers["cars/0"].lost == 0
    # The others went on while it was away.
    pids = [record.pid for record in ran.records if record.worker == "pets/0"]
    replaced_at = pids.index(pids[-1])
    between = ran.records.index([record for record in ran.records if record.worker == "pets/0"][replaced_at])
    assert len(set(pids)) == 2
    assert sum(record.task == "cars" for record in ran.records[:between]) > replaced_at
    assert set(ran.outcome.versions["last"].metrics) == {"pets", "cars"}


def test_a_guest_goes_on_whichever_process_it_was_lost_with(make_spec: MakeSpec) -> None:
    """Its host's, with which it is a guest again, and later its own: then it is once more."""
    tasks = {"pets": {"workers": 2, "min_workers": 1}}
    spec = make_spec(tasks, engine={"name": "async"}, steps=100_000, evaluate_every=100_000)
    where: list[int] = []

    def kill_its_first_and_its_third_process(records: list[StepRecord]) -> None:
        for record in records:
            if record.worker == "pets/1" and where[-1:] != [record.pid]:
                where.append(record.pid)
                if len(where) in (1, 3):
                    os.kill(record.pid, signal.SIGKILL)

    ran = run_engine(Job(spec), wants_pause=lambda: len(where) == 4, watch=kill_its_first_and_its_third_process)

    first, host, own, last = where
    assert {record.pid for record in ran.records if record.worker == "pets/0"} == {first, host}
    assert len({first, host, own}) == 3
    assert last == host
    assert len(ran.outcome.recoveries) == 3
    for name, worker in ran.progress.workers.items():
        assert [record.step for record in ran.records if record.worker == name] == list(range(worker.step))


def test_a_killed_server_is_restored_and_the_workers_reconnect(make_spec: MakeSpec) -> None:
    spec = make_spec(engine={"name": "async", "in_flight": 1}, steps=300, evaluate_every=10_000, checkpoints=EACH_ROUND)
    killer = Killer(title="ServerActor", after=60)
    ran = run_engine(Job(spec), watch=killer)

    assert killer.killed is not None
    check_every_step_counts_once(ran)
    assert len({record.pid for record in ran.records}) == 2, "no worker had to be replaced"
    assert len(ran.outcome.recoveries) >= 1
    assert sum(worker.lost for worker in ran.progress.workers.values()) > 0


def test_a_server_killed_after_a_worker_has_finished_waits_for_nobody(make_spec: MakeSpec) -> None:
    """The restored server is told that the worker has finished, and what was lost of it; checkpoints have it too."""
    tasks = {"pets": {"batch_size": 2}, "cars": {"batch_size": 64, "accumulate": 8}}
    engine = {"name": "bounded", "staleness": 40}
    job = Job(make_spec(tasks, engine=engine, steps=60, evaluate_every=10_000, checkpoints=EACH_ROUND))
    killed: list[int] = []
    saved: set[int] = set()

    def kill_when_pets_has_finished(records: list[StepRecord]) -> None:
        if not killed and any(record.task == "pets" and record.step == 59 for record in records):
            killed.extend(own_actors("ServerActor"))
            os.kill(killed[0], signal.SIGKILL)
        elif killed and any(record.task == "cars" and record.step < 59 for record in records):
            checkpoint = store_of(job).latest()
            assert checkpoint is not None
            workers = checkpoint.progress.workers
            saved.update([workers["cars/0"].step] if workers["pets/0"].private_step == 60 else [])

    ran = run_engine(job, watch=kill_when_pets_has_finished)

    assert killed
    assert ran.progress.workers["cars/0"].step == 60
    check_every_step_counts_once(ran)
    assert ran.outcome.versions["last"].version == ran.progress.version
    assert len(saved) > 1, "checkpoints were complete while cars trained alone"


def test_a_killed_shard_takes_the_server_back_with_it(make_spec: MakeSpec) -> None:
    engine = {"name": "async", "shards": 2}
    spec = make_spec(engine=engine, steps=300, evaluate_every=10_000, checkpoints=EACH_ROUND)
    killer = Killer(title="ShardActor", after=60)
    ran = run_engine(Job(spec), watch=killer)

    assert killer.killed is not None
    check_every_step_counts_once(ran)


def test_a_worker_decodes_for_itself_when_its_decoder_is_lost(make_spec: MakeSpec) -> None:
    """No image is left out or seen twice: it draws the batches that a stream of its own would have given."""
    tasks = {"pets_8": {"resolution": 8}, "pets_12": {"resolution": 12}}
    defaults = {"augment": "crop_flip", "shuffle_window": 9}
    job = Job(make_spec(tasks, engine={"name": "async"}, train_shared=False, task_defaults=defaults))
    decoder = ray.remote(DecodeActor).options(num_cpus=0).remote(job, list(job.workers))
    batches = batches_from(decoder, job, "pets_8/0")

    found = list(islice(batches, 5))
    ray.kill(decoder)
    found += islice(batches, 15)

    stream = job.make_stream(["pets_8/0"])
    for drawn, expected in zip(found, [stream.next("pets_8/0") for _ in found], strict=True):
        assert drawn.position == expected.position
        assert np.array_equal(drawn.labels, expected.labels)
        assert np.array_equal(drawn.pixels[8], expected.pixels[8])


def test_a_hanging_worker_is_named_and_replaced(make_spec: MakeSpec, caplog: pytest.LogCaptureFixture) -> None:
    resources = {"step_timeout_s": 15}
    spec = make_spec(
        engine={"name": "sync"}, steps=600, evaluate_every=10_000, resources=resources, checkpoints=EACH_ROUND
    )
    stopper = Killer(worker="cars/0", after=40, number=signal.SIGSTOP)
    with caplog.at_level(logging.WARNING):
        ran = run_engine(Job(spec), watch=stopper)

    assert stopper.killed is not None
    assert ran.progress.version == 600
    assert "Worker 'cars/0' of task 'cars' made no step for 15 s" in caplog.text


def test_a_worker_that_is_lost_again_and_again_ends_the_run(make_spec: MakeSpec) -> None:
    def kill_all(_: list[StepRecord]) -> None:
        for process in own_actors("WorkerActor"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    spec = make_spec({"pets": {}}, engine={"name": "async"}, steps=100_000, evaluate_every=10_000)
    with pytest.raises(TrainingError, match=r"Worker 'pets/0' of task 'pets' was lost \d times without a step made"):
        run_engine(Job(spec), watch=kill_all)


def start_training(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "jobs.cli", "train", *arguments]
    # A session of its own: the embedded Ray goes with the driver, as it does when a machine goes.
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)


def end_of(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Exit status, and what it wrote to stderr."""
    _, errors = process.communicate(timeout=400)
    return process.returncode, errors.decode()


@pytest.mark.timeout(1200)
def test_tasks_join_and_leave_a_running_job_and_ctrl_c_stops_it(make_spec: MakeSpec, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    spec = make_spec(engine={"name": "async"}, directory=str(directory), steps=100_000, evaluate_every=100_000)
    write_spec(directory.parent / "spec.yaml", spec)
    task = directory.parent / "task.yaml"
    task.write_text(
        f"{{name: more, data: '{spec.tasks[0].data}', method: scale_bias+last_layer, num_classes: 4, resolution: 12}}"
    )
    driver = start_training(str(directory.parent / "spec.yaml"))
    wait_until(lambda: (directory / "status.json").is_file() and read_status(directory)["tasks"]["pets"]["made"] > 20)

    for arguments in (
        ["--attach", str(directory), "--task", str(task)],
        ["--remove", str(directory), "--task", "cars"],
    ):
        status_code, errors = end_of(start_training(*arguments))
        assert status_code == 0, errors
    wait_until(lambda: read_status(directory)["tasks"]["more"]["made"] > 20)
    status = read_status(directory)
    assert set(status["tasks"]) == {"pets", "more"}
    assert status["tasks"]["pets"]["made"] > status["tasks"]["more"]["made"]
    driver.send_signal(signal.SIGINT)

    status_code, errors = end_of(driver)
    assert status_code == 130
    assert "--resume" in errors
    assert read_status(directory)["state"] == "stopped"
    assert (directory / "removed" / "cars.safetensors").is_file()
