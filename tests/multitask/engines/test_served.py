"""How a run with a parameter server goes on after losses, and what becomes of guests and hosts, without processes."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError

from multitask.engines import served, workers
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
from tests.multitask.engines.fakes import FakeActor, FakeCluster

MakeSpec = Callable[..., JobSpec]
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


class Calls(FakeCluster):
    """A cluster on which a call of a worker is a pair of the worker and the method. It is answered at once, unless
    `waits` holds it back."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Callable[[tuple[str, str]], bool] = lambda _: False
        self.lost: dict[tuple[str, str], Exception] = {}
        """Call -> the error that it meets once."""
        self._looks = 0

    def wait(self, refs: Sequence[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        self._looks += 1
        assert self._looks < 100, f"the run waits for {refs} for ever"
        return [call for call in refs if not self.waits(call)], []

    def get(self, ref: Any, timeout_s: float | None = None) -> Any:  # noqa: ARG002
        if ref in self.lost:
            raise self.lost.pop(ref)


class FakeCrew:
    """A crew whose processes are on no cluster."""

    recovery = Recovery.REPLACE
    shards = ()

    def __init__(self, cluster: FakeCluster, job: Job) -> None:
        self.cluster, self.job, self.store = cluster, job, store_of(job)
        self.server: Any = None
        self.shares_process = True
        """Whether all workers are in one process, or each in a process of its own."""
        self.sent: list[tuple[str, str]] = []
        self.replaced: list[str] = []
        self.killed: list[str] = []

    def call(self, name: str, method: str, *_: object) -> tuple[str, str]:
        self.sent.append((name, method))
        return name, method

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

    def __init__(self, job: Job) -> None:
        self.cluster = Calls()
        self.outcome = Outcome(self.cluster.clock)
        self.crew, self.server = FakeCrew(self.cluster, job), FakeServer(job, self.outcome)
        driver = Driver(lambda *_: None, self.crew.store, cluster=self.cluster)
        self.run = served.ServedRun(self.crew, self.server, driver, self.outcome)  # type: ignore[arg-type]


@pytest.fixture
def job(make_spec: MakeSpec) -> Job:
    return Job(make_spec(GROWING, engine={"name": "async"}))


@pytest.fixture
def session(job: Job) -> Session:
    """Both workers share a process."""
    return Session(job)


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
    apart.cluster.waits = lambda call: (
        call == ("pets/1", "train") and crew.sent.count(("pets/0", "answer_requests")) < 3
    )
    apart.server.answers["workers_with_requests"] = lambda: (
        list(job.workers) if apart.cluster.waits(("pets/1", "train")) else []
    )

    apart.run.run_phase("train")

    assert crew.sent == [("pets/0", "train"), ("pets/1", "train")] + 3 * [("pets/0", "answer_requests")]


def test_a_worker_that_is_lost_after_its_last_step_is_replaced_when_a_restored_server_tells_it_so(
    apart: Session,
) -> None:
    crew = apart.crew
    looks = iter([True])
    apart.server.restored = lambda: next(looks, False)
    apart.cluster.waits = lambda call: call == ("pets/1", "train") and not crew.replaced
    apart.cluster.lost["pets/0", "confirm_finished"] = RayActorError()

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
    apart.cluster.waits = lambda call: call == ("pets/1", "train") and looks == 0

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
    apart.cluster.lost["pets/0", "confirm_finished"] = RayActorError()
    apart.cluster.waits = lambda call: call == ("pets/1", "confirm_finished") and looks < 4

    apart.run.run_phase("confirm_finished")

    assert crew.sent[2:4] == [("pets/0", "run_phases"), ("pets/0", "confirm_finished")]


def test_what_the_server_gave_out_is_told_once_though_its_answer_was_lost(job: Job) -> None:
    lost = iter([ActorUnavailableError("gone", None)])

    class LosesAnAnswer(ServerActor):
        """The first answer to `drain` does not arrive."""

        async def drain(self, number: int) -> Any:
            answer = await super().drain(number)
            for error in lost:
                raise error
            return answer

    cluster, told = FakeCluster(), []
    outcome, crew = Outcome(cluster.clock), FakeCrew(cluster, job)
    crew.server = FakeActor(LosesAnAnswer(cluster))
    crew.begin = lambda: crew.server.begin.remote(job)  # type: ignore[attr-defined]
    client = ServerClient(crew, outcome)  # type: ignore[arg-type]
    driver = Driver(lambda records, *_: told.append(records), crew.store, cluster=cluster)
    run = served.ServedRun(crew, client, driver, outcome)  # type: ignore[arg-type]
    client.begin()
    gradients = {group.name: np.zeros(group.layout.pushed, np.float32) for group in job.served()}
    client.call("push", Push("pets/0", 0, 0, loss=1.0, images=8, seconds=0.1), gradients)

    run.poll()
    assert outcome.lost_at.keys() == {"server"}
    run.poll()

    assert [[record.step for record in records] for records in told] == [[0], []]
    assert outcome.lost_at == {}, "it was there all the time"


def test_a_worker_that_is_killed_for_its_nodes_memory_is_replaced(apart: Session) -> None:
    apart.cluster.lost["pets/1", "train"] = OutOfMemoryError("the node's memory is full")
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
    session.cluster.waits = lambda call: call == ("pets/1", "train") and not asked
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
    host = WorkerActor(FakeCluster(), job, "pets/0", 0, None)
    for _ in range(2):
        host.host("pets/1", 0, "about")
    assert [guest() is None for guest in made] == [False]
    host.dismiss("pets/1", 0)
    assert made[0]() is None


def test_a_guest_that_was_let_go_makes_no_more_steps(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    guest, made = ServedWorker(FakeCluster(), job, "pets/1", 0, None), 0

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


def test_the_process_of_a_guest_that_hangs_is_its_hosts(job: Job) -> None:
    cluster = FakeCluster()
    crew = Crew(cluster, job, store_of(job))

    crew.kill_process("pets/1")

    assert cluster.killed == [crew.workers["pets/0"]]


@pytest.mark.parametrize("made", [[0] * 4, [0, 0, 5, 0, 0, 0]])
def test_a_run_whose_processes_are_lost_together_without_a_step_in_between_ends(
    job: Job, monkeypatch: pytest.MonkeyPatch, made: list[int]
) -> None:
    left = list(made)

    def lose(attempt: served.ServedRun) -> Outcome:
        attempt.records = left.pop(0)
        raise RestartAllError("A worker was lost.")

    monkeypatch.setattr(served.ServedRun, "run", lose)

    with pytest.raises(TrainingError, match=r"A worker was lost\. It was lost 4 times without a step made"):
        served.run(job, Driver(lambda *_: None, store_of(job), cluster=FakeCluster()))

    assert not left
