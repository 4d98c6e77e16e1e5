import json
import logging
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import multitask
from multitask.run import outbox, tracking
from multitask.run.mlflow_store import PARAM_CHARS, MlflowStore, TrackingError, resolve, shorten, sqlite_uri
from multitask.run.outbox import OUTBOX
from multitask.run.tracking import Tracker, flatten
from tests.conftest import wait_until

mlflow = pytest.importorskip("mlflow")
Client = mlflow.MlflowClient


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with MLflow's tables. It is created once, because that takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    with Tracker(f"sqlite:///{path}", "first", "first", params={}, tasks={}):
        pass
    return path


@pytest.fixture
def uri(empty_store: Path, tmp_path: Path) -> str:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def tracker(uri: str, **changes: Any) -> Tracker:
    settings: dict[str, Any] = {"params": {}, "tasks": {"pets": {}, "cars": {}}, **changes}
    return Tracker(uri, "demo", "three tasks", **settings)


def test_each_task_is_a_child_run_of_the_run(uri: str) -> None:
    with tracker(uri, params={"seed": 0}, tasks={"pets": {"classes": 37}, "cars": {"classes": 196}}) as tracked:
        pass

    client = Client(tracking_uri=uri)
    run, pets, cars = (
        client.get_run(i) for i in (tracked.run_id, tracked.task_run_id("pets"), tracked.task_run_id("cars"))
    )
    assert run.data.params == {"seed": "0"}
    assert "mlflow.parentRunId" not in run.data.tags
    assert [child.data.tags["mlflow.parentRunId"] for child in (pets, cars)] == [tracked.run_id] * 2
    assert [child.info.run_name for child in (pets, cars)] == ["pets", "cars"]
    assert [child.data.params for child in (pets, cars)] == [{"classes": "37"}, {"classes": "196"}]
    assert {r.info.experiment_id for r in (run, pets, cars)} == {client.get_experiment_by_name("demo").experiment_id}


def test_a_run_nests_under_a_given_parent(uri: str) -> None:
    with tracker(uri, tasks={}) as sweep, tracker(uri, tasks={"pets": {}}, parent_run_id=sweep.run_id) as trial:
        pass

    client = Client(tracking_uri=uri)
    assert client.get_run(trial.run_id).data.tags["mlflow.parentRunId"] == sweep.run_id
    assert client.get_run(trial.task_run_id("pets")).data.tags["mlflow.parentRunId"] == trial.run_id


def test_a_run_whose_process_is_gone_can_be_ended_with_its_tasks(uri: str) -> None:
    with tracker(uri, tasks={}) as sweep:
        lost = tracker(uri, tasks={"pets": {}}, parent_run_id=sweep.run_id)
        lost.__enter__()  # never left

        sweep.end_lost(lost.run_id)

    client = Client(tracking_uri=uri)
    statuses = [client.get_run(i).info.status for i in (lost.run_id, lost.task_run_id("pets"), sweep.run_id)]
    assert statuses == ["FAILED", "FAILED", "FINISHED"]


def test_an_unknown_parent_is_refused(uri: str) -> None:
    with (
        pytest.raises(ValueError, match="Parent run '0123456789abcdef'"),
        tracker(uri, parent_run_id="0123456789abcdef"),
    ):
        pass


def test_a_history_longer_than_one_call_is_complete_and_in_order(uri: str) -> None:
    records = [{"step": step, "loss": 1 / (1 + step), "rate": 0.1, "staleness": step % 3} for step in range(900)]
    with tracker(uri) as tracked:
        tracked.log_steps("pets", records[:500])
        tracked.log_steps("pets", records[500:])
        tracked.log_steps("cars", [])

    client = Client(tracking_uri=uri)
    for name in ("loss", "rate", "staleness"):
        history = client.get_metric_history(tracked.task_run_id("pets"), name)
        assert [(m.step, m.value) for m in history] == [(r["step"], r[name]) for r in records]
    assert client.get_run(tracked.task_run_id("cars")).data.metrics == {}
    assert client.get_run(tracked.run_id).data.metrics == {}


def test_a_record_may_carry_the_time_of_its_step(uri: str) -> None:
    with tracker(uri) as tracked:
        tracked.log_steps("pets", [{"step": 1, "loss": 2.0, "timestamp_ms": 1_700_000_000_000}])

    history = Client(tracking_uri=uri).get_metric_history(tracked.task_run_id("pets"), "loss")
    assert [m.timestamp for m in history] == [1_700_000_000_000]


