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


@pytest.mark.parametrize(
    "names", [["spec.yaml"], ["spec.yaml", "photos"], ["status.json", "photos"], ["tasks.json", "photos"]]
)
def test_a_folder_of_somebodys_own_is_never_emptied(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).touch()
    for overwrite in (False, True):
        with pytest.raises(SpecError, match="holds other files and no run"):
            check_new(tmp_path, overwrite)


def test_a_run_without_its_status_is_replaced_on_request_only(tmp_path: Path) -> None:
    for name in ("tasks.json", "spec.yaml", ".status.json.0123.tmp"):  # left by a process that was killed at its start
        (tmp_path / name).touch()
        check_new(tmp_path, overwrite=False)

    (tmp_path / "best.safetensors").touch()
    with pytest.raises(SpecError, match=r"go on with it .* or replace it \(--overwrite; in Python overwrite=True\)"):
        check_new(tmp_path, overwrite=False)
    check_new(tmp_path, overwrite=True)


def test_what_is_left_of_a_run_that_is_being_removed_is_always_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tasks.json", "spec.yaml", "result.json", "best.safetensors", "log.jsonl"):
        (tmp_path / name).touch()
    LiveStatus(tmp_path).write({**RUNNING, "state": "finished"}, now=True)
    removed = []
    unlink = Path.unlink

    def remove(path: Path) -> None:
        check_new(tmp_path, overwrite=True)
        removed.append(path.name)
        unlink(path)

    monkeypatch.setattr(Path, "unlink", remove)
    empty(tmp_path)
    assert removed[-3:] == ["status.json", "spec.yaml", "tasks.json"]


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
