"""Of all processes that want to train in a directory, one does."""

import threading
from pathlib import Path

import pytest

from multitask.run.claim import check_new, check_stopped, claiming, empty
from multitask.run.directory import RunError
from multitask.run.live import LiveStatus
from multitask.spec.errors import SpecError

RUNNING = {"name": "job", "state": "running", "engine": "local", "tasks": {}}


def test_one_of_many_that_start_together_gets_the_directory(tmp_path: Path) -> None:
    directory, start = tmp_path / "runs" / "job", threading.Barrier(8)
    answers: list[str] = []

    def train() -> None:
        start.wait()
        try:
            with claiming(directory):
                check_new(directory, overwrite=True)
                empty(directory)
                (directory / "spec.yaml").touch()
                LiveStatus(directory).write(RUNNING, now=True)
        except SpecError as error:
            answers.append(str(error))
        else:
            answers.append("claimed")

    threads = [threading.Thread(target=train) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(answers) == 8
    assert answers.count("claimed") == 1
    assert all("is running, in process" in answer for answer in answers if answer != "claimed")
    assert {path.name for path in directory.iterdir()} == {"spec.yaml", "status.json"}
    with pytest.raises(RunError, match="is running, in process"):
        check_stopped(directory)


def test_a_claim_that_a_killed_process_left_is_no_run(tmp_path: Path) -> None:
    directory = tmp_path / "job"
    directory.mkdir()
    (directory / ".claim").touch()

    check_new(directory, overwrite=False)
    with claiming(directory):
        pass

    assert list(directory.iterdir()) == []


def test_an_earlier_run_goes_and_what_is_linked_stays(tmp_path: Path) -> None:
    directory, elsewhere = tmp_path / "job", tmp_path / "elsewhere"
    for folder in (directory / "checkpoints", elsewhere):
        folder.mkdir(parents=True)
        (folder / "file").touch()
    (directory / "spec.yaml").touch()
    (directory / "link").symlink_to(elsewhere)

    empty(directory)

    assert list(directory.iterdir()) == []
    assert (elsewhere / "file").is_file()
