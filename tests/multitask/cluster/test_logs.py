"""The JSON lines that a run logs."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import multitask
from multitask.cluster.logs import LOG, log_to
from multitask.spec.schema import JobSpec

MakeSpec = Callable[..., JobSpec]
log = logging.getLogger("multitask.somewhere")


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_says_what_it_is_about(tmp_path: Path) -> None:
    with log_to(tmp_path / LOG, "job"):
        log.info("Two\nlines of %d.", 7, extra={"task": "pets", "worker": "pets/0", "step": 3})
        log.warning("Of the run.")
    log.warning("Too late.")

    first, second = lines_of(tmp_path / LOG)
    assert first.pop("time").endswith("+00:00")
    about = {"run": "job", "task": "pets", "worker": "pets/0", "step": 3}
    assert first == {"level": "info", **about, "event": "Two\nlines of 7."}
    assert {key: second[key] for key in second if key != "time"} == {
        "level": "warning",
        "run": "job",
        "event": "Of the run.",
    }


def test_numbers_are_fields_of_the_line(tmp_path: Path) -> None:
    measured = {"version": 120, "top1": 81.25, "top5": 100.0, "loss": 0.625}
    with log_to(tmp_path / LOG, "job"):
        log.info("Measured.", extra={"task": "pets", "step": 60, **measured})

    (line,) = lines_of(tmp_path / LOG)
    assert {key: line[key] for key in measured} == measured
    assert (line["event"], line["task"], line["step"]) == ("Measured.", "pets", 60)


def test_afterwards_logging_is_as_before(tmp_path: Path) -> None:
    package = logging.getLogger("multitask")
    before = package.level, list(package.handlers)
    with pytest.raises(ZeroDivisionError), log_to(tmp_path / LOG, "job"):
        raise ZeroDivisionError
    assert (package.level, package.handlers) == before


def test_a_run_writes_its_start_its_validations_and_its_end(make_spec: MakeSpec) -> None:
    run = multitask.train(make_spec({"pets": {}}, checkpoints={"every_rounds": 2}))

    lines = lines_of(run.directory / LOG)
    assert {line["run"] for line in lines} == {"job"}
    assert lines[0]["event"] == "Starts from the start, engine local."
    assert lines[-1]["event"] == "Finished."
    validated = [line for line in lines if line["event"].startswith("Validation")]
    assert [(line["task"], line["step"]) for line in validated] == [("pets", 2), ("pets", 4)]
    assert [{key: line[key] for key in ("top1", "top5", "loss")} for line in validated] == [
        {key: point[key] for key in ("top1", "top5", "loss")} for point in run.result["tasks"]["pets"]["curve"]
    ]
    assert validated[0]["event"] == f"Validation of version 2: top-1 {validated[0]['top1']:.1f} %."
    assert any(line["event"].startswith("Saved a checkpoint of version") for line in lines)


def test_a_failed_runs_last_line_says_which_worker_at_which_step(make_spec: MakeSpec) -> None:
    spec = make_spec({"pets": {}, "cars": {"std": [1e-38] * 3}})
    with pytest.raises(multitask.TrainingError):
        multitask.train(spec)

    last = lines_of(spec.run_directory / LOG)[-1]
    assert (last["level"], last["task"], last["worker"], last["step"]) == ("error", "cars", "cars/0", 0)
    assert "the loss is nan" in last["event"]
