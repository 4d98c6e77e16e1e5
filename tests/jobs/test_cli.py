"""The command as a user sees it: exit status, messages, JSON."""

import json
import os
import signal
import threading
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import ray
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.main import get_command

from jobs.cli import VERBS, app
from multitask import Stopped, train
from multitask.run.directory import write_spec
from multitask.run.live import read_status
from multitask.run.stopping import first_interrupt, sigterm_as_ctrl_c
from multitask.server.messages import PushRejectedError
from multitask.server.parameter_server import ParameterServer
from multitask.spec.reading import dump_spec
from multitask.spec.schema import JobSpec
from tests.conftest import wait_until
from tests.jobs.command import multitask
from tests.multitask.run.test_resuming import interrupt_when


@pytest.fixture
def spec_file(make_spec: Callable[..., JobSpec], tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(dump_spec(make_spec(steps=2))))
    return path


def test_train_export_inspect_verify_fold(spec_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "job"

    trained = multitask("train", spec_file, "--json")
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["engine"] == "local"

    standing = json.loads(multitask("status", run, "--json").stdout)
    assert (standing["state"], standing["tasks"]["pets"]["made"]) == ("finished", 2)
    assert "2/2" in multitask("status", run).stdout
    again = multitask("resume", run)
    assert (again.returncode, "has ended" in again.stderr) == (1, True)
    late = multitask("remove", run, "cars")
    assert (late.returncode, "is finished" in late.stderr) == (1, True)

    exported = json.loads(multitask("export", run, "--json").stdout)
    assert {Path(name).name for name in exported} == {"backbone.safetensors", "pets.patch", "cars.patch"}
    assert all(Path(name).stat().st_size == size for name, size in exported.items())
    assert f"Next: multitask predict {run / 'export'} PHOTO... --task TASK" in multitask("export", run).stdout
    backbone, bundle = run / "export" / "backbone.safetensors", run / "export" / "pets.patch"

    inspected = json.loads(multitask("bundle", "inspect", bundle, "--json").stdout)
    assert (inspected["method"], inspected["num_classes"]) == ("scale_bias+last_layer", 4)
    assert "class 3" in multitask("bundle", "inspect", bundle).stdout

    assert multitask("bundle", "verify", bundle, "--backbone", backbone).returncode == 0
    folded = multitask("bundle", "fold", bundle, "--backbone", backbone, tmp_path / "plain.safetensors")
    assert folded.returncode == 0, folded.stderr
    assert not any("running_mean" in name for name in load_file(tmp_path / "plain.safetensors"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("multitask.progress.LINE_EVERY_S", 0)
        evaluated = multitask("evaluate", run, "--task", "pets", "--json")
    assert list(json.loads(evaluated.stdout)) == ["pets"]
    assert "evaluating on test: 24 of 24 images" in evaluated.stderr
    unknown = multitask("evaluate", run, "--task", "pet")
    assert unknown.returncode == 1
    assert "Did you mean 'pets'?" in unknown.stderr

    damaged = bytearray(bundle.read_bytes())
    damaged[-1] ^= 1
    bundle.write_bytes(damaged)
    refused = multitask("bundle", "verify", bundle, "--backbone", backbone)
    assert refused.returncode == 1
    assert "error:" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["train"],
        ["sweep"],
        ["export"],
        ["evaluate"],
        ["plan"],
        ["demo"],
        ["bundle"],
        ["bundle", "fold"],
        ["data", "import", "paths"],
    ],
)
def test_every_verb_has_help(arguments: list[str]) -> None:
    shown = multitask(*arguments, "--help")

    assert shown.returncode == 0
    assert "Usage" in shown.stdout


def test_the_help_shows_every_verb_in_the_order_of_work() -> None:
    order = list(chain.from_iterable(VERBS.values()))
    verbs = get_command(app).commands.keys()
    assert verbs <= set(order)
    shown = multitask("-h").stdout
    places = [shown.index(f"\n  {verb} ") for verb in order if verb in verbs]
    assert places == sorted(places)
    assert all(option in shown for option in ("--version", "--debug", "--install-completion", "-h, --help"))
    assert shown == multitask("--help").stdout


def test_the_versions_in_use_are_printed() -> None:
    shown = multitask("--version")
    assert shown.returncode == 0
    assert f"torch {torch.__version__.partition('+')[0]}" in shown.stdout
    assert f"ray {ray.__version__}" in shown.stdout


def test_the_shell_completes_verbs_and_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_MULTITASK_COMPLETE", "complete_bash")
    for typed, completed in (("multitask st", ["status"]), ("multitask evaluate --sa", ["--save-predictions"])):
        monkeypatch.setenv("COMP_WORDS", typed)
        monkeypatch.setenv("COMP_CWORD", str(typed.count(" ")))
        assert multitask().stdout.split() == completed


def test_ctrl_c_ends_training_with_status_130_and_says_how_to_go_on(
    make_spec: Callable[..., JobSpec], tmp_path: Path
) -> None:
    spec = make_spec(steps=100_000, evaluate_every=100_000)
    write_spec(tmp_path / "job.yaml", spec)
    thread = interrupt_when(spec.run_directory, lambda status: status["tasks"]["pets"]["made"] > 0)

    stopped = multitask("train", tmp_path / "job.yaml")
    thread.join()

    assert stopped.returncode == 130
    assert f"multitask resume {spec.run_directory}" in stopped.stderr
    assert json.loads(multitask("status", spec.run_directory, "--json").stdout)["state"] == "stopped"


def test_sigterm_ends_training_with_status_143(spec_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        with sigterm_as_ctrl_c(), first_interrupt(lambda: None):
            signal.raise_signal(signal.SIGTERM)
            raise Stopped("Go on with: multitask resume")

    monkeypatch.setattr("multitask.train", stopped, raising=False)
    ended = multitask("train", spec_file)
    assert (ended.returncode, ended.stderr) == (143, "Go on with: multitask resume\n")


def test_track_sends_what_waits(tmp_path: Path) -> None:
    failed = multitask("track", tmp_path)
    assert failed.returncode == 1
    assert "holds no run" in failed.stderr
    assert list(tmp_path.iterdir()) == []


def test_tasks_join_and_leave_a_running_job(make_spec: Callable[..., JobSpec], tmp_path: Path) -> None:
    spec = make_spec(steps=100_000, evaluate_every=100_000)
    run, more = spec.run_directory, tmp_path / "more.yaml"
    task = {**dump_spec(spec)["tasks"][0], "name": "more", "resolution": 12}
    more.write_text(yaml.safe_dump(task))
    changes: list[CompletedProcess[str]] = []

    def change() -> None:
        wait_until(lambda: (run / "status.json").is_file() and read_status(run)["tasks"]["pets"]["made"] > 0)
        changes.append(multitask("attach", run, more))
        changes.append(multitask("remove", run, "cars"))
        wait_until(lambda: read_status(run)["tasks"]["more"]["made"] > 0)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=change, daemon=True)
    thread.start()
    with pytest.raises(Stopped):
        train(spec, console=Console(quiet=True))
    thread.join()

    attached, removed = changes
    assert (attached.returncode, removed.returncode) == (0, 0), attached.stderr + removed.stderr
    assert "now trains the task" in attached.stdout
    assert f"{run}/removed" in removed.stdout
    made = {name: found["made"] for name, found in read_status(run)["tasks"].items()}
    assert made.keys() == {"pets", "more"}
    assert made["pets"] > made["more"]
    assert (run / "removed" / "cars.safetensors").is_file()


def test_a_bad_spec_is_an_error_without_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("nam: job\n")

    failed = multitask("train", path)

    assert failed.returncode == 1
    assert f"{path}: nam: unknown key; did you mean name?" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert "Traceback" in multitask("--debug", "train", path).stderr


def test_a_bundle_of_another_backbone_is_refused(make_spec: Callable[..., JobSpec], tmp_path: Path) -> None:
    export = train(make_spec(steps=1)).export()
    other = load_file(export.backbone)
    other["features.0.0.weight"] += 1
    save_file(other, tmp_path / "other.safetensors")

    refused = multitask("bundle", "verify", export.bundles["pets"], "--backbone", tmp_path / "other.safetensors")

    assert refused.returncode == 1
    assert "expected" in refused.stderr
    assert "found" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs either a job spec, with or without --overwrite, or --resume RUN"),
        (["job.yaml", "--resume", "runs/job"], "needs either a job spec"),
        (["--overwrite", "--resume", "runs/job"], "needs either a job spec"),
        (["--attach", "runs/job", "--task", "food.yaml"], "`multitask attach RUN FILE`"),
        (["--remove", "runs/job", "--task", "cars"], "`multitask remove RUN TASK`"),
    ],
)
def test_train_says_what_goes_together(arguments: list[str], message: str) -> None:
    refused = multitask("train", *arguments)
    assert refused.returncode == 1
    assert message in refused.stderr


def test_a_task_file_is_checked_before_the_job_is_asked(tmp_path: Path) -> None:
    task = tmp_path / "task.yaml"
    task.write_text("{name: more, data: ./food, metod: last_layer, resolution: 8}")
    refused = multitask("attach", tmp_path, task)
    assert refused.returncode == 1
    assert f"{task}: metod: unknown key; did you mean method?" in refused.stderr


def test_calls_that_the_server_rejected_are_shown(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = ParameterServer.finish

    def meet_a_stranger(server: ParameterServer, worker: str, step: int) -> None:
        with pytest.raises(PushRejectedError):
            server.join("stranger/0", 0, None)
        finish(server, worker, step)

    monkeypatch.setattr(ParameterServer, "finish", meet_a_stranger)
    assert multitask("train", spec_file).returncode == 0

    run = tmp_path / "runs" / "job"
    assert json.loads((run / "result.json").read_text())["rejected_calls"] == 2
    assert "rejected: 2 pushes and joins" in multitask("status", run).stdout
