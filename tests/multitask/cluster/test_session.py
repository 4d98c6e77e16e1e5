"""Connections to Ray, without Ray."""

import contextlib
import signal
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


def test_ray_does_not_take_the_handler_of_sigterm_away_from_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own handler ends its processes at once, before the run has written a checkpoint."""

    def start(**_: Any) -> None:
        signal.signal(signal.SIGTERM, lambda *_: pytest.fail("Ray's handler"))

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(session.ray, "init", start)
    monkeypatch.setattr(session.ray, "shutdown", lambda: None)
    arrived: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: arrived.append(number))
    try:
        with ray_session():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert arrived == [signal.SIGTERM]