def test_metrics_go_to_the_run_or_to_a_task(uri: str) -> None:
    with tracker(uri) as tracked:
        tracked.log_metrics(None, {"mean_top1": 90.8}, step=3)
        tracked.log_metrics("cars", {"top1": 84.1}, step=3)

    client = Client(tracking_uri=uri)
    assert client.get_run(tracked.run_id).data.metrics == {"mean_top1": 90.8}
    assert client.get_run(tracked.task_run_id("cars")).data.metrics == {"top1": 84.1}


def test_a_value_that_is_not_finite_becomes_nan_and_a_tag(uri: str) -> None:
    losses = [1.0, math.inf, math.nan, 2.0]
    with tracker(uri) as tracked:
        tracked.log_steps("pets", [{"step": step, "loss": loss, "rate": 0.1} for step, loss in enumerate(losses)])

    client = Client(tracking_uri=uri)
    values = [m.value for m in client.get_metric_history(tracked.task_run_id("pets"), "loss")]
    assert [values[0], values[3]] == [1.0, 2.0]
    assert math.isnan(values[1])
    assert math.isnan(values[2])
    tags = client.get_run(tracked.task_run_id("pets")).data.tags
    assert tags["multitask.non_finite"] == "loss is inf from step 1"
    assert "multitask.non_finite" not in client.get_run(tracked.task_run_id("cars")).data.tags


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        ({"loss": 1.0}, ValueError, "task 'pets' has no 'step'"),
        ({"step": 4, "loss": "high"}, TypeError, "'loss' of task 'pets' is 'high' at step 4"),
        ({"step": 4, "loss": None}, TypeError, "'loss' of task 'pets' is None at step 4"),
    ],
)
def test_a_bad_record_is_named_and_nothing_of_its_batch_is_kept(
    uri: str, record: dict[str, Any], error: type[Exception], message: str
) -> None:
    with tracker(uri) as tracked, pytest.raises(error, match=message):
        tracked.log_steps("pets", [{"step": 1, "loss": 1.0}, record])

    assert Client(tracking_uri=uri).get_metric_history(tracked.task_run_id("pets"), "loss") == []


def test_an_unknown_task_lists_the_known_ones(uri: str) -> None:
    with tracker(uri) as tracked, pytest.raises(KeyError, match=r"Task 'dogs' .* only \['cars', 'pets'\]"):
        tracked.log_metrics("dogs", {"top1": 1.0}, step=0)


