"""`multitask report`, and the report after `multitask train`."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from jobs.report_verbs import report_after_training
from multitask.run import report
from multitask.spec.reading import dump_spec
from multitask.spec.schema import JobSpec
from tests.jobs.command import multitask


def test_a_training_ends_with_its_report_which_can_be_written_again(
    make_spec: Callable[..., JobSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(dump_spec(make_spec(tasks={"pets": {}}, steps=2))))
    page = tmp_path / "runs" / "job" / "report.html"
    monkeypatch.setattr(report, "write_training_report", lambda run, path: path.write_text(run.name))

    trained = multitask("train", tmp_path / "job.yaml", "--json")

    assert trained.returncode == 0, trained.stderr
    assert f"report: {page}" in trained.stderr
    assert page.read_text() == "job"
    page.unlink()
    again = multitask("report", page.parent)
    assert (again.returncode, again.stdout) == (0, f"{page}\n")
    assert page.exists()


@pytest.mark.parametrize("failure", [OSError("the disk is full"), KeyboardInterrupt()])
def test_a_report_that_fails_fails_nothing_else(
    failure: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(report, "write_report", fail)

    report_after_training(Path("runs/my job"))

    printed = capsys.readouterr()
    assert printed.out == ""
    assert "The training has finished, but its report is not written: " in printed.err
    assert (str(failure) or "it was interrupted") in printed.err
    assert "`multitask report 'runs/my job'` writes it." in printed.err


def test_a_folder_without_a_run_has_no_report(tmp_path: Path) -> None:
    refused = multitask("report", tmp_path)
    assert refused.returncode == 1
    assert "holds no finished run" in refused.stderr
