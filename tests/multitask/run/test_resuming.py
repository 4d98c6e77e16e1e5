"""Checkpoints, resumed runs and changes of tasks, with engine `local`, where every bit can be compared."""

import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

import multitask
from multitask.data import ImageTable
from multitask.engines.local import DirectServer
from multitask.job.checkpoint import Checkpoint, CheckpointError, CheckpointStore
from multitask.job.job import Job
from multitask.job.tables import open_split
from multitask.run.directory import Run, RunError
from multitask.run.live import ask, read_status
from multitask.run.trainer import Trial, train
from multitask.server.messages import Evaluation
from multitask.server.progress import Progress
from multitask.spec.errors import SpecError
from multitask.spec.reading import dump_spec
from multitask.spec.schema import JobSpec, TaskSpec
from tests.conftest import EngineRun, run_engine, store_of

MakeSpec = Callable[..., JobSpec]
TURNS, ROUNDS = {"name": "local"}, {"name": "local", "schedule": "rounds"}
TASKS = {"pets": {}, "cars": {"workers": 2}}


def bits(ran: EngineRun) -> dict[str, bytes]:
    last = ran.outcome.versions["last"]
    return {name: group.values.tobytes() + group.counters.tobytes() for name, group in last.groups.items()}


def pause_after(polls: int) -> Callable[[], bool]:
    asked = count()
    return lambda: next(asked) >= polls


@pytest.mark.parametrize("engine", [TURNS, ROUNDS])
@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop", "sgd"])
def test_a_paused_run_goes_on_as_if_nothing_had_been(make_spec: MakeSpec, engine: dict, optimizer: str) -> None:
    """Values, statistics, optimizer slots, schedule and the next images are equal to the last bit."""
    changes = {
        "engine": engine,
        "optimizer": {"name": optimizer, "rate": 0.01},
        "steps": 8,
        "evaluate_every": 3,
        "schedule": {"name": "cosine"},
        "task_defaults": {"augment": "crop_flip", "shuffle_window": 7},
    }
    whole = run_engine(Job(make_spec(TASKS, **changes)))
    job = Job(make_spec(TASKS, **changes))
    first = run_engine(job, wants_pause=pause_after(3))
    assert first.outcome.paused
    assert 0 < first.progress.workers["pets/0"].step < 8

    second = run_engine(Job(job.spec, store_of(job).latest()))

    assert not second.outcome.paused
    assert bits(second) == bits(whole)
    steps = [(record.worker, record.step, record.loss) for record in first.records + second.records]
    assert steps == [(record.worker, record.step, record.loss) for record in whole.records]
    rounds = [evaluation.round for evaluation in first.evaluations + second.evaluations]
    assert rounds == [evaluation.round for evaluation in whole.evaluations]


@pytest.mark.parametrize("engine", [TURNS, ROUNDS])
def test_a_checkpoint_taken_on_the_way_is_where_a_killed_run_goes_on(make_spec: MakeSpec, engine: dict) -> None:
    changes = {"engine": engine, "steps": 9, "checkpoints": {"every_rounds": 4, "keep": 5}}
    whole = run_engine(Job(make_spec(TASKS, **changes)))
    job = Job(make_spec(TASKS, **changes))
    checkpoint = store_of(job).latest()
    assert checkpoint is not None
    assert checkpoint.progress.rounds == 8

    second = run_engine(Job(job.spec, checkpoint))

    assert bits(second) == bits(whole)
    assert {record.step for record in second.records} == {8}


def test_as_many_checkpoints_are_kept_as_the_spec_says(make_spec: MakeSpec) -> None:
    job = Job(make_spec(steps=6, checkpoints={"every_rounds": 1, "keep": 2}))
    run_engine(job)
    names = sorted(path.name for path in Path(job.spec.checkpoint_folder).iterdir())
    assert names == ["checkpoint-000004.safetensors", "checkpoint-000005.safetensors"]


