"""Sweeps on Ray Tune, with MLflow."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import optuna
import pytest
import yaml
from rich.console import Console

import multitask
from multitask.run.directory import evaluate_models
from multitask.run.live import read_status
from multitask.spec.reading import dump_spec
from multitask.spec.schema import JobSpec
from multitask.sweep import SweepResult, run_sweep
from multitask.sweep.searcher import NumberedSampler
from tests.conftest import wait_until

pytestmark = [pytest.mark.ray]
PARENT = "mlflow.parentRunId"
MakeSpec = Callable[..., JobSpec]


def content(make_spec: MakeSpec, tmp_path: Path, job: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A sweep whose trials train in a second."""
    base = dump_spec(make_spec(tasks={"pets": {}}, train_shared=False, **job))
    own = {key: value for key, value in base.items() if key not in ("name", "directory", "tracking")}
    return {"name": "rates", "directory": str(tmp_path / "rates"), "job": own, **changes}


def runs(result: SweepResult, uri: str | None = None) -> tuple[Any, Any, dict[str, Any], dict[str, list[Any]]]:
    """MLflow's client, the sweep's run, trial name -> run, trial name -> its tasks' runs.

    Args:
        uri: of the store; by default the file beside the sweep's directory.
    """
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri or f"sqlite:///{result.directory.parent}/mlflow.db")
    sweep = client.get_run(result.mlflow_run_id)
    every = client.search_runs([sweep.info.experiment_id], max_results=1000)
    below: dict[str, list[Any]] = {}
    for run in every:
        below.setdefault(run.data.tags.get(PARENT, ""), []).append(run)
    trials = {run.info.run_name: run for run in below[sweep.info.run_id]}
    return client, sweep, trials, {name: below.get(run.info.run_id, []) for name, run in trials.items()}


