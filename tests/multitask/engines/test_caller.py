"""How the driver calls an actor that Ray starts again, without processes."""

import itertools
from collections.abc import Callable

import pytest
from ray.exceptions import ActorUnavailableError, GetTimeoutError

from multitask.engines import caller
from multitask.engines.caller import PatientCaller
from multitask.engines.loss import NotBegunError
from multitask.errors import TrainingError


class Answers:
    """An actor whose calls meet one error after the other, and then an answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> None:
        self.errors, self.events = list(errors), []  # type: ignore[var-annotated]
        monkeypatch.setattr(caller.ray, "get", lambda call, **_: call())
        monkeypatch.setattr(caller, "POLL_S", 0.0)

    def send(self) -> Callable[[], str]:
        def answer() -> str:
            self.events.append("call")
            if self.errors:
                raise self.errors.pop(0)
            return "the answer"

        return answer

    def caller(self, timeout_s: float = 60.0) -> PatientCaller:
        return PatientCaller(
            "The ledger",
            begin=lambda: self.events.append("begin"),
            on_lost=lambda error: self.events.append(type(error).__name__),
            timeout_s=timeout_s,
        )


def test_an_actor_that_was_started_again_begins_before_it_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = Answers(monkeypatch, ActorUnavailableError("gone", None), NotBegunError("new"))
    assert actor.caller().ask(actor.send) == "the answer"  # type: ignore[arg-type, comparison-overlap]
    assert actor.events == ["call", "ActorUnavailableError", "call", "NotBegunError", "begin", "call"]


def test_an_actor_that_is_known_to_be_new_begins_first(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = Answers(monkeypatch)
    actor.caller().ask(actor.send, begin_first=True)  # type: ignore[arg-type]
    assert actor.events == ["begin", "call"]


def test_an_actor_that_is_lost_while_it_begins_begins_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = Answers(monkeypatch)
    tries = itertools.count()

    def begin() -> None:
        actor.events.append("begin")
        if next(tries) == 0:
            raise ActorUnavailableError("gone", None)

    PatientCaller("The ledger", begin, lambda _: None, 60.0).ask(actor.send, begin_first=True)  # type: ignore[arg-type]
    assert actor.events == ["begin", "begin", "call"]


def test_an_actor_that_stays_away_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = Answers(monkeypatch, ActorUnavailableError("gone", None))
    with pytest.raises(TrainingError, match="The ledger did not come back within -1 s"):
        actor.caller(timeout_s=-1).ask(actor.send)  # type: ignore[arg-type]


def test_an_actor_that_does_not_answer_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = Answers(monkeypatch, GetTimeoutError())
    with pytest.raises(TrainingError, match="The ledger did not answer within 60 s"):
        actor.caller().ask(actor.send)  # type: ignore[arg-type]