def test_artifacts_come_back_as_they_were_and_lie_beside_the_database(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    (work / "plots").mkdir(parents=True)
    (work / "plots" / "curve.png").write_bytes(b"\x89PNG curve")
    (work / "pets.patch").write_bytes(b"patch")
    monkeypatch.chdir(work)
    before = sorted(p.name for p in work.iterdir())
    with tracker(uri, spec_text="seed: 0  # ours\n") as tracked:
        tracked.log_artifact("plots")
        tracked.log_artifact(work / "pets.patch", task="pets")

    client = Client(tracking_uri=uri)
    there = tmp_path / "download"
    there.mkdir()
    client.download_artifacts(tracked.run_id, "", str(there))
    client.download_artifacts(tracked.task_run_id("pets"), "pets.patch", str(there))
    assert (there / "plots" / "curve.png").read_bytes() == b"\x89PNG curve"
    assert (there / "spec.yaml").read_text() == "seed: 0  # ours\n"
    assert (there / "pets.patch").read_bytes() == b"patch"
    assert sorted(p.name for p in work.iterdir()) == before
    assert len(list((tmp_path / "mlflow-artifacts").rglob("pets.patch"))) == 1


def test_an_artifact_that_is_missing_or_holds_the_store_is_refused(uri: str, tmp_path: Path) -> None:
    with tracker(uri) as tracked:
        with pytest.raises(FileNotFoundError, match="no_such_file"):
            tracked.log_artifact(tmp_path / "no_such_file")
        with pytest.raises(ValueError, match="holds the artifact store"):
            tracked.log_artifact(tmp_path)


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (ZeroDivisionError(), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_leaving_the_block_ends_the_run_and_its_children(uri: str, error: BaseException | None, status: str) -> None:
    tracked = tracker(uri)
    client = Client(tracking_uri=uri)

    def statuses() -> list[str]:
        ids = [tracked.run_id, tracked.task_run_id("pets"), tracked.task_run_id("cars")]
        return [client.get_run(i).info.status for i in ids]

    def work() -> None:
        with tracked:
            assert statuses() == ["RUNNING"] * 3
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(type(error)):
            work()
    assert statuses() == [status] * 3


def test_params_that_cannot_be_told_apart_are_refused_before_anything_is_opened(uri: str) -> None:
    with pytest.raises(ValueError, match=r"\['a_b'\]"):
        tracker(uri, tasks={"pets": {}, "cars": {"a+b": 1, "a_b": 2}})


def test_the_end_of_the_run_does_not_hide_what_ended_it(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "AGAIN_S", 0.0)

    def work() -> None:
        with tracker(uri) as tracked:
            for run_id in (tracked.run_id, tracked.task_run_id("pets"), tracked.task_run_id("cars")):
                Client(tracking_uri=uri).delete_run(run_id)  # a deleted run cannot be ended
            raise ZeroDivisionError("the training failed")

    with pytest.raises(ZeroDivisionError, match="the training failed"):
        work()
    assert "1 records of run 'three tasks' are not in MLflow" in caplog.text
    assert "deleted" in caplog.text


def test_long_params_are_cut_with_a_mark_and_kept_whole_beside(uri: str, tmp_path: Path) -> None:
    names = "n" * (PARAM_CHARS + 1)
    many = {f"p{i}": i for i in range(250)}
    with tracker(uri, params={"data": {"names": names}, "many": many}, tasks={}) as tracked:
        pass

    client = Client(tracking_uri=uri)
    stored = client.get_run(tracked.run_id).data.params
    assert stored["data.names"].endswith(f"[{len(names)} characters, whole in params.json]")
    assert len(stored) == 251
    whole = json.loads(Path(client.download_artifacts(tracked.run_id, "params.json", str(tmp_path))).read_text())
    assert whole["data.names"] == names


def test_nested_params_get_names_with_dots() -> None:
    nested = {
        "seed": 0,
        "data": {"size": 16, "mean": [0.5, 0.5], "extra": {}},
        "best": None,
        "scale_bias+last_layer": True,
    }
    assert flatten(nested) == {
        "seed": "0",
        "data.size": "16",
        "data.mean": "[0.5, 0.5]",
        "data.extra": "{}",
        "best": "None",
        "scale_bias_last_layer": "True",
    }
    with pytest.raises(ValueError, match=r"\['a.b'\]"):
        flatten({"a": {"b": 1}, "a.b": 2})


@pytest.mark.parametrize("length", [0, PARAM_CHARS, PARAM_CHARS + 1, 100_000])
def test_a_param_never_exceeds_the_limit(length: int) -> None:
    value = "x" * length
    short = shorten(value)
    assert len(short) <= PARAM_CHARS
    assert (short == value) == (length <= PARAM_CHARS)


@pytest.mark.parametrize(
    "uri", ["file:///tmp/mlruns", "file:mlruns", "./mlruns", "sqlite://", "sqlite:///:memory:", "ftp://x"]
)
def test_a_uri_that_cannot_work_names_one_that_does(uri: str) -> None:
    with pytest.raises(ValueError, match=r"sqlite:///runs/mlflow\.db"):
        tracker(uri)


def test_an_experiment_that_cannot_be_used_says_why(uri: str) -> None:
    with pytest.raises(ValueError, match="'Default' is MLflow's own"):
        Tracker(uri, "Default", "x", params={}, tasks={})
    client = Client(tracking_uri=uri)
    client.delete_experiment(client.create_experiment("demo"))
    with pytest.raises(ValueError, match="mlflow experiments restore"), tracker(uri):
        pass


def test_an_experiment_that_another_process_made_meanwhile_is_used(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment_id = Client(tracking_uri=uri).create_experiment("demo")
    look_up, answers = Client.get_experiment_by_name, [None]
    monkeypatch.setattr(
        Client, "get_experiment_by_name", lambda self, name: answers.pop() if answers else look_up(self, name)
    )
    with tracker(uri) as tracked:
        pass
    assert answers == []
    assert Client(tracking_uri=uri).get_run(tracked.run_id).info.experiment_id == experiment_id


def test_a_busy_store_is_asked_again(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "AGAIN_S", 0.01)
    busy = mlflow.exceptions.MlflowException("locked", error_code=mlflow.protos.databricks_pb2.TEMPORARILY_UNAVAILABLE)
    log_batch, failures = Client.log_batch, [busy, busy]

    def sometimes(self: Any, *args: Any, **options: Any) -> None:
        if failures:
            raise failures.pop()
        log_batch(self, *args, **options)

    with tracker(uri) as tracked:
        monkeypatch.setattr(Client, "log_batch", sometimes)
        tracked.log_metrics("pets", {"top1": 1.0}, step=0)
        wait_until(lambda: failures == [])
    assert Client(tracking_uri=uri).get_run(tracked.task_run_id("pets")).data.metrics == {"top1": 1.0}


def test_threads_may_share_a_tracker(uri: str) -> None:
    steps = 200
    with tracker(uri) as tracked:

        def work(task: str, first: int) -> None:
            for step in range(first, steps, 2):
                tracked.log_steps(task, [{"step": step, "loss": step / 7}])

        threads = [threading.Thread(target=work, args=(task, first)) for task in ("pets", "cars") for first in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    client = Client(tracking_uri=uri)
    for task in ("pets", "cars"):
        history = client.get_metric_history(tracked.task_run_id(task), "loss")
        assert sorted((m.step, m.value) for m in history) == [(step, step / 7) for step in range(steps)]


@pytest.mark.parametrize("path", ["/tmp/a%20b/mlflow.db", "/tmp/runs?new/mlflow.db", "runs/50%25/mlflow.db"])
def test_a_path_that_mlflow_would_read_as_another_one_is_refused(path: str) -> None:
    with pytest.raises(TrackingError, match="Rename the directory, or set tracking"):
        sqlite_uri(Path(path))


def test_a_uri_with_a_code_for_a_character_is_refused() -> None:
    with pytest.raises(TrackingError, match="parts of a URI"):
        tracker("sqlite:////tmp/a%20b/mlflow.db")


def histories(client: Any, tracked: Tracker) -> dict[str, list[tuple[int, float]]]:
    """Losses of each task, as MLflow has them."""
    found = {}
    for task in ("pets", "cars"):
        run_id = tracked.task_run_id(task)
        found[task] = [(m.step, m.value) for m in client.get_metric_history(run_id, "loss")]
    return found


def test_what_mlflow_misses_waits_on_disk_and_is_sent_later(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "AGAIN_S", 0.0)
    folder = tmp_path / "a run"
    folder.mkdir()
    (folder / "result.json").write_text("{}")
    with tracker(uri, folder=folder, send_later="multitask track RUN") as tracked:
        tracked.log_steps("pets", [{"step": 0, "loss": 2.0}])
        wait_until(lambda: not (folder / OUTBOX).exists())
        (tmp_path / "mlflow.db").rename(tmp_path / "away.db")
        tracked.log_steps("pets", [{"step": 1, "loss": 1.0}])
        tracked.log_steps("cars", [{"step": 0, "loss": 0.5}])
        tracked.log_artifact(folder / "result.json")

    assert f"4 records of run 'three tasks' are not in MLflow at {uri}" in caplog.text
    assert "mlflow.db' is gone" in caplog.text
    assert "send them with: multitask track RUN" in caplog.text
    assert not (tmp_path / "mlflow.db").exists(), "no empty database stands in for the one that was moved"
    later = tracker(uri, folder=folder, resume_run_id=tracked.run_id)
    (tmp_path / "away.db").rename(tmp_path / "mlflow.db")
    assert later.send_waiting() == 4
    assert later.send_waiting() == 0

    client = Client(tracking_uri=uri)
    assert histories(client, tracked) == {"pets": [(0, 2.0), (1, 1.0)], "cars": [(0, 0.5)]}
    ids = [tracked.run_id, tracked.task_run_id("pets"), tracked.task_run_id("cars")]
    assert [client.get_run(run_id).info.status for run_id in ids] == ["FINISHED"] * 3
    assert {file.path for file in client.list_artifacts(tracked.run_id)} == {"result.json"}
    assert {path.name for path in folder.iterdir()} == {"result.json"}


def test_a_run_that_began_without_mlflow_gets_there_later(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "AGAIN_S", 0.0)
    with monkeypatch.context() as away:

        def fail(*_: Any) -> None:
            raise ConnectionError("nobody answers")

        away.setattr(MlflowStore, "send", fail)
        with tracker(uri, folder=tmp_path, params={"seed": 1}, spec_text="seed: 1") as tracked:
            assert "MLflow cannot be reached (nobody answers). Training does not wait for it" in caplog.text
            assert (tracked.run_id, tracked.task_run_id("pets")) == (None, None)
            tracked.log_steps("pets", [{"step": 0, "loss": 2.0}])
        later = tracker(uri, folder=tmp_path, params={"seed": 1})
        with pytest.raises(TrackingError, match=r"4 records .* still wait .*nobody answers\. Try again"):
            later.send_waiting()

    with tracker(uri, folder=tmp_path, params={"seed": 1}) as later:  # the run is resumed
        later.log_steps("cars", [{"step": 0, "loss": 0.5}])

    client = Client(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    assert {run.info.run_id for run in runs} == {later.run_id, later.task_run_id("pets"), later.task_run_id("cars")}
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert client.get_run(later.run_id).data.params == {"seed": "1"}
    assert histories(client, later) == {"pets": [(0, 2.0)], "cars": [(0, 0.5)]}


def test_the_run_of_a_killed_process_is_ended(uri: str, tmp_path: Path) -> None:
    with tracker(uri, tasks={}, folder=tmp_path):
        pass
    killed = tracker(uri, folder=tmp_path)
    killed.__enter__()  # never left

    tracker(uri, folder=tmp_path, resume_run_id=killed.run_id).send_waiting(lost=True)

    client = Client(tracking_uri=uri)
    ids = [killed.run_id, killed.task_run_id("pets"), killed.task_run_id("cars")]
    assert [client.get_run(run_id).info.status for run_id in ids] == ["FAILED"] * 3


def test_an_answer_that_is_lost_opens_no_second_run(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    create_run, lost = Client.create_run, [True, True]

    def unanswered(self: Any, *args: Any, **options: Any) -> Any:
        run = create_run(self, *args, **options)
        if lost and lost.pop():
            raise ConnectionError("the answer is lost")
        return run

    monkeypatch.setattr(Client, "create_run", unanswered)
    with tracker(uri) as tracked:
        pass

    assert lost == []
    client = Client(tracking_uri=uri)
    assert len(client.search_runs([client.get_experiment_by_name("demo").experiment_id])) == 3
    assert client.get_run(tracked.run_id).info.status == "FINISHED"


def test_a_task_under_the_name_of_a_removed_one_has_a_run_of_its_own(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a later process, and where records are sent twice because an answer was lost."""
    send, lost = MlflowStore.send, iter([True])

    def send_and_lose_an_answer(store: MlflowStore, records: Any) -> None:
        send(store, records)
        if any(getattr(record, "task", None) == "cars (2)" for record in records) and next(lost, False):
            raise ConnectionError("the answer is lost")

    monkeypatch.setattr(MlflowStore, "send", send_and_lose_an_answer)
    both = {"pets": {}, "cars": {"rate": 1}}
    with tracker(uri, tasks=both, folder=tmp_path) as first:
        first.log_metrics("cars", {"top1": 1.0}, 1)
        first.track_tasks({"pets": {}})
        with pytest.raises(KeyError, match="cars"):
            first.log_metrics("cars", {"top1": 1.5}, 1)
        first.track_tasks(both | {"cars": {"rate": 2}})
        first.log_metrics("cars", {"top1": 2.0}, 2)
        first.track_tasks({"pets": {}})
    assert first.task_runs == {"pets": 1, "cars": 2}
    with tracker(
        uri, tasks={"pets": {}}, folder=tmp_path, resume_run_id=first.run_id, task_runs=first.task_runs
    ) as second:
        second.track_tasks(both)
        second.log_metrics("cars", {"top1": 3.0}, 3)
        second.track_tasks(both)
    with tracker(uri, tasks=both, folder=tmp_path, resume_run_id=first.run_id, task_runs=second.task_runs) as third:
        third.log_metrics("cars", {"top1": 4.0}, 4)

    client = Client(tracking_uri=uri)
    children = client.search_runs([client.get_run(first.run_id).info.experiment_id], "params.rate LIKE '%'")
    found = {
        child.info.run_name: {point.value for point in client.get_metric_history(child.info.run_id, "top1")}
        for child in children
    }
    assert next(lost, None) is None, "no answer was lost"
    assert found == {"cars": {1.0}, "cars (2)": {2.0}, "cars (3)": {3.0, 4.0}}
    assert {child.info.status for child in children} == {"FINISHED"}
    assert third.task_run_id("pets") == first.task_run_id("pets")


def test_where_the_old_run_is_not_a_new_one_begins_with_a_warning(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    with tracker(uri, resume_run_id="0123456789abcdef0123456789abcdef") as tracked:
        tracked.log_steps("pets", [{"step": 7, "loss": 1.0}])

    assert f"MLflow at {uri} does not have run 0123456789abcdef0123456789abcdef" in caplog.text
    assert "a new MLflow run begins" in caplog.text
    assert histories(Client(tracking_uri=uri), tracked)["pets"] == [(7, 1.0)]


def test_a_store_that_was_moved_with_its_artifacts_writes_nothing_to_the_old_place(uri: str, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new 50%"
    old.mkdir()
    shutil.move(uri.removeprefix("sqlite:///"), old / "mlflow.db")
    with tracker(f"sqlite:///{old}/mlflow.db", spec_text="seed: 0") as before:
        pass
    old.rename(new)
    (new / "late.txt").write_text("late")

    with tracker(f"sqlite:///{new}/mlflow.db", resume_run_id=before.run_id) as after:
        after.log_artifact(new / "late.txt")

    assert after.run_id == before.run_id
    assert not old.exists()
    client, there = Client(tracking_uri=after.tracking_uri), tmp_path / "download"
    there.mkdir()
    client.download_artifacts(after.run_id, "", str(there))
    assert {path.name for path in there.iterdir()} == {"spec.yaml", "late.txt"}


def _train(uri: str, offset: int, start: Any, answers: Any) -> None:
    start.wait(120)
    with tracker(uri) as tracked:
        for call in range(20):
            for task in ("pets", "cars"):
                steps = range(100 * call, 100 * (call + 1))
                tracked.log_steps(task, [{"step": step, "loss": offset + step} for step in steps])
    answers.put((offset, {task: tracked.task_run_id(task) for task in ("pets", "cars")}))


@pytest.mark.slow
def test_a_start_that_is_killed_leaves_no_half_made_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", killed)
    uri, database = resolve(f"sqlite:///{tmp_path}/mlflow.db")
    about: Any = {"params": {}, "task_params": {}, "folder": tmp_path, "parent_run_id": None, "run_id": None}
    store = MlflowStore(uri, database, experiment="demo", run_name="job", **about)
    with pytest.raises(KeyboardInterrupt):
        store.send([])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes_that_start_together_on_no_file_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "mlflow.db"
    uri = f"sqlite:///{path}"
    assert not path.exists()
    context = multiprocessing.get_context("spawn")
    start, answers = context.Event(), context.Queue()
    processes = [context.Process(target=_train, args=(uri, offset, start, answers)) for offset in (0, 10_000)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    runs = dict(answers.get(timeout=10) for _ in processes)

    client = Client(tracking_uri=uri)
    assert sorted(p.name for p in path.parent.iterdir()) == ["mlflow.db"]
    assert len([e for e in client.search_experiments() if e.name == "demo"]) == 1
    for offset, tasks in runs.items():
        for run_id in tasks.values():
            history = client.get_metric_history(run_id, "loss")
            assert [(m.step, m.value) for m in history] == [(step, offset + step) for step in range(2000)]


QUIET = """
import logging, sys
logging.basicConfig(level=logging.INFO)
import multitask.run.tracking
assert "mlflow" not in sys.modules, "importing the module imports mlflow"
tracker = multitask.run.tracking.Tracker(sys.argv[1], "demo", "x", params={"a": 1}, tasks={"pets": {}}, spec_text="x")
with tracker:
    tracker.log_steps("pets", [{"step": 0, "loss": float("inf")}])
    tracker.log_artifact(__file__)
"""


def test_the_first_use_says_nothing_on_the_terminal_and_writes_nothing_where_it_stands(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "script.py").write_text(QUIET)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment["PYTHONPATH"] = str(Path(multitask.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), "sqlite:///runs/mlflow.db"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path / "here",
        env=environment,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [p.name for p in (tmp_path / "here").iterdir()] == ["runs"]
    assert sorted(p.name for p in (tmp_path / "here" / "runs").iterdir()) == ["mlflow-artifacts", "mlflow.db"]


def test_the_level_asked_for_in_the_environment_stays(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("mlflow")
    before = logger.level
    monkeypatch.setenv("MLFLOW_LOGGING_LEVEL", "DEBUG")
    logger.setLevel(logging.DEBUG)
    try:
        with tracker(uri):
            assert logger.level == logging.DEBUG
    finally:
        logger.setLevel(before)
