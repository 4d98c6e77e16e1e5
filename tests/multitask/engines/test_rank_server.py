"""Ranks as threads of one process, with the real ledger, against engine `local` by rounds."""

import asyncio
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from multitask.engines import local
from multitask.engines.interface import Driver, Outcome, take
from multitask.engines.ledger import LedgerActor
from multitask.engines.rank_server import LedgerConnection, RankServer
from multitask.engines.reduction import Reduction, plan_buckets
from multitask.job.job import Job
from multitask.server.messages import StepRecord
from multitask.spec.schema import JobSpec
from multitask.worker import StepResult, TaskWorker, train_steps
from tests.conftest import store_of
from tests.multitask.engines.fakes import FakeCluster

MakeSpec = Callable[..., JobSpec]
Steps = Collection[tuple[str, int]]
TIMEOUT_S = 60.0


class Meeting:
    """Two threads that sum tensors (`multitask.cluster.collectives.Members`)."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=TIMEOUT_S)
        self._started: dict[int, list[Tensor]] = {}

    def start_sum(self, piece: Tensor) -> SimpleNamespace:
        pieces = self._started.setdefault(threading.get_ident(), [])
        pieces.append(piece)
        number = len(pieces) - 1

        def wait() -> None:
            self._barrier.wait()
            first, second = (started[number] for started in self._started.values())
            total = first + second
            self._barrier.wait()
            piece.copy_(total)

        return SimpleNamespace(wait=wait)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def spoil(workers: list[TaskWorker], steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let workers find a gradient that is not finite in some steps."""

    def spoiled(worker: TaskWorker) -> Callable[..., StepResult]:
        compute = worker.learner.compute

        def compute_and_spoil(step: int, before_last_backward: Callable[[], None]) -> StepResult:
            found = compute(step, before_last_backward)
            if (worker.name, step) in steps:
                next(iter(worker.gradients.values()))[5] = float("nan")
            return found

        return compute_and_spoil

    for worker in workers:
        monkeypatch.setattr(worker.learner, "compute", spoiled(worker))


def train_ranks(
    job: Job, workers: list[TaskWorker], loop: asyncio.AbstractEventLoop
) -> tuple[Outcome, list[StepRecord]]:
    cluster = FakeCluster()
    actor = LedgerActor(cluster)

    def call(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(TIMEOUT_S)

    call(actor.begin(job, store_of(job)))

    class Connection(LedgerConnection):
        def send(self, method: str, *arguments: Any) -> "Future[Any]":
            return asyncio.run_coroutine_threadsafe(getattr(actor, method)(self.incarnation, *arguments), loop)

    ledger = Connection(cluster, actor, call(actor.begin_group()))
    users = {group.name: [name for name, task in job.workers.items() if task in group.tasks] for group in job.served()}
    meetings = {name: Meeting() for name in users if len(users[name]) > 1}
    plan = plan_buckets({group.name: group.layout for group in job.served()}, size_mb=0.001)
    assert len(plan) > 2

    def train(worker: TaskWorker) -> None:
        _, operations = ledger.ask("join", worker.name, 0, None)
        sums = Reduction(plan, worker.gradients, meetings)
        sums.watch(worker.learner.tensors())
        steps_left = dict.fromkeys(job.workers, job.spec.steps)
        server = RankServer(job, worker, ledger, sums, steps_left, operations)
        for _ in train_steps(worker, server, job.spec.steps, in_flight=0):
            pass
        server.rest(worker)
        worker.answer_last_requests(server)

    with ThreadPoolExecutor(len(workers)) as pool:
        for done in [pool.submit(train, worker) for worker in workers]:
            done.result()
    status = call(actor.report(600.0, 1))
    assert status.ended
    outcome = Outcome()
    take(job, Driver(lambda *_: None, store_of(job)), outcome, status.news, lambda _: {})
    return outcome, status.news[0]


@pytest.mark.parametrize(
    ("tasks", "changes", "spoiled"),
    [
        pytest.param({"pets": {"weight": 2.0}, "cars": {"accumulate": 2}}, {}, (), id="two tasks"),
        pytest.param({"pets": {"workers": 2}}, {"clip_norm": 0.1}, (), id="clipped gradients"),
        pytest.param(
            {
                "pets": {"mix": "mixup", "class_weights": {"class 1": 3.0}, "augment": "color_jitter"},
                "cars": {"mix": "cutmix", "sampling": "balanced", "augment": ["crop_flip", "rand_augment"]},
            },
            {},
            (),
            id="weighted classes and mixed images",
        ),
        pytest.param(
            {"pets": {"workers": 2}},
            {},
            (("pets/0", 1), ("pets/0", 2), ("pets/1", 2), ("pets/1", 3)),
            id="gradients that are not finite",
        ),
    ],
)
def test_ranks_equal_local_by_rounds_bit_for_bit(
    make_spec: MakeSpec,
    loop: asyncio.AbstractEventLoop,
    monkeypatch: pytest.MonkeyPatch,
    tasks: dict[str, dict[str, Any]],
    changes: dict[str, Any],
    spoiled: Steps,
) -> None:
    changes = {"steps": 5, "evaluate_every": 5, **changes}
    job = Job(make_spec(tasks, engine={"name": "local", "schedule": "rounds"}, **changes))
    records: list[StepRecord] = []
    workers = local.make_workers(job)
    spoil(workers, spoiled, monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(local, "make_workers", lambda _: workers)
        expected = local.run(job, Driver(lambda new, *_: records.extend(new), store_of(job)))

    job = Job(make_spec(tasks, engine={"name": "allreduce"}, **changes))
    workers = local.make_workers(job)
    spoil(workers, spoiled, monkeypatch)
    outcome, found = train_ranks(job, workers, loop)

    def losses(records: list[StepRecord]) -> dict[tuple[str, int], tuple[float, bool]]:
        return {(record.worker, record.step): (record.loss, record.rejected is not None) for record in records}

    assert losses(found) == losses(records)
    assert {key for key, (_, rejected) in losses(found).items() if rejected} == set(spoiled)
    assert outcome.versions["last"].metrics == expected.versions["last"].metrics
    for name, group in expected.versions["last"].groups.items():
        assert outcome.versions["last"].groups[name].values.tobytes() == group.values.tobytes()
        assert outcome.versions["last"].groups[name].counters.tobytes() == group.counters.tobytes()
