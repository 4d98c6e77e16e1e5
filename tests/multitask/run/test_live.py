"""The status file of a running job, and requests to change its tasks."""

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from multitask.run import live
from multitask.run.files import RunError
from multitask.run.live import REQUEST_BYTES, REQUESTS, STATUS, LiveStatus, Requests, ask, read_status
from tests.conftest import wait_until

CONTENT: dict[str, Any] = {
    "name": "job",
    "state": "running",
    "error": None,
    "engine": "local",
    "mlflow_run_id": "f00d",
    "rejected_calls": 0,
    "tasks": {"pets": {"steps": 8, "curve": [{"step": 2, "version": 4, "top1": 50.0}]}},
}


def test_a_driver_that_has_nothing_to_write_says_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "BEAT_S", 0.01)
    status = LiveStatus(tmp_path)
    with status.beating():
        status.write(CONTENT, now=True)
        first = read_status(tmp_path)["updated"]
        wait_until(lambda: read_status(tmp_path)["updated"] > first)
        status.write({**CONTENT, "state": "stopped"}, now=True)
    last = read_status(tmp_path)
    assert last["state"] == "stopped"
    time.sleep(0.05)
    assert read_status(tmp_path)["updated"] == last["updated"]


def test_nothing_is_written_before_the_driver_has_a_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "BEAT_S", 0.01)
    with LiveStatus(tmp_path).beating():
        time.sleep(0.05)
    assert not (tmp_path / STATUS).exists()


def test_a_status_that_cannot_be_written_is_said_once_and_written_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "run"
    status = LiveStatus(directory)
    directory.write_bytes(b"")
    with pytest.raises(FileExistsError):
        status.write(CONTENT, now=True)
    directory.unlink()
    status.write(CONTENT, now=True)

    shutil.rmtree(directory)
    directory.write_bytes(b"")
    for _ in range(3):
        status.write(CONTENT, now=True)
    assert ["cannot be written" in record.getMessage() for record in caplog.records] == [True]
    directory.unlink()
    status.write(CONTENT, now=True)
    assert read_status(directory)["state"] == "running"


def test_a_status_of_version_0_1_is_read_in_todays_words(tmp_path: Path) -> None:
    old = {key: value for key, value in CONTENT.items() if key != "rejected_calls"}
    LiveStatus(tmp_path).write({**old, "turned_away": 2, "tasks": {"pets": {"steps": 8, "refused": 1}}}, now=True)

    status = read_status(tmp_path)

    assert (status["rejected_calls"], status["tasks"]["pets"]["rejected"]) == (2, 1)
    assert "turned_away" not in status
    assert "refused" not in status["tasks"]["pets"]


