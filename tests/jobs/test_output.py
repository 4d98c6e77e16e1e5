"""What the verbs print, in a pipe and on a terminal of 80 by 24: all names, ids and numbers stand whole."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import quote
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from ray.job_submission import JobStatus
from typer.main import get_command

from jobs import cli, cluster_verbs
from multitask.capacity.estimate import Cluster, Deployment, Kind
from multitask.run.directory import Run
from multitask.spec.engines import AsyncSpec
from multitask.sweep.outcomes import choose, read_outcome
from multitask.sweep.plan import plan_trials
from multitask.sweep.run import SweepResult
from multitask.sweep.spec import load_sweep
from patches import inspect_bundle
from tests.jobs.command import multitask

FILES = Path(__file__).parents[1] / "data" / "v0_1"
PLACE = "a folder [x] $whose$ name/is as long as those of people who [/keep] order/猫"
TASK = "every_breed_of_cats_and_dogs_that_we_photographed_at_96_px"
JOB = "raysubmit_kP3vWmXh7yQzR1nB"
COUNTS = (("pets_8", 5), ("pets_12", 6))
"""Task of the finished run -> number of classes."""

Output = Callable[..., str]


@pytest.fixture(params=["pipe", "terminal"])
def output(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Output:
    """Return what a verb prints to a pipe, or to a terminal of 80 by 24."""
    for name, value in {"COLUMNS": "80", "LINES": "24", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)

    def run(*arguments: object) -> str:
        done = multitask(*arguments, terminal=request.param == "terminal")
        assert done.returncode == 0, done.stderr
        assert "…" not in done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of version 0.1 in a folder with a long name, which is the current one: the paths in them are relative."""
    folder = tmp_path / PLACE
    shutil.copytree(FILES, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.chdir(folder)
    return folder


def test_status(files: Path, output: Output) -> None:
    path = files / "finished" / "status.json"
    status = json.loads(path.read_text())
    tasks = {TASK: status["tasks"]["pets_8"], "[x]": status["tasks"]["pets_12"]}
    tasks[TASK] |= {"steps": 2_669_098, "made": 1_234_567, "lost": 12_345}
    path.write_text(json.dumps(status | {"tasks": tasks}))

    shown = output("status", files / "finished")

    for text in (TASK, "[x]", "1234567/2669098", "24/24", "12345", "lost", "0.7401", "0.0001704", "183.7"):
        assert text in shown
    for zero in ("redone", "rejected", "skipped"):
        assert zero not in shown


def test_evaluate(files: Path, output: Output) -> None:
    shown = output("evaluate", files / "finished")
    assert f"test of {files}/finished/export" in shown
    assert all(text in shown for text in ("pets_8", "pets_12", "top-1 %", "loss"))
    assert "top-5" not in shown, "among four classes, the first five are all"


def test_train_and_resume(files: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    records = {name: {"classes": list("abcdef")[:count], "tables": {}, "preprocessing": {}} for name, count in COUNTS}
    (files / "finished" / "tasks.json").write_text(json.dumps(records))
    for verb in ("train", "resume"):
        monkeypatch.setattr(f"multitask.{verb}", lambda *_, **__: Run(files / "finished"), raising=False)
        shown = output(verb, "this")
        assert all(
            text in shown for text in ("pets_8", "pets_12", f"Next: multitask export {quote(str(files / 'finished'))}")
        )
        (line,) = (line for line in shown.splitlines() if "pets_8" in line)
        assert "top-5 %" in shown, "one of the tasks has more than five classes"
        assert line.split()[1:] == ["75.00", "0.9651"], "the other one has five"


def test_export(files: Path, output: Output) -> None:
    to = files / "exported"
    shown = output("export", files / "finished", "--to", to)
    assert str(to) in shown
    for path in to.iterdir():
        assert path.name in shown
        assert f"{path.stat().st_size:,}" in shown


def test_data(files: Path, output: Output) -> None:
    tables = files / "table"
    shown = output("data", "inspect", tables)
    assert str(tables) in shown
    for name in ("train", "validation", "test"):
        size = sum(path.stat().st_size for path in (tables / name).glob("*.parquet"))
        assert name in shown
        assert f"{size:,}" in shown
    alone = output("data", "inspect", tables / "train")
    assert str(tables / "train") in alone

    assert f"{tables}/validation: 40 images" in output("data", "verify", tables)

    assert output("data", "head", tables / "train", "--images", 4, "--to", files / "one.png") == f"{files}/one.png\n"
    written = output("data", "head", tables, "--images", 1, "--to", files / "sheet.png").splitlines()
    assert written == [f"{files}/sheet_{name}.png" for name in ("test", "train", "validation")]
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in written)


def test_cascade(files: Path, output: Output) -> None:
    predictions = files / "finished" / "predictions" / "test"
    shown = output("cascade", "evaluate", files / "pets.cascade", predictions)
    assert all(name in shown for name in ("pets_8", "pets_12"))
    assert "pets_12" in output("cascade", "run", files / "pets.cascade", files / "table" / "test")


def test_bundle_verify(files: Path, output: Output) -> None:
    export = files / "finished" / "export"
    backbone = export / "backbone.safetensors"
    shown = output("bundle", "verify", export / "pets_8.patch", "--backbone", backbone)
    assert shown == f"{export}/pets_8.patch is intact and fits {backbone}\n"


def test_bundle_inspect(files: Path, output: Output) -> None:
    bundle = files / "finished" / "export" / "pets_8.patch"
    shown = output("bundle", "inspect", bundle)
    info = inspect_bundle(bundle)
    assert all(text in shown for text in (info.payload_sha256, info.method, info.backbone["content_hash"]))
    listed = output("bundle", "inspect", bundle, "--tensors")
    assert all(name in listed for name in info.tensors)


def test_predict(files: Path, output: Output) -> None:
    (table,) = (files / "table" / "test").glob("*.parquet")
    photo = files / "a photo [x] of $you$, whose name is longer than a line of a terminal with eighty columns 猫.png"
    photo.write_bytes(pq.read_table(table)["image"][0].as_py())
    shown = output("predict", files / "finished" / "export", photo, "--task", "pets_8")
    assert str(photo) in shown
    assert any(name in shown for name in inspect_bundle(files / "finished" / "export" / "pets_8.patch").classes)


def test_report(files: Path, output: Output) -> None:
    assert output("report", files / "finished") == f"{files}/finished/report.html\n"


def test_sweep(files: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = tuple(read_outcome(plan) for plan in plan_trials(load_sweep(files / "sweep" / "sweep.yaml")))
    result = SweepResult(files / "sweep", outcomes, choose(outcomes), None, None)
    monkeypatch.setattr("multitask.sweep.run_sweep", lambda *_, **__: result)

    shown = output("sweep", files / "sweep" / "sweep.yaml")

    assert f"Next: multitask train {files}/sweep/best.yaml" in shown
    for outcome in outcomes:
        assert outcome.top1 is not None
        assert f"{outcome.top1:.2f}" in shown
        assert f"{outcome.trained_parameters:,}" in shown
        assert all(str(value) in shown for value in outcome.plan.values.values())


def test_jobs_list(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    command = f"multitask train submitted/{'long_' * 12}name.yaml --overwrite"
    details = SimpleNamespace(
        submission_id=JOB,
        status=JobStatus.RUNNING,
        entrypoint="python",
        start_time=1_700_000_000_000,
        metadata={"command": command, "version": "0123456789ab-dirty"},
    )
    monkeypatch.setattr(cluster_verbs, "connect", lambda _: SimpleNamespace(list_jobs=lambda: [details]))
    shown = output("jobs", "list")
    assert all(text in shown for text in (JOB, command, "RUNNING", "0123456789ab-dirty"))


def test_plan(files: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = Kind((TASK, "[x]"), 2, 32, 1234.5, 0.1, 1.0, 102_440_640, 102_440_640)
    deployment = Deployment((kind,), AsyncSpec(), Cluster(2, 2, 10, copy_bytes_per_s=9e9))
    monkeypatch.setattr("multitask.capacity.timing.time_deployment", lambda *_, **__: deployment)
    shown = output("plan", files / "finished" / "spec.yaml", "--nodes", 2)
    assert all(text in shown for text in (f"{TASK}, [x]", "1,234,500.0", "102.4", "1,024", "512"))


def test_attach_and_remove(files: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Path, dict[str, Any]]] = []
    monkeypatch.setattr("multitask.run.live.ask", lambda run, **change: asked.append((run, change)))
    task = {"name": TASK, "data": "food", "method": "last_layer", "resolution": 8}
    Path("food.yaml").write_text(json.dumps(task))

    assert f"The run in {files} now trains the task in food.yaml" in output("attach", files, "food.yaml")
    assert f"without task {TASK}; " in output("remove", files, TASK)

    (_, attached), removed = asked
    assert attached["attach"].items() >= task.items()
    assert removed == (files, {"remove": TASK})


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the words of each verb and group, and its command."""
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


def test_every_verb_explains_itself_with_whole_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    found = list(commands(get_command(cli.app)))
    assert len(found) > 30
    for path, command in found:
        shown = multitask(*path, "-h").stdout
        assert "…" not in shown
        assert max(map(len, shown.splitlines())) <= 80
        options = [name for option in command.params if not option.hidden for name in option.opts if name[:2] == "--"]
        assert not [name for name in options if name not in shown], path
        assert all(name in shown for name in getattr(command, "commands", {}))
