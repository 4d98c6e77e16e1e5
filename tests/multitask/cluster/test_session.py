"""Connections to Ray, without Ray."""

import contextlib
from typing import Any

import pytest

from multitask.cluster import session
from multitask.cluster.session import ray_session


@pytest.mark.parametrize(("failing", "tries"), [(2, 3), (3, 3)])
def test_a_ray_of_its_own_that_does_not_start_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, failing: int, tries: int
) -> None:
    tried: list[str] = []

    def start(address: str, **_: Any) -> None:
        tried.append(address)
        if len(tried) <= failing:
            raise Exception("The current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(session.ray, "init", start)
    monkeypatch.setattr(session.ray, "shutdown", lambda: None)

    with pytest.raises(Exception, match="timed out") if failing == tries else contextlib.nullcontext(), ray_session():
        pass

    assert tried == ["local"] * tries