def test_checkpoints_go_to_any_filesystem(make_spec: MakeSpec) -> None:
    store = CheckpointStore("fsspec+memory://checkpoints-test", keep=2)
    job = Job(make_spec(steps=2, checkpoints={"every_rounds": 1}))
    run_engine(job)
    checkpoint = store_of(job).latest()
    assert checkpoint is not None
    store.save(checkpoint)
    found = store.latest()
    assert found is not None
    assert found.progress == checkpoint.progress
    assert found.tensors.keys() == checkpoint.tensors.keys()
    assert all(torch.equal(tensor, found.tensors[name]) for name, tensor in checkpoint.tensors.items())


def stored(folder: Path, versions: int) -> CheckpointStore:
    """Return a store with checkpoints of the versions 0, 1, ..."""
    store = CheckpointStore(str(folder), keep=2)
    for version in range(versions):
        store.save(Checkpoint(Progress(version=version), {"values/backbone/weight": torch.ones(9)}))
    return store


def test_a_run_goes_on_from_the_newest_whole_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Some filesystems show incomplete files, so a driver that is killed while it writes one leaves a part of it."""
    store = stored(tmp_path, 3)
    older, newer = tmp_path / "checkpoint-000001.safetensors", tmp_path / "checkpoint-000002.safetensors"
    newer.write_bytes(newer.read_bytes()[:-20])

    with caplog.at_level(logging.WARNING):
        found = store.latest()

    assert found is not None
    assert found.progress.version == 1
    assert [str(newer) in record.getMessage() for record in caplog.records] == [True]
    assert store.where() == str(older)
    assert store.save(replace(found, progress=Progress(version=3))) == str(newer)
    assert store.where() == str(newer)
    again = CheckpointStore(str(tmp_path), keep=2).latest()
    assert again is not None
    assert again.progress.version == 3
    assert older.is_file()


def test_where_every_checkpoint_is_damaged_the_error_names_them(tmp_path: Path) -> None:
    store = stored(tmp_path, 2)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"only damaged files.*checkpoint-000000.*checkpoint-000001.*remove"):
        store.latest()


def test_what_a_killed_driver_left_half_written_goes_with_the_next_checkpoint(tmp_path: Path) -> None:
    store = stored(tmp_path, 1)
    left = tmp_path / ".checkpoint-000001.safetensors.0f0f0f0f.partial"
    left.write_bytes(b"half of")
    store.save(Checkpoint(Progress(version=1), {}))
    assert not left.exists()
    left.write_bytes(b"half of")
    store.clear()
    assert list(tmp_path.iterdir()) == []


def interrupt_when(directory: Path, enough: Callable[[dict], bool]) -> threading.Thread:
    """Press Ctrl-C as soon as the status file meets a condition."""

    def wait() -> None:
        while not ((directory / "status.json").is_file() and enough(read_status(directory))):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_ctrl_c_ends_with_a_checkpoint_and_resume_goes_on_in_the_same_mlflow_run(make_spec: MakeSpec) -> None:
    spec = make_spec(steps=50, evaluate_every=25)
    directory = spec.run_directory
    thread = interrupt_when(directory, lambda status: status["tasks"]["pets"]["made"] > 0)
    with pytest.raises(multitask.Stopped, match="multitask resume"):
        multitask.train(spec)
    thread.join()
    stopped = read_status(directory)
    assert stopped["state"] == "stopped"
    assert 0 < stopped["tasks"]["pets"]["made"] < 50
    client = MlflowClient(f"sqlite:///{directory.parent}/mlflow.db")
    assert client.get_run(stopped["mlflow_run_id"]).info.status == "KILLED"
    with pytest.raises(SpecError, match="multitask resume"):
        multitask.train(spec)
    with pytest.raises(RunError, match="is stopped"):
        ask(directory, remove="cars")

    run = multitask.resume(directory)

    assert run.result["mlflow_run_id"] == stopped["mlflow_run_id"]
    assert client.get_run(stopped["mlflow_run_id"]).info.status == "FINISHED"
    assert [point["step"] for point in run.result["tasks"]["pets"]["curve"]] == [25, 50]
    assert run.result["tasks"]["pets"]["pushes"] == 50
    whole = multitask.train(replace(spec, directory=f"{directory}-whole"))
    assert whole.result["last"] == run.result["last"]
    assert (whole.directory / "last.safetensors").read_bytes() == (run.directory / "last.safetensors").read_bytes()
    with pytest.raises(RunError, match="has ended"):
        multitask.resume(directory)


def test_a_moved_run_goes_on_where_it_is_and_leaves_the_old_place_alone(
    make_spec: MakeSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = make_spec({"pets": {}}, steps=50)
    old, new = spec.run_directory, tmp_path / "other place, 50%" / "moved"
    thread = interrupt_when(old, lambda status: status["tasks"]["pets"]["made"] > 0)
    with pytest.raises(multitask.Stopped):
        multitask.train(spec)
    thread.join()
    new.parent.mkdir()
    shutil.move(old, new)
    before = {path: path.stat().st_mtime_ns for path in old.parent.rglob("*")}

    run = multitask.resume(new)

    assert run.result["last"]["round"] == 50
    assert (run.directory, run.spec.directory) == (new, str(new))
    assert {path: path.stat().st_mtime_ns for path in old.parent.rglob("*")} == before
    assert "a new MLflow run begins" in caplog.text
    client = MlflowClient(f"sqlite:///{new.parent}/mlflow.db")
    assert client.get_run(run.result["mlflow_run_id"]).info.status == "FINISHED"


def test_a_job_that_is_started_again_while_it_trains_is_refused_and_unharmed(make_spec: MakeSpec) -> None:
    spec = make_spec({"pets": {}}, steps=4)
    refused: list[str] = []

    def start_again(_: Evaluation) -> None:
        for overwrite in (False, True):
            with pytest.raises(SpecError, match="is running, in process") as caught:
                multitask.train(spec, overwrite=overwrite)
            refused.append(str(caught.value))
        with pytest.raises(RunError, match="is running, in process"):
            multitask.resume(spec.run_directory)

    run = train(spec, trial=Trial(on_evaluation=start_again))

    assert len(refused) == 4
    assert run.result["last"]["round"] == 4
    assert (run.directory / "log.jsonl").read_text().count("Starts from") == 1


def test_a_run_whose_driver_lives_cannot_be_resumed_and_one_whose_driver_is_gone_is_lost(make_spec: MakeSpec) -> None:
    spec = make_spec(steps=50)
    status = spec.run_directory / "status.json"
    thread = interrupt_when(spec.run_directory, lambda status: status["tasks"]["pets"]["made"] > 0)
    with pytest.raises(multitask.Stopped):
        multitask.train(spec)
    thread.join()
    content = json.loads(status.read_text())
    status.write_text(json.dumps({**content, "state": "running"}))
    with pytest.raises(RunError, match=rf"is running, in process {os.getpid()}"):
        multitask.resume(spec.run_directory)
    status.write_text(json.dumps({**content, "state": "running", "process": 2**22 + 1}))
    assert read_status(spec.run_directory)["state"] == "lost"
    # Its id belongs to a process that started later: to this one, as to each first process of a container.
    status.write_text(json.dumps({**content, "state": "running", "process_start": content["process_start"] - 1}))
    assert read_status(spec.run_directory)["state"] == "lost"
    status.write_text(json.dumps({**content, "state": "running", "host": "elsewhere", "updated": time.time() - 61}))
    assert read_status(spec.run_directory)["state"] == "lost"
    status.unlink()
    assert multitask.resume(spec.run_directory).result["last"]["round"] == 50


def test_a_run_that_stopped_under_version_0_1_goes_on(make_spec: MakeSpec) -> None:
    spec = make_spec(steps=50)
    path = spec.run_directory / "status.json"
    thread = interrupt_when(spec.run_directory, lambda status: status["tasks"]["pets"]["made"] > 0)
    with pytest.raises(multitask.Stopped):
        multitask.train(spec)
    thread.join()
    text = path.read_text()
    assert '"rejected_calls"' in text
    assert '"rejected"' in text
    path.write_text(text.replace('"rejected_calls"', '"turned_away"').replace('"rejected"', '"refused"'))

    result = multitask.resume(spec.run_directory).result

    assert (result["rejected_calls"], result["tasks"]["pets"]["rejected_pushes"]) == (0, 0)
    assert result["last"]["round"] == 50


def test_a_directory_without_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no spec\.yaml"):
        multitask.resume(tmp_path)
    with pytest.raises(RunError, match=r"status\.json is missing"):
        read_status(tmp_path)


def test_checkpoints_of_another_run_are_not_overwritten(make_spec: MakeSpec, tmp_path: Path) -> None:
    checkpoints = {"uri": str(tmp_path / "elsewhere"), "every_rounds": 1}
    multitask.train(make_spec(steps=1, checkpoints=checkpoints))
    with pytest.raises(SpecError, match="holds checkpoints of a run"):
        multitask.train(make_spec(steps=1, checkpoints=checkpoints, directory=str(tmp_path / "other")))


def test_a_gradient_that_is_not_finite_changes_no_byte_and_several_in_a_row_end_the_run(make_spec: MakeSpec) -> None:
    job = Job(make_spec())
    server = job.make_server()
    direct = DirectServer(server)
    worker = job.make_worker("pets/0", job.make_batches("pets/0"))

    def step(poison: bool) -> None:
        push, gradients, private = worker.compute()
        if poison:
            gradients["shared:pets+cars"][5] = float("nan")
        worker.absorb(push, private, *direct.wait(direct.push(push, gradients)))

    def state() -> bytes:
        groups = (*server.shard.groups.values(), *worker.private.values())
        return b"".join(group.values.numpy().tobytes() + str(group.state(slots=True)).encode() for group in groups)

    step(poison=False)
    before = state()
    for _ in range(4):
        step(poison=True)
    assert state() == before
    step(poison=False)
    assert state() != before
    for _ in range(4):
        step(poison=True)
    with pytest.raises(multitask.TrainingError, match=r"(?s)worker 'pets/0' \(task 'pets'\).*loss .*push number 5"):
        step(poison=True)


def test_divergence_names_the_last_checkpoint(make_spec: MakeSpec) -> None:
    checkpoints, sgd = {"every_rounds": 1}, {"name": "sgd", "rate": 1e20}
    spec = make_spec({"pets": {}}, steps=300, checkpoints=checkpoints, optimizer=sgd)
    with pytest.raises(multitask.TrainingError, match=r"(?s)(not finite|loss is).*checkpoint-\d+.*multitask resume"):
        multitask.train(spec)
    checkpoint = store_of(Job(spec)).latest()
    assert checkpoint is not None
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint.tensors.values())


# Tasks that come and go.


def test_a_task_that_joins_starts_from_the_current_shared_tensors_on_its_own_schedule(make_spec: MakeSpec) -> None:
    changes = {"steps": 6, "schedule": {"name": "cosine"}, "evaluate_every": 100}
    job = Job(make_spec({"pets": {}, "cars": {}}, **changes))
    first = run_engine(job, wants_pause=pause_after(2))
    checkpoint = store_of(job).latest()
    assert checkpoint is not None
    before = job.restored(checkpoint)
    # A last layer of its own alone: it shares normalisation layers that no task has shared so far.
    joined = Job(make_spec({"pets": {}, "cars": {}, "food": {"method": "last_layer"}}, **changes), checkpoint)

    old, _ = before.state({name: group.state() for name, group in before.groups.items()})
    new, private = joined.state({name: group.state() for name, group in joined.groups.items()})
    assert all(torch.equal(tensor, new[name]) for name, tensor in old.items())
    for task in ("pets", "cars"):
        _, kept = before.state({name: group.state() for name, group in before.groups.items()})
        assert all(torch.equal(tensor, private[task][name]) for name, tensor in kept[task].items())

    second = run_engine(joined)

    started = first.progress.workers["pets/0"].step
    assert started > 0
    food = [record for record in second.records if record.task == "food"]
    assert [record.step for record in food] == list(range(6))
    # Its private rate starts from the top while that of the others has fallen.
    pets = [record for record in second.records if record.task == "pets"]
    assert food[0].rate == 0.01
    assert pets[0].rate < 0.01
    assert {record.task: record.step for record in second.records} == {"pets": 5, "cars": 5, "food": 5}
    assert set(second.outcome.versions["best"].metrics) == {"pets", "cars", "food"}


def test_removing_a_task_leaves_the_others_alone_and_keeps_its_tensors(make_spec: MakeSpec) -> None:
    spec = make_spec({"pets": {}, "cars": {}, "food": {}}, steps=150, evaluate_every=75)
    directory = spec.run_directory
    done: list[str] = []

    def change() -> None:
        while not ((directory / "status.json").is_file() and read_status(directory)["tasks"]["pets"]["made"] > 0):
            time.sleep(0.01)
        for request in ({"remove": "nobody"}, {"attach": dump_spec(spec)["tasks"][0]}):
            with pytest.raises(RunError, match="goes on unchanged"):
                ask(directory, **request)  # type: ignore[arg-type]
        ask(directory, remove="cars")
        done.append("removed")
        ask(directory, attach={**dump_spec(spec)["tasks"][1], "name": "more_cars"})
        done.append("attached")

    thread = threading.Thread(target=change, daemon=True)
    thread.start()
    run = multitask.train(spec)
    thread.join(5)

    assert done == ["removed", "attached"]
    assert set(run.result["last"]["tasks"]) == {"pets", "food", "more_cars"}
    assert (directory / "removed" / "cars.safetensors").is_file()
    assert [task.name for task in Run(directory).spec.tasks] == ["pets", "food", "more_cars"]
    assert set(run.export().bundles) == {"pets", "food", "more_cars"}
    assert {name: task["made"] for name, task in read_status(directory)["tasks"].items()} == {
        "pets": 150,
        "food": 150,
        "more_cars": 150,
    }
    client = MlflowClient(f"sqlite:///{directory.parent}/mlflow.db")
    parent = client.get_run(run.result["mlflow_run_id"])
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert {child.info.run_name for child in children} == {"pets", "cars", "food", "more_cars"}


def test_a_request_reads_the_new_tables_alone_and_none_ends_the_run(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec({"pets": {}, "cars": {}}, steps=150, evaluate_every=75)
    directory = spec.run_directory
    more = {**dump_spec(make_spec({"food": {}}))["tasks"][0], "name": "more"}
    read: list[str] = []
    refusals: list[str] = []

    def open_or_fail(task: TaskSpec, split: str) -> ImageTable:
        if task.data.startswith("s3://"):
            raise OSError("the bucket does not answer")
        read.append(f"{task.name}/{split}")
        return open_split(task, split)

    monkeypatch.setattr("multitask.job.inputs.open_split", open_or_fail)

    def change() -> None:
        while not ((directory / "status.json").is_file() and read_status(directory)["tasks"]["pets"]["made"] > 0):
            time.sleep(0.01)
        with pytest.raises(RunError, match="goes on unchanged: the bucket does not answer"):
            ask(directory, attach={**more, "data": "s3://mistyped/food"})
        refusals.append("rejected")
        ask(directory, attach=more)

    thread = threading.Thread(target=change, daemon=True)
    thread.start()
    run = multitask.train(spec)
    thread.join(5)

    assert refusals == ["rejected"]
    assert set(run.result["last"]["tasks"]) == {"pets", "cars", "more"}
    assert read == [f"{task}/{split}" for task in ("pets", "cars", "more") for split in ("train", "validation")]


def test_a_removal_changes_no_private_bit_of_the_others(make_spec: MakeSpec) -> None:
    job = Job(make_spec({"pets": {}, "cars": {}, "food": {}}, steps=6))
    run_engine(job, wants_pause=pause_after(3))
    checkpoint = store_of(job).latest()
    before = job.restored(checkpoint)
    after = Job(make_spec({"pets": {}, "food": {}}, steps=6), checkpoint)
    for name in ("private:pets", "private:food"):
        assert str(after.groups[name].state()) == str(before.groups[name].state())
        assert after.groups[name].values.numpy().tobytes() == before.groups[name].values.numpy().tobytes()
    assert not any("cars" in name for name in after.groups)
    assert json.dumps(after.progress.to_json()).count("cars") == 0
