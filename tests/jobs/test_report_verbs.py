"""`multitask report`, and the report after `multitask train`."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from multitask.run import report
from multitask.run.live import read_status
from multitask.spec.reading import dump_spec
from multitask.spec.schema import JobSpec
from tests.jobs.command import multitask


@pytest.mark.parametrize("failure", [OSError("the disk is full"), KeyboardInterrupt()])
def test_a_training_ends_with_its_report_and_stays_finished_without(
    failure: BaseException, make_spec: Callable[..., JobSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise failure

    (tmp_path / "job.yaml").write_text(yaml.safe_dump(dump_spec(make_spec(tasks={"pets": {}}, steps=2))))
    run = tmp_path / "runs" / "job"
    with monkeypatch.context() as patch:
        patch.setattr(report, "write_training_report", fail)
        trained = multitask("train", tmp_path / "job.yaml")
    assert trained.returncode == 0
    assert f"`multitask report {run}` writes it" in trained.stderr
    assert read_status(run)["state"] == "finished"
    assert not (run / "report.html").exists()

    again = multitask("report", run)

    assert (again.returncode, again.stdout) == (0, f"{run / 'report.html'}\n")
    assert "<h2>pets</h2>" in (run / "report.html").read_text()
    assert f"report: {run / 'report.html'}" in multitask("train", tmp_path / "job.yaml", "--overwrite").stderr


def test_a_folder_without_a_run_has_no_report(tmp_path: Path) -> None:
    refused = multitask("report", tmp_path)
    assert refused.returncode == 1
    assert "holds no finished run" in refused.stderr
