"""What becomes of guests and their hosts, without processes."""

import asyncio
import contextlib
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError

from multitask.cluster.session import ray_session
from multitask.engines import served
from multitask.engines import workers as actors
from multitask.engines.interface import Driver, Outcome
from multitask.engines.server_actors import ServerActor
from multitask.engines.workers import ServedWorker, WorkerActor
from multitask.errors import TrainingError
from multitask.job.job import Job
from multitask.server.messages import Push
from multitask.spec.schema import JobSpec
from tests.conftest import store_of

MakeSpec = Callable[..., JobSpec]
METHODS = ("ping", "drain", "call", "snapshot")
GROWING = {"pets": {"workers": 2, "min_workers": 1}}


class OneProcess:
    """A crew whose workers are all in one process."""

    heals = True
    shards = ()
    server: Any = None

    def __init__(self, job: Job) -> None:
        self.job = job

    def together(self, _: str) -> list[str]:
        return list(self.job.workers)

    def process(self, _: str) -> str:
        return "the one"

    replace = together


@pytest.fixture
def job(make_spec: MakeSpec) -> Job:
    return Job(make_spec(GROWING, engine={"name": "async"}))


def session(job: Job) -> served.ServedRun:
    return served.ServedRun(OneProcess(job), Driver(lambda *_: None, store_of(job)), Outcome())  # type: ignore[arg-type]


def test_a_process_that_is_lost_before_each_step_of_a_guest_ends_the_run_whatever_its_host_makes(job: Job) -> None:
    mine = session(job)
    for step in range(served.RESTARTS_WITHOUT_A_STEP):
        mine._steps["pets/0"] = step
        mine._replace("pets/0", "out of memory")
    mine._steps["pets/0"] += 1
    with pytest.raises(TrainingError, match="Worker 'pets/1' of task 'pets' was lost 4 times without a step made"):
        mine._replace("pets/0", "out of memory")


