"""The status file of a running job, and requests to change its tasks."""

import json
import time
from pathlib import Path

import pytest

from multitask.run import live
from multitask.run.live import REQUESTS, STATUS, LiveStatus, read_status, requests
from tests.conftest import wait_until


def test_a_driver_that_has_nothing_to_write_says_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "BEAT_S", 0.01)
    status = LiveStatus(tmp_path)
    with status.beating():
        status.write({"state": "running"}, now=True)
        first = read_status(tmp_path)["updated"]
        wait_until(lambda: read_status(tmp_path)["updated"] > first)
        status.write({"state": "stopped"}, now=True)
    last = read_status(tmp_path)
    assert last["state"] == "stopped"
    time.sleep(0.05)
    assert read_status(tmp_path)["updated"] == last["updated"]


def test_nothing_is_written_before_the_driver_has_a_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "BEAT_S", 0.01)
    with LiveStatus(tmp_path).beating():
        time.sleep(0.05)
    assert not (tmp_path / STATUS).exists()


def test_an_answer_to_one_who_has_given_up_is_no_error(tmp_path: Path) -> None:
    (tmp_path / REQUESTS).mkdir()
    path = tmp_path / REQUESTS / "one.json"
    path.write_text(json.dumps({"attach": None, "remove": "cars"}))
    (request,) = requests(tmp_path)
    path.unlink()
    request.answer("too late")
    assert requests(tmp_path) == []


def test_a_status_of_version_0_1_is_read_in_todays_words(tmp_path: Path) -> None:
    LiveStatus(tmp_path).write({"state": "stopped", "turned_away": 2, "tasks": {"pets": {"refused": 1}}}, now=True)

    status = read_status(tmp_path)

    assert (status["rejected_calls"], status["tasks"]) == (2, {"pets": {"rejected": 1}})
    assert "turned_away" not in status
