"""How a run with a parameter server goes on after losses, and what becomes of guests and hosts, without processes."""

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
from multitask.engines import caller, remote, served, workers
from multitask.engines.crew import Crew
from multitask.engines.decisions import RESTARTS_WITHOUT_A_STEP, Recovery
from multitask.engines.interface import Driver, Outcome
from multitask.engines.loss import RestartAllError
from multitask.engines.server_actors import ServerActor
from multitask.engines.server_client import ServerClient
from multitask.engines.workers import ServedWorker, WorkerActor
from multitask.errors import TrainingError
from multitask.job.job import Job
from multitask.server.messages import Push
from multitask.spec.schema import JobSpec
from tests.conftest import store_of

MakeSpec = Callable[..., JobSpec]
METHODS = ("ping", "drain", "call", "snapshot")
GROWING = {"pets": {"workers": 2, "min_workers": 1}}


class FakeServer:
    """A server for the driver, whose answers a test sets."""

    def __init__(self, job: Job, outcome: Outcome) -> None:
        self.progress, self.outcome = job.progress, outcome
        self.pausing = False
        self.records: list[Any] = []
        self.restored: Callable[[], bool] = lambda: False
        """Whether the server was started again since the driver last looked."""
        self.answers: dict[str, Callable[..., Any]] = {
            "silent_workers": lambda *_: [],
            "workers_with_requests": list,
        }

    def watch(self) -> bool:
        return self.restored()

    def drain(self) -> Any:
        return self.records, {}, self.progress

    def snapshot(self, _: int) -> None: ...

    def call(self, method: str, *arguments: Any) -> Any:
        return self.answers[method](*arguments)

    def note_loss(self, what: str, _: str) -> None:
        self.outcome.note_loss(what)


