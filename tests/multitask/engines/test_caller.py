"""How the driver calls an actor that the cluster starts again, without processes."""

import itertools
from collections.abc import Iterable

import pytest
from ray.exceptions import ActorUnavailableError, GetTimeoutError

from multitask.engines.caller import POLL_S, PatientCaller
from multitask.engines.loss import NotBegunError
from multitask.errors import TrainingError
from tests.multitask.engines.fakes import FakeActor, FakeCluster

GONE = ActorUnavailableError("gone", None)


class Ledger:
    """It meets one error after the other, and then answers."""

    def __init__(self, errors: Iterable[Exception] = (), begin_errors: Iterable[Exception] = ()) -> None:
        self._errors, self._begin_errors = iter(errors), iter(begin_errors)
        self.cluster = FakeCluster()
        self.events: list[str] = []

    def question(self) -> str:
        self.events.append("call")
        for error in self._errors:
            raise error
        return "the answer"

    def begin(self) -> None:
        self.events.append("begin")
        for error in self._begin_errors:
            raise error

    def ask(self, begin_first: bool = False) -> str:
        caller = PatientCaller(
            self.cluster,
            "The ledger",
            self.begin,
            on_lost=lambda error: self.events.append(type(error).__name__),
            timeout_s=60.0,
        )
        answer: str = caller.ask(FakeActor(self).question.remote, begin_first)
        return answer


def test_an_actor_that_was_started_again_begins_before_it_is_asked_again() -> None:
    ledger = Ledger([GONE, NotBegunError("new")])
    assert ledger.ask() == "the answer"
    assert ledger.events == ["call", "ActorUnavailableError", "call", "NotBegunError", "begin", "call"]
    assert ledger.cluster.clock.monotonic() == 2 * POLL_S


def test_an_actor_that_is_known_to_be_new_begins_first() -> None:
    ledger = Ledger()
    ledger.ask(begin_first=True)
    assert ledger.events == ["begin", "call"]


def test_an_actor_that_is_lost_while_it_begins_begins_once_more() -> None:
    ledger = Ledger(begin_errors=[GONE])
    ledger.ask(begin_first=True)
    assert ledger.events == ["begin", "ActorUnavailableError", "begin", "call"]


def test_an_actor_that_stays_away_ends_the_run() -> None:
    ledger = Ledger(itertools.repeat(GONE))
    with pytest.raises(TrainingError, match="The ledger did not come back within 60 s"):
        ledger.ask()
    assert 60 < ledger.cluster.clock.monotonic() <= 60 + POLL_S


def test_an_actor_that_does_not_answer_ends_the_run() -> None:
    with pytest.raises(TrainingError, match="The ledger did not answer within 60 s"):
        Ledger([GetTimeoutError()]).ask()