DAMAGED: dict[str, Any] = {
    "empty": b"",
    "cut": b'{"name": "jo',
    "not UTF-8": b'{"name": "\xff"}',
    "a list": b"[]",
    "nested too deep": b"[" * 100_000,
    "half of a surrogate pair": {"error": "\ud800"},
    "another state": {"state": "runnimg"},
    "no engine": {"engine": None},
    "no process": {"process": 0},
    "a process that no system has": {"process": 2**40},
    "no time": {"updated": "yesterday"},
    "not a number": {"updated": float("nan")},
    "tasks that are a list": {"tasks": ["pets"]},
    "a task that is a number": {"tasks": {"pets": 3}},
    "a task with a strange key": {"tasks": {"pets": {"steps": 8, "x" * 10_000: 1}}},
    "steps below zero": {"tasks": {"pets": {"steps": -8}}},
    "a point without its round": {"tasks": {"pets": {"steps": 8, "curve": [{"top1": 50.0}]}}},
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_status_is_named_with_what_to_do(tmp_path: Path, damage: bytes | dict[str, Any]) -> None:
    status = LiveStatus(tmp_path)
    status.write(CONTENT, now=True)
    path = tmp_path / STATUS
    content = json.loads(path.read_text())
    path.write_bytes(damage if isinstance(damage, bytes) else json.dumps(content | damage).encode())

    with pytest.raises(RunError) as error:
        read_status(tmp_path)

    message = str(error.value)
    assert message.startswith(f"'{path}' is damaged: ")
    assert "multitask resume" in message
    assert len(message.encode()) < 1000


# Requests.


def request_folder(run: Path) -> Path:
    folder = run / REQUESTS
    folder.mkdir(parents=True)
    return folder


def answers(run: Path) -> dict[str, str | None]:
    return {path.stem: json.loads(path.read_text())["error"] for path in (run / REQUESTS).glob("*.answer")}


def test_an_answer_to_one_who_has_given_up_is_no_error(tmp_path: Path) -> None:
    path = request_folder(tmp_path) / "one.json"
    path.write_text(json.dumps({"attach": None, "remove": "cars"}))
    requests = Requests(tmp_path)
    (request,) = requests.waiting()
    path.unlink()
    requests.answer(request, "too late")
    assert requests.waiting() == []


def test_the_oldest_request_comes_first(tmp_path: Path) -> None:
    folder = request_folder(tmp_path)
    for number, name in enumerate(("b", "a", "c")):
        (folder / f"{name}.json").write_text(json.dumps({"remove": name}))
        os.utime(folder / f"{name}.json", (number, number))
    assert [request.remove for request in Requests(tmp_path).waiting()] == ["b", "a", "c"]


WRONG: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a link to an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a request": lambda path: path.symlink_to(_request_beside(path)),
    "a link that leads nowhere": lambda path: path.symlink_to("nowhere"),
    "a folder": lambda path: (path / "with").mkdir(parents=True),
    "a socket": lambda path: _bound(path),
    "too large": lambda path: path.write_bytes(b" " * (REQUEST_BYTES + 1)),
    "nested too deep": lambda path: path.write_bytes(b"[" * 100_000),
    "a key twice": lambda path: path.write_text('{"remove": "cars", "remove": "pets"}'),
    "no JSON": lambda path: path.write_bytes(b"remove cars"),
    "not UTF-8": lambda path: path.write_bytes(b'{"remove": "\xff"}'),
    "a number": lambda path: path.write_text("3"),
    "an unknown key": lambda path: path.write_text('{"delete": "cars"}'),
    "nothing asked": lambda path: path.write_text("{}"),
    "two things asked": lambda path: path.write_text('{"attach": {}, "remove": "cars"}'),
    "a task that is a list": lambda path: path.write_text('{"attach": []}'),
    "a name that is a number": lambda path: path.write_text('{"remove": 3}'),
}


def _bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


def _request_beside(path: Path) -> Path:
    beside = path.with_suffix(".txt")
    beside.write_text('{"remove": "cars"}')
    return beside


@pytest.mark.parametrize("make", WRONG.values(), ids=WRONG.keys())
def test_what_is_no_request_is_answered_and_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object]
) -> None:
    folder = request_folder(tmp_path)
    monkeypatch.chdir(folder)  # the path of a socket may have 107 bytes
    make(Path("wrong.json"))
    (folder / "right.json").write_text('{"remove": "cars"}')
    requests = Requests(tmp_path)

    assert [request.remove for request in requests.waiting()] == ["cars"]

    (error,) = answers(tmp_path).values()
    assert error is not None
    assert error.startswith("'wrong.json' is no request: ")
    assert len(error) < 300
    assert (folder / "wrong.rejected").is_symlink() or (folder / "wrong.rejected").exists()
    assert [request.remove for request in requests.waiting()] == ["cars"]


def test_a_request_that_can_neither_be_answered_nor_removed_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = request_folder(tmp_path)
    (folder / "right.json").write_text('{"remove": "cars"}')
    (folder / "wrong.json").write_text("[]")
    requests = Requests(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("not yours")

    for name in ("unlink", "rename"):
        monkeypatch.setattr(Path, name, refuse)
    monkeypatch.setattr("multitask.run.live.write_json", refuse)
    (request,) = requests.waiting()
    requests.answer(request)

    assert requests.waiting() == []
    assert sum("is not read again" in record.getMessage() for record in caplog.records) == 2


def test_requests_elsewhere_are_none_of_the_runs(tmp_path: Path) -> None:
    elsewhere = request_folder(tmp_path / "elsewhere")
    (elsewhere / "one.json").write_text("[]")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / REQUESTS).symlink_to(elsewhere)
    assert Requests(tmp_path / "run").waiting() == []
    assert os.listdir(elsewhere) == ["one.json"]


def test_one_who_asks_where_requests_cannot_be_written_is_told(tmp_path: Path) -> None:
    LiveStatus(tmp_path).write(CONTENT, now=True)
    (tmp_path / REQUESTS).write_bytes(b"")
    with pytest.raises(RunError, match=r"goes on unchanged, because the request cannot be written.*/requests'"):
        ask(tmp_path, remove="pets")