class FakeCrew:
    """A crew whose calls are answered at once, except those that `waits` holds back."""

    recovery = Recovery.REPLACE
    shards = ()

    def __init__(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        self.job, self.store = job, store_of(job)
        self.server: Any = None
        self.shares_process = True
        """Whether all workers are in one process, or each in a process of its own."""
        self.sent: list[tuple[str, str]] = []
        self.lost: dict[tuple[str, str], Exception] = {}
        """Call -> the error that it meets once."""
        self.waits: Callable[[tuple[str, str]], bool] = lambda _: False
        self.replaced: list[str] = []
        self.killed: list[str] = []
        self.looks = 0
        monkeypatch.setattr(served.ray, "wait", self.wait)
        monkeypatch.setattr(served.ray, "get", self.get)

    def call(self, name: str, method: str, *_: object) -> tuple[str, str]:
        self.sent.append((name, method))
        return name, method

    def wait(self, calls: list[tuple[str, str]], **_: object) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        self.looks += 1
        assert self.looks < 100, f"the run waits for {calls} for ever"
        return [call for call in calls if not self.waits(call)], []

    def get(self, call: tuple[str, str]) -> None:
        if call in self.lost:
            raise self.lost.pop(call)

    def process(self, name: str) -> str:
        return "the one" if self.shares_process else name

    def sharing_process(self, name: str) -> list[str]:
        return list(self.job.workers) if self.shares_process else [name]

    def kill_process(self, name: str) -> None:
        self.killed.append(name)

    def replace(self, name: str) -> list[str]:
        self.replaced.append(name)
        return self.sharing_process(name)

    def grow(self, _: object) -> dict[str, str]:
        return {}


class Session:
    """A run with a fake server and a fake crew."""

    def __init__(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        self.outcome = Outcome()
        self.crew, self.server = FakeCrew(job, monkeypatch), FakeServer(job, self.outcome)
        driver = Driver(lambda *_: None, self.crew.store)
        self.run = served.ServedRun(self.crew, self.server, driver, self.outcome)  # type: ignore[arg-type]


@pytest.fixture
def job(make_spec: MakeSpec) -> Job:
    return Job(make_spec(GROWING, engine={"name": "async"}))


@pytest.fixture
def session(job: Job, monkeypatch: pytest.MonkeyPatch) -> Session:
    """Both workers share a process."""
    return Session(job, monkeypatch)


@pytest.fixture
def apart(session: Session) -> Session:
    """Each worker is in a process of its own."""
    session.crew.shares_process = False
    return session


def test_a_process_that_is_lost_before_each_step_of_a_guest_ends_the_run_whatever_its_host_makes(
    session: Session,
) -> None:
    def make_steps(step: int) -> None:
        session.server.progress.workers["pets/0"].step = step
        session.run.poll()

    for step in range(RESTARTS_WITHOUT_A_STEP):
        make_steps(step)
        session.run.replace("pets/0", "out of memory")
    make_steps(RESTARTS_WITHOUT_A_STEP)
    with pytest.raises(TrainingError, match="Worker 'pets/1' of task 'pets' was lost 4 times without a step made"):
        session.run.replace("pets/0", "out of memory")


def test_a_worker_that_waits_for_its_turn_does_not_hang(job: Job, session: Session) -> None:
    silent_s = 1.5 * job.spec.resources.step_timeout_s
    session.server.answers["silent_workers"] = lambda seconds, _: ["pets/1"] if silent_s > seconds else []
    session.run.poll()
    assert not session.crew.killed
    silent_s = 2.5 * job.spec.resources.step_timeout_s
    session.run.poll()
    assert session.crew.killed == ["pets/1"]


def test_a_worker_that_has_made_its_last_step_answers_requests_while_others_train(job: Job, apart: Session) -> None:
    crew = apart.crew
    crew.waits = lambda call: call == ("pets/1", "train") and crew.sent.count(("pets/0", "answer_requests")) < 3
    apart.server.answers["workers_with_requests"] = lambda: list(job.workers) if crew.waits(("pets/1", "train")) else []

    apart.run.run_phase("train")

    assert crew.sent == [("pets/0", "train"), ("pets/1", "train")] + 3 * [("pets/0", "answer_requests")]


def test_a_worker_that_is_lost_after_its_last_step_is_replaced_when_a_restored_server_tells_it_so(
    apart: Session,
) -> None:
    crew = apart.crew
    looks = iter([True])
    apart.server.restored = lambda: next(looks, False)
    crew.waits = lambda call: call == ("pets/1", "train") and not crew.replaced
    crew.lost["pets/0", "confirm_finished"] = RayActorError()

    apart.run.run_phase("train")

    assert crew.replaced == ["pets/0"]
    assert ("pets/0", "run_phases") in crew.sent


def test_a_worker_that_told_only_a_lost_server_of_its_last_step_tells_the_restored_one(
    job: Job, apart: Session
) -> None:
    """The driver learns that the worker has made its step when the server is back already."""
    crew = apart.crew
    looks = 0

    def restored() -> bool:
        nonlocal looks
        looks += 1
        return looks == 1

    apart.server.restored = restored
    crew.waits = lambda call: call == ("pets/1", "train") and looks == 0

    apart.run.run_phase("train")

    assert crew.sent == [(name, method) for method in ("train", "confirm_finished") for name in job.workers]


def test_a_worker_that_was_replaced_after_its_last_step_tells_a_server_that_is_restored_later(apart: Session) -> None:
    crew = apart.crew
    looks = 0

    def restored() -> bool:
        nonlocal looks
        looks += 1
        return looks == 3

    apart.server.restored = restored
    crew.lost["pets/0", "confirm_finished"] = RayActorError()
    crew.waits = lambda call: call == ("pets/1", "confirm_finished") and looks < 4

    apart.run.run_phase("confirm_finished")

    assert crew.sent[2:4] == [("pets/0", "run_phases"), ("pets/0", "confirm_finished")]


def test_what_the_server_gave_out_is_told_once_though_its_answer_was_lost(
    job: Job, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, told, outcome, crew = ServerActor(), [], Outcome(), session.crew
    crew.server = Mock(**{f"{name}.remote": partial(partial, getattr(server, name)) for name in METHODS})
    crew.begin = lambda: partial(server.begin, job)  # type: ignore[attr-defined]
    client = ServerClient(crew, outcome)  # type: ignore[arg-type]
    driver = Driver(lambda records, *_: told.append(records), store_of(job))
    run = served.ServedRun(crew, client, driver, outcome)  # type: ignore[arg-type]
    lost = ["drain"]

    def get(call: Any, **_: object) -> Any:
        answer = call()
        answer = asyncio.run(answer) if asyncio.iscoroutine(answer) else answer
        if call.func.__name__ in lost:
            raise ActorUnavailableError(lost.pop(), None)
        return answer

    monkeypatch.setattr(served.ray, "get", get)
    monkeypatch.setattr(caller, "POLL_S", 0.0)
    client.begin()
    gradients = {group.name: np.zeros(group.layout.pushed, np.float32) for group in job.served()}
    asyncio.run(server.call("push", Push("pets/0", 0, 0, loss=1.0, images=8, seconds=0.1), gradients))

    run.poll()
    assert outcome.lost_at.keys() == {"server"}
    run.poll()

    assert [[record.step for record in records] for records in told] == [[0], []]
    assert outcome.lost_at == {}, "it was there all the time"


def test_a_worker_that_is_killed_for_its_nodes_memory_is_replaced(apart: Session) -> None:
    apart.crew.lost["pets/1", "train"] = OutOfMemoryError("the node's memory is full")
    apart.run.run_phase("train")
    assert apart.crew.replaced == ["pets/1"]


def test_a_lost_worker_is_back_with_a_step_of_another_process(session: Session) -> None:
    """The driver may hear of the last steps of the lost process later."""
    record = {"worker": "pets/0", "step": 0}
    session.server.records = [Mock(**record, pid=1)]
    session.run.poll()
    session.run.replace("pets/0", "killed")

    session.run.poll()
    assert "pets/0" in session.outcome.lost_at

    session.server.records = [Mock(**record, pid=2)]
    session.run.poll()
    assert "pets/0" not in session.outcome.lost_at
    assert len(session.outcome.recoveries) == 1


def test_only_workers_that_were_asked_for_something_may_hang(job: Job, session: Session) -> None:
    asked: list[object] = []
    session.server.answers["silent_workers"] = lambda *arguments: asked.append(arguments) or []
    session.crew.waits = lambda call: call == ("pets/1", "train") and not asked
    session.run.run_phase("train")
    limit_s = 2 * job.spec.resources.step_timeout_s
    assert asked == [(limit_s, {"pets/1"}), (limit_s, set())]


def test_a_host_lets_a_guest_go_that_has_a_process_of_its_own(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[ServedWorker]] = []

    def make(*arguments: Any) -> ServedWorker:
        worker = ServedWorker(*arguments)
        made.append(weakref.ref(worker))
        return worker

    monkeypatch.setattr(workers, "ServedWorker", make)
    monkeypatch.setattr(workers, "log_to_stderr", lambda _: None)
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

    monkeypatch.setattr(workers, "train_steps", train_steps)
    monkeypatch.setattr(guest, "worker", None, raising=False)
    guest.train()
    assert made == 3


class Reference:
    """A reference to an object in Ray's store."""


def test_no_thread_receives_a_reference_while_another_lets_go_of_its_last(monkeypatch: pytest.MonkeyPatch) -> None:
    let_go: list[bool] = []
    store: dict[int, Any] = {}

    def reference(to: Any) -> Reference:
        made = Reference()
        weakref.finalize(made, lambda: let_go.append(remote.FETCHING.locked()))
        store[id(made)] = to
        return made

    def get(what: Any) -> Any:
        assert remote.FETCHING.locked()
        return [store[id(one)] for one in what] if isinstance(what, list) else store.pop(id(what))

    monkeypatch.setattr(remote.ray, "wait", lambda _: None)
    monkeypatch.setattr(remote.ray, "get", get)
    answer = [
        reference(("the reply", [{"shared": reference("values of the first shard")}, {"shared": reference("second")}]))
    ]

    assert remote.fetch_values(answer) == ("the reply", {"shared": ["values of the first shard", "second"]})  # type: ignore[arg-type, comparison-overlap]
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


def test_the_process_of_a_guest_that_hangs_is_its_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    crew, killed = object.__new__(Crew), []
    crew.workers, crew.hosts = {"pets/0": "the one"}, {"pets/1": "pets/0"}
    monkeypatch.setattr(served.ray, "kill", killed.append)

    crew.kill_process("pets/1")

    assert killed == ["the one"]


@pytest.mark.parametrize(("made", "starts"), [([0] * 4, 4), ([0, 0, 5, 0, 0, 0], 6)])
def test_a_run_whose_processes_are_lost_together_without_a_step_in_between_ends(
    job: Job, monkeypatch: pytest.MonkeyPatch, made: list[int], starts: int
) -> None:
    begun, left = [], list(made)

    @contextlib.contextmanager
    def crews(job: Job, _: object) -> Iterator[FakeCrew]:
        begun.append(job)
        yield FakeCrew(job, monkeypatch)

    def lose(attempt: served.ServedRun) -> Outcome:
        attempt.records = left.pop(0)
        raise RestartAllError("A worker was lost.")

    monkeypatch.setattr(served, "actors", crews)
    monkeypatch.setattr(served, "ray_session", contextlib.nullcontext)
    monkeypatch.setattr(served, "check_places", lambda _: None)
    monkeypatch.setattr(served.ServedRun, "run", lose)

    with pytest.raises(TrainingError, match=r"A worker was lost\. It was lost 4 times without a step made"):
        served.run(job, Driver(lambda *_: None, store_of(job)))

    assert len(begun) == starts