@pytest.mark.usefixtures("ray_cluster")
def test_a_sweep_survives_a_failing_trial_chooses_writes_back_retrains_and_tests_once(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    """The chosen setting is trained anew on all images that are not test images."""
    spec = content(
        make_spec,
        tmp_path,
        {"steps": 40, "evaluate_every": 20},
        # At the last rate the first step leaves no finite loss.
        space={"tasks.method": {"grid": ["scale_bias+last_layer"]}, "optimizer.rate": {"grid": [1e-7, 0.03, 1e30]}},
        concurrent=1,
        retries=0,
        retrain=True,
        test=True,
    )

    result = run_sweep(spec, console=Console(quiet=True))

    assert [outcome.state for outcome in result.outcomes] == ["finished", "finished", "failed"]
    assert result.choice is not None
    # Its process had trained another trial before.
    assert result.choice.trial.number == 1
    winner = result.outcomes[1]
    again = multitask.train(result.directory / "best.yaml", console=Console(quiet=True))
    assert again.result["best"]["tasks"]["pets"]["top1"] == winner.top1
    assert (
        again.result["tasks"]["pets"]["curve"] == multitask.Run(winner.plan.directory).result["tasks"]["pets"]["curve"]
    )

    assert result.verdict is not None
    retrained = multitask.Run(result.directory / "retrained_0001")
    assert [task.train_on for task in retrained.spec.tasks] == ["train+validation"]
    assert retrained.spec.optimizer == result.choice.trial.spec.optimizer
    assert (result.verdict.directory, result.verdict.version) == (str(retrained.directory), "last")
    _, models = retrained.models("last")
    assert result.verdict.tasks == evaluate_models(models, retrained.spec, "test")

    client, sweep, trials, tasks = runs(result)
    assert sweep.info.status == "FINISHED"
    assert {name: run.info.status for name, run in trials.items()} == {
        "rates_0000": "FINISHED",
        "rates_0001": "FINISHED",
        "rates_0002": "FAILED",
        retrained.spec.name: "FINISHED",
    }
    assert [[run.info.run_name for run in tasks[name]] for name in trials] == [["pets"]] * 4
    assert trials["rates_0000"].data.params["setting.optimizer.rate"] == "1e-07"
    assert sweep.data.metrics["test_top1"] == result.verdict.top1
    assert {file.path for file in client.list_artifacts(sweep.info.run_id)} >= {"trials.csv", "best.yaml", "spec.yaml"}

    files = [*(outcome.plan.directory / "last.safetensors" for outcome in result.outcomes[:2])]
    files.append(result.directory / "test.json")
    written = [file.stat().st_mtime_ns for file in files]
    resumed = run_sweep(spec, go_on=True, console=Console(quiet=True))
    assert [outcome.state for outcome in resumed.outcomes] == ["finished", "finished", "failed"]
    assert (resumed.mlflow_run_id, resumed.verdict) == (result.mlflow_run_id, result.verdict)
    assert [file.stat().st_mtime_ns for file in files] == written
    with pytest.raises(multitask.SpecError, match="--resume"):
        run_sweep(spec, console=Console(quiet=True))
    with pytest.raises(multitask.SpecError, match="another spec"):
        run_sweep({**spec, "repeats": 2}, go_on=True, console=Console(quiet=True))


@pytest.mark.usefixtures("ray_cluster")
def test_a_searcher_is_told_what_its_trials_found_and_goes_on_as_if_never_stopped(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    spec = content(
        make_spec,
        tmp_path,
        {"steps": 4, "evaluate_every": 2},
        space={"optimizer.rate": {"log_uniform": [1e-5, 0.1]}, "tasks.method": {"choice": ["full", "last_layer"]}},
        searcher={"name": "optuna", "startup_trials": 2},
        samples=4,
        concurrent=1,
    )

    result = run_sweep(spec, console=Console(quiet=True))

    assert [outcome.state for outcome in result.outcomes] == ["finished"] * 4
    told = {outcome.plan.number: outcome.top1 or 0.0 for outcome in result.outcomes}
    found = [dict(outcome.plan.values) for outcome in result.outcomes]
    assert found == suggestions(told)
    assert found[2:] != suggestions({number: -top1 for number, top1 in told.items()})[2:]
    assert result.choice is not None
    assert result.choice.top1 == max(told.values())
    _, sweep, trials, _ = runs(result)
    assert sweep.data.params["trials"] == "4"
    assert trials["rates_0003"].data.params["setting.tasks.method"] == found[3]["tasks.method"]

    # As if it had been killed in its third trial.
    settings = tmp_path / "rates" / "settings.json"
    settings.write_text(json.dumps(found[:3]))
    for number in (2, 3):
        shutil.rmtree(tmp_path / "rates" / "trials" / f"{number:04d}")
    written = [(outcome.plan.directory / "result.json").stat().st_mtime_ns for outcome in result.outcomes[:2]]
    resumed = run_sweep(spec, go_on=True, console=Console(quiet=True))
    assert [dict(outcome.plan.values) for outcome in resumed.outcomes] == found
    assert [outcome.curve for outcome in resumed.outcomes] == [outcome.curve for outcome in result.outcomes]
    assert [(outcome.plan.directory / "result.json").stat().st_mtime_ns for outcome in resumed.outcomes[:2]] == written


def suggestions(told: Mapping[int, float]) -> list[dict[str, Any]]:
    """What Optuna alone suggests for as many trials as were told of, each told before the next is asked for."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=NumberedSampler(0, 2))
    found = []
    for top1 in told.values():
        trial = study.ask()
        rate = trial.suggest_float("optimizer.rate", 1e-5, 0.1, log=True)
        method = trial.suggest_categorical("tasks.method", (0, 1))
        found.append({"optimizer.rate": rate, "tasks.method": ("full", "last_layer")[method]})
        study.tell(trial, top1)
    return found


@pytest.mark.usefixtures("ray_cluster")
def test_a_suggestion_that_makes_no_job_ends_the_sweep_and_says_so(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = content(
        make_spec,
        tmp_path,
        {"schedule": {"name": "cosine"}},
        # Each fits the first of the other, so that the edges of the space are jobs.
        space={"steps": {"choice": [4, 2]}, "schedule.warm_up_rounds": {"choice": [1, 3]}},
        searcher={"name": "optuna"},
        samples=20,
        concurrent=1,
    )

    with pytest.raises(multitask.SpecError, match="warm_up_rounds is 3, but the job has 2 steps"):
        run_sweep(spec, console=Console(quiet=True))


@pytest.mark.usefixtures("ray_cluster")
def test_a_sweep_without_room_is_refused_before_anything_is_written(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = content(make_spec, tmp_path, {}, space={"optimizer.rate": {"grid": [0.1, 0.2, 0.3]}}, concurrent=3)

    with pytest.raises(multitask.SpecError, match=r"needs 3 workers of 1 CPU\..*room for 2 of 3"):
        run_sweep(spec, console=Console(quiet=True))

    assert not (tmp_path / "rates").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_asha_stops_what_falls_behind(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = content(
        make_spec,
        tmp_path,
        {"steps": 80, "evaluate_every": 20},
        # The second one starts first; a scheduler lets what comes first pass.
        space={"optimizer.rate": {"grid": [1e-7, 0.03, 1e-8]}},
        scheduler={"name": "asha", "grace_rounds": 40, "reduction": 2},
        concurrent=1,
    )

    result = run_sweep(spec, console=Console(quiet=True))

    assert [outcome.state for outcome in result.outcomes] == ["stopped", "finished", "stopped"]
    assert [outcome.rounds for outcome in result.outcomes] == [40, 80, 40]
    assert result.choice is not None
    assert result.choice.trial.number == 1
    # Told again what it knew, the scheduler decides the same.
    resumed = run_sweep(spec, go_on=True, console=Console(quiet=True))
    assert [outcome.rounds for outcome in resumed.outcomes] == [40, 80, 40]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_asha_stops_what_a_searcher_suggests(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = content(
        make_spec,
        tmp_path,
        {"steps": 80, "evaluate_every": 20},
        space={"optimizer.rate": {"choice": [0.03, 1e-7]}},
        scheduler={"name": "asha", "grace_rounds": 40, "reduction": 2},
        searcher={"name": "optuna"},
        samples=4,
        concurrent=1,
    )

    result = run_sweep(spec, console=Console(quiet=True))

    ends = [(outcome.state, outcome.rounds) for outcome in result.outcomes]
    assert set(ends) == {("stopped", 40), ("finished", 80)}
    assert result.choice is not None
    assert result.choice.trial.values == {"optimizer.rate": 0.03}
    resumed = run_sweep(spec, go_on=True, console=Console(quiet=True))
    assert [(outcome.state, outcome.rounds) for outcome in resumed.outcomes] == ends


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_trial_may_have_workers_of_its_own(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = content(
        make_spec,
        tmp_path,
        {"steps": 2, "evaluate_every": 2},
        space={"engine.name": {"grid": ["async", "allreduce"]}},
        concurrent=1,
    )
    spec["job"]["engine"] = {"name": "async"}  # without the options that only one engine has

    result = run_sweep(spec, console=Console(quiet=True))

    assert [outcome.state for outcome in result.outcomes] == ["finished", "finished"]


def sweep_at_a_time(make_spec: MakeSpec, tmp_path: Path, rates: Sequence[float], uri: str | None = None) -> None:
    """Run all trials at a time, and count in MLflow what they should have written: all of it once, where it belongs."""
    spec = content(
        make_spec,
        tmp_path,
        {"steps": 20, "evaluate_every": 5, "resources": {"cpus_per_worker": 2 / len(rates)}},
        space={"optimizer.rate": {"grid": list(rates)}},
        concurrent=len(rates),
        retries=0,
    )

    result = run_sweep(spec, mlflow_uri=uri, console=Console(quiet=True))

    client, sweep, trials, tasks = runs(result, uri)
    assert sorted(trials) == [f"rates_{number:04d}" for number in range(len(rates))]
    assert len(client.search_runs([sweep.info.experiment_id], max_results=1000)) == 1 + 2 * len(rates)
    for rate, outcome in zip(rates, result.outcomes, strict=True):
        assert [round_ for round_, _ in outcome.curve] == [5, 10, 15, 20]
        (task,) = tasks[outcome.plan.spec.name]

        def history(name: str, run_id: str = task.info.run_id) -> list[tuple[int, float]]:
            return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, name))

        of_steps = {name for name in task.data.metrics if not name.startswith("validation_")}
        assert of_steps >= {"loss", "rate", "staleness", "samples_per_s"}
        for name in of_steps:
            assert [step for step, _ in history(name)] == list(range(20)), (rate, name)
        assert {value for _, value in history("rate")} == {rate}
        assert tuple(history("validation_top1")) == outcome.curve


@contextlib.contextmanager
def tracking_server(folder: Path) -> Iterator[str]:
    """MLflow's own server on this machine, with everything it keeps in a folder; its address."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "files")]
    # Without the processes that would run MLflow's own jobs.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    log, address = folder / "log.txt", f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *where, *store],
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        wait_until(lambda: server.poll() is not None or answers(f"{address}/health"))
        assert server.poll() is None, log.read_text()
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=10):
            return True
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_trials_at_a_time_lose_and_misplace_no_metric(make_spec: MakeSpec, tmp_path: Path) -> None:
    sweep_at_a_time(make_spec, tmp_path, [0.001, 0.002, 0.003, 0.004])


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_trials_at_a_time_lose_and_misplace_no_metric_on_a_tracking_server(
    make_spec: MakeSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tracking_server(tmp_path / "server") as address:
        sweep_at_a_time(make_spec, tmp_path, [0.001, 0.002], address)
    assert not (tmp_path / "mlflow.db").exists()
    # That is for what a verb prints, as JSON perhaps.
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_sweep_goes_on_though_a_trial_is_killed_and_later_the_whole_sweep(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    """The trial goes on in another process from its last checkpoint; the sweep repeats nothing that has finished."""
    spec = content(
        make_spec,
        tmp_path,
        {"steps": 200, "evaluate_every": 20, "checkpoints": {"every_rounds": 10}},
        space={"optimizer.rate": {"log_uniform": [0.01, 0.03]}},
        searcher={"name": "optuna"},
        samples=2,
        concurrent=1,
    )
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(spec))
    first, second = (tmp_path / "rates" / "trials" / f"{number:04d}" for number in range(2))
    command = [sys.executable, "-m", "jobs.cli", "sweep", str(tmp_path / "sweep.yaml")]
    # A Ray and a session of its own: all processes go with the sweep's, as they do when a machine goes.
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    killed = subprocess.Popen(command, env=environment, start_new_session=True)

    def wait_for(condition: Callable[[], bool]) -> None:
        wait_until(lambda: killed.poll() is not None or condition())
        assert killed.poll() is None, "the sweep ended by itself"

    wait_for(lambda: (first / "status.json").is_file() and bool(read_status(first)["tasks"]["pets"]["curve"]))
    lost = read_status(first)["process"]
    os.kill(lost, signal.SIGKILL)
    wait_for((second / "status.json").is_file)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    written = (first / "result.json").stat().st_mtime_ns

    result = run_sweep(tmp_path / "sweep.yaml", go_on=True, console=Console(quiet=True))

    assert [outcome.state for outcome in result.outcomes] == ["finished", "finished"]
    assert (first / "result.json").stat().st_mtime_ns == written
    assert read_status(first)["process"] != lost
    client, _, _, tasks = runs(result)
    steps = [metric.step for metric in client.get_metric_history(tasks["rates_0000"][0].info.run_id, "loss")]
    assert set(steps) == set(range(200))
    assert steps.count(0) == 1
