"""What engine `served` decides when workers are lost or get a place, on a crew that is made up."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from multitask.engines import actors, served
from multitask.engines.actors import ServedWorker, WorkerActor
from multitask.engines.interface import Driver, Outcome
from multitask.job import Job
from multitask.spec import JobSpec
from multitask.worker import TrainingError
from tests.conftest import store_of

MakeSpec = Callable[..., JobSpec]
GROWING = {"pets": {"workers": 2, "min_workers": 1}}


class FakeCrew:
    """One process for all workers, and a place for every guest that asks."""

    heals = True

    def __init__(self, job: Job) -> None:
        self.job = job
        self.coming: set[str] = set()
        self.told: list[tuple[str, str]] = []

    def together(self, _: str) -> list[str]:
        return list(self.job.workers)

    replace = together

    def ask_for_places(self, names: Iterable[str]) -> None:
        self.coming |= {name for name in names if name == "pets/1"}

    def withdraw(self) -> None:
        self.coming = set()

    def arrived(self) -> dict[str, str]:
        return dict.fromkeys(self.coming, "a node")

    def call(self, name: str, method: str) -> None:
        self.told.append((name, method))


@pytest.fixture
def job(make_spec: MakeSpec) -> Job:
    return Job(make_spec(GROWING, engine={"name": "async"}))


def session(crew: FakeCrew) -> served._Session:
    driver = Driver(lambda *_: None, store_of(crew.job))
    return served._Session(crew, driver, Outcome())  # type: ignore[arg-type]


def test_a_guest_whose_place_was_taken_back_while_it_left_is_given_another_once_it_is_back(job: Job) -> None:
    """It would move into a process that does not run yet, and perhaps never will."""
    crew, training = FakeCrew(job), ["pets/0", "pets/1"]
    mine = session(crew)
    mine._move_guests(training)
    assert crew.told == [("pets/1", "leave")]
    mine._outcome.lose("pets/0")
    mine._move_guests(training)
    assert not crew.coming
    mine._outcome.back("pets/0")

    mine._move_guests(training)
    assert not crew.coming

    mine._leaving.clear()
    mine._move_guests(training)
    assert crew.coming == {"pets/1"}


def test_a_process_that_is_lost_before_each_step_of_a_guest_ends_the_run_whatever_its_host_makes(job: Job) -> None:
    mine = session(FakeCrew(job))
    for step in range(served.RESTARTS_WITHOUT_A_STEP):
        mine._steps["pets/0"] = step
        mine._replace("pets/0", "out of memory")
    mine._steps["pets/0"] += 1
    with pytest.raises(TrainingError, match="Worker 'pets/1' of task 'pets' was lost 4 times without a step made"):
        mine._replace("pets/0", "out of memory")


def test_a_host_lets_a_guest_go_that_has_left(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[ServedWorker]] = []

    def make(*arguments: Any) -> ServedWorker:
        worker = ServedWorker(*arguments)
        made.append(weakref.ref(worker))
        return worker

    monkeypatch.setattr(actors, "ServedWorker", make)
    monkeypatch.setattr(actors, "log_to_stderr", lambda _: None)
    host = WorkerActor(job, "pets/0", 0, None)
    for incarnation in (0, 1):  # it left, and was lost where it went
        host.host("pets/1", incarnation, "about")
    assert [guest() is None for guest in made] == [True, False]

    host.dismiss("pets/1", 0)
    assert made[1]() is not None
    host.dismiss("pets/1", 1)
    assert made[1]() is None