def test_a_worker_that_waits_for_its_turn_does_not_hang(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, ended = session(job), []
    silent_s = 1.5 * job.spec.resources.step_timeout_s
    monkeypatch.setattr(mine, "_call", lambda _, seconds, __: ["pets/1"] if silent_s > seconds else [])
    monkeypatch.setattr(served.ray, "kill", ended.append)
    mine._end_what_hangs()
    assert not ended
    silent_s = 2.5 * job.spec.resources.step_timeout_s
    mine._end_what_hangs()
    assert ended == ["the one"]


class Calls:
    """A crew's calls, each answered when a look finds that its time has come."""

    heals = True
    shards = ()

    def __init__(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        self.job, self.store, self.server = job, store_of(job), Mock()
        self.sent: list[tuple[str, str]] = []
        self.lost: dict[tuple[str, str], Exception] = {}
        self.waits: Callable[[tuple[str, str]], bool] = lambda _: False
        monkeypatch.setattr(served.ray, "wait", lambda calls, **_: ([c for c in calls if not self.waits(c)], []))
        monkeypatch.setattr(served.ray, "get", self.get)

    def call(self, name: str, method: str, *_: object) -> tuple[str, str]:
        self.sent.append((name, method))
        return name, method

    def get(self, call: tuple[str, str]) -> None:
        if call in self.lost:
            raise self.lost.pop(call)

    def grow(self, _: object) -> dict[str, str]:
        return {}


def watched(job: Job, monkeypatch: pytest.MonkeyPatch) -> tuple[served.ServedRun, Calls, list[str]]:
    """A session with such calls, whose workers owe nothing, and what it replaces."""
    calls, replaced = Calls(job, monkeypatch), []
    mine = served.ServedRun(calls, Driver(lambda *_: None, store_of(job)), Outcome())  # type: ignore[arg-type]

    def replace(name: str, _: str) -> list[str]:
        replaced.append(name)
        return [name]

    monkeypatch.setattr(mine, "_replace", replace)
    monkeypatch.setattr(mine, "_poll", lambda: True)
    monkeypatch.setattr(mine, "_call", lambda *_: [])
    return mine, calls, replaced


def test_who_has_made_its_last_step_hands_in_what_is_asked_while_others_train(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, calls, _ = watched(job, monkeypatch)
    calls.waits = lambda call: call == ("pets/1", "train") and calls.sent.count(("pets/0", "answer_requests")) < 3
    monkeypatch.setattr(mine, "_call", lambda _: list(job.workers) if calls.waits(("pets/1", "train")) else [])

    mine._all("train")

    assert calls.sent == [("pets/0", "train"), ("pets/1", "train")] + 3 * [("pets/0", "answer_requests")]


def test_a_worker_that_is_lost_after_its_last_step_is_replaced_when_a_restored_server_tells_it_so(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, calls, replaced = watched(job, monkeypatch)
    monkeypatch.setattr(mine, "_patiently", lambda _: ["the incarnation of another server"])
    mine._trained = {"pets/0"}
    calls.lost["pets/0", "confirm_finished"] = RayActorError()

    mine._watch_server()
    mine._all("train")

    assert replaced == ["pets/0"]
    assert ("pets/0", "catch_up") in calls.sent


def test_a_worker_that_told_only_a_lost_server_of_its_last_step_tells_the_restored_one(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That it has made its step, the driver learns when the server is back already."""
    mine, calls, _ = watched(job, monkeypatch)
    monkeypatch.setattr(mine, "_patiently", lambda _: ["the incarnation of another server"])
    monkeypatch.setattr(mine, "_poll", mine._watch_server)
    calls.waits = lambda call: call == ("pets/1", "train") and mine._incarnations == []

    mine._all("train")

    assert calls.sent == [(name, method) for method in ("train", "confirm_finished") for name in job.workers]


def test_a_worker_that_was_replaced_after_its_last_step_tells_a_server_that_is_restored_later(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, calls, _ = watched(job, monkeypatch)
    polls = 0

    def poll() -> None:
        nonlocal polls
        polls += 1
        mine._watch_server()

    mine._incarnations = [0]
    monkeypatch.setattr(mine, "_patiently", lambda _: [0 if polls < 3 else 1])
    monkeypatch.setattr(mine, "_poll", poll)
    calls.lost["pets/0", "confirm_finished"] = RayActorError()
    calls.waits = lambda call: call == ("pets/1", "confirm_finished") and polls < 4

    mine._all("confirm_finished")

    assert calls.sent[2:4] == [("pets/0", "catch_up"), ("pets/0", "confirm_finished")]


def test_what_the_server_gave_out_is_told_once_though_its_answer_was_lost(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, told = ServerActor(), []
    server.begin(job)
    crew = OneProcess(job)
    crew.server = Mock(**{f"{name}.remote": partial(partial, getattr(server, name)) for name in METHODS})
    mine = served.ServedRun(crew, Driver(lambda records, *_: told.append(records), store_of(job)), Outcome())  # type: ignore[arg-type]
    mine._incarnations = server.ping()
    lost = ["drain"]

    def get(call: Any, **_: object) -> Any:
        answer = call()
        answer = asyncio.run(answer) if asyncio.iscoroutine(answer) else answer
        if call.func.__name__ in lost:
            raise ActorUnavailableError(lost.pop(), None)
        return answer

    monkeypatch.setattr(served.ray, "get", get)
    monkeypatch.setattr(served, "POLL_S", 0.0)
    gradients = {group.name: np.zeros(group.layout.pushed, np.float32) for group in job.served()}
    server._server.push(Push("pets/0", 0, 0, loss=1.0, images=8, seconds=0.1), gradients)

    mine._poll()
    assert mine._outcome.lost_at.keys() == {"server"}
    mine._poll()

    assert [[record.step for record in records] for records in told] == [[0], []]
    assert mine._outcome.lost_at == {}, "it was there all the time"


def test_a_worker_that_is_killed_for_its_nodes_memory_is_replaced(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, calls, replaced = watched(job, monkeypatch)
    calls.lost["pets/1", "train"] = OutOfMemoryError("the node's memory is full")
    mine._all("train")
    assert replaced == ["pets/1"]


def test_a_lost_worker_is_back_with_a_step_of_another_process(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last steps of the lost one the driver may hear later."""
    mine = session(job)
    process = 1
    record = {"worker": "pets/0", "step": 0}
    monkeypatch.setattr(served, "take", lambda *_: True)
    monkeypatch.setattr(mine, "_watch_server", lambda: None)
    monkeypatch.setattr(mine, "_end_what_hangs", lambda: None)
    monkeypatch.setattr(mine, "_drain", lambda: ([Mock(**record, pid=process)], {}, job.progress))
    mine._poll()
    mine._replace("pets/0", "killed")

    mine._poll()
    assert "pets/0" in mine._outcome.lost_at

    process = 2
    mine._poll()
    assert "pets/0" not in mine._outcome.lost_at
    assert len(mine._outcome.recoveries) == 1


def test_only_workers_that_were_asked_for_something_may_hang(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = session(job)
    asked: list[object] = []
    mine._calls = {"a call": "pets/1"}  # type: ignore[dict-item]
    monkeypatch.setattr(mine, "_call", lambda *arguments: asked.append(arguments) or [])
    mine._end_what_hangs()
    assert asked == [("silent_workers", 2 * job.spec.resources.step_timeout_s, {"pets/1"})]


def test_a_host_lets_a_guest_go_that_has_a_process_of_its_own(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[ServedWorker]] = []

    def make(*arguments: Any) -> ServedWorker:
        worker = ServedWorker(*arguments)
        made.append(weakref.ref(worker))
        return worker

    monkeypatch.setattr(actors, "ServedWorker", make)
    monkeypatch.setattr(actors, "log_to_stderr", lambda _: None)
    host = WorkerActor(job, "pets/0", 0, None)
    for _ in range(2):
        host.host("pets/1", 0, "about")
    assert [guest() is None for guest in made] == [False]
    host.dismiss("pets/1")
    assert made[0]() is None


def test_a_guest_that_was_let_go_makes_no_more_steps(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    guest, made = ServedWorker(job, "pets/1", 0, None), 0

    def train_steps(*_: object) -> Iterator[None]:
        nonlocal made
        while True:
            made += 1
            guest.dismissed = made == 3
            yield

    monkeypatch.setattr(actors, "train_steps", train_steps)
    monkeypatch.setattr(guest, "_worker", None, raising=False)
    guest.train()
    assert made == 3


class Reference:
    """Of an object in Ray's store."""


def test_no_thread_receives_a_reference_while_another_lets_go_of_its_last(monkeypatch: pytest.MonkeyPatch) -> None:
    let_go: list[bool] = []
    store: dict[int, Any] = {}

    def reference(to: Any) -> Reference:
        made = Reference()
        weakref.finalize(made, lambda: let_go.append(actors._TAKING.locked()))
        store[id(made)] = to
        return made

    def get(what: Any) -> Any:
        assert actors._TAKING.locked()
        return [store[id(one)] for one in what] if isinstance(what, list) else store.pop(id(what))

    monkeypatch.setattr(actors.ray, "wait", lambda _: None)
    monkeypatch.setattr(actors.ray, "get", get)
    answer = [
        reference(("the reply", [{"shared": reference("values of the first shard")}, {"shared": reference("second")}]))
    ]

    assert actors._take(answer) == ("the reply", {"shared": ["values of the first shard", "second"]})  # type: ignore[arg-type, comparison-overlap]
    assert let_go == [True] * 3


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
    monkeypatch.setattr(served.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(served.ray, "init", start)
    monkeypatch.setattr(served.ray, "shutdown", lambda: None)

    with pytest.raises(Exception, match="timed out") if failing == tries else contextlib.nullcontext(), ray_session():
        pass

    assert tried == ["local"] * tries
