"""The checks that a job makes on its cluster before it runs its verb."""

import contextlib
import json
import os
import sys
from pathlib import Path

import pytest

from jobs import submitted
from multitask.startup import SUBMITTED


@pytest.fixture(autouse=True)
def not_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take back what a job says of itself in the environment."""
    monkeypatch.setenv(SUBMITTED, "")
    monkeypatch.delenv(SUBMITTED)


def test_tokens_reach_the_process_and_are_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "before")
    submitted.take_tokens(tmp_path / "tokens.json")
    assert os.environ["A_TOKEN"] == "before"
    (tmp_path / "tokens.json").write_text(json.dumps({"A_TOKEN": "secret"}))
    submitted.take_tokens(tmp_path / "tokens.json")
    assert os.environ["A_TOKEN"] == "secret"


def test_a_storage_that_some_nodes_do_not_see_ends_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Path] = []

    def nodes_without(file: Path) -> list[str]:
        assert file.exists()
        seen.append(file)
        return ["10.0.0.2", "10.0.0.3"]

    monkeypatch.setattr(submitted, "ray_session", contextlib.nullcontext)
    monkeypatch.setattr(submitted, "nodes_without", nodes_without)
    monkeypatch.setattr(sys, "argv", ["submitted", str(tmp_path / "storage"), "train", "spec.yaml"])
    monkeypatch.setattr(submitted.cli, "main", lambda: pytest.fail("the verb must not start"))

    with pytest.raises(SystemExit) as ended:
        submitted.main()

    assert str(ended.value).startswith("error: --storage")
    assert "missing on 10.0.0.2, 10.0.0.3" in str(ended.value)
    assert [path.parent for path in seen] == [tmp_path / "storage"]
    assert not list((tmp_path / "storage").iterdir())
    assert capsys.readouterr().out == ""


def test_a_storage_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match=r"--storage .*file/storage cannot be written here.*Mount it on every node"):
        submitted.check_storage(tmp_path / "file" / "storage")


def test_the_verb_gets_its_own_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitted, "ray_session", contextlib.nullcontext)
    monkeypatch.setattr(submitted, "nodes_without", lambda _: [])
    monkeypatch.setattr(sys, "argv", ["submitted", str(tmp_path), "export", "/shared/job", "--version", "last"])
    given: list[str] = []
    monkeypatch.setattr(submitted.cli, "main", lambda: given.extend(sys.argv))
    submitted.main()
    assert given == ["multitask", "export", "/shared/job", "--version", "last"]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_nodes_look_for_the_file(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("")
    assert submitted.nodes_without(tmp_path / "there") == []
    assert len(submitted.nodes_without(tmp_path / "not_there")) == 1
