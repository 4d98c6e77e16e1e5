"""Ranks of engine `allreduce` after their last step, without processes."""

import asyncio
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from multitask.engines.ledger import LedgerActor, busy_workers
from multitask.engines.operations import Apply, Operation, TakeSnapshot
from multitask.engines.rank_server import LedgerConnection, RankServer, contribution
from multitask.engines.reduction import Reduction
from multitask.job.job import Job
from multitask.server.messages import Push, SnapshotRequest
from multitask.spec.schema import JobSpec
from multitask.worker import TaskWorker
from tests.conftest import store_of
from tests.multitask.engines.fakes import FakeCluster

NUMBERS = itertools.count(1)
MakeSpec = Callable[..., JobSpec]


@pytest.fixture
def job(make_spec: MakeSpec) -> Job:
    return Job(make_spec(engine={"name": "allreduce"}, evaluate_every=1))


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster()


def server_of(job: Job, worker: TaskWorker, connection: LedgerConnection) -> RankServer:
    """Return the server of a rank after the last step of all workers."""
    return RankServer(job, worker, connection, Reduction([], {}, {}), dict.fromkeys(job.workers, 0), [])


def test_a_rank_that_rests_hands_in_what_is_asked_while_others_train(job: Job, cluster: FakeCluster) -> None:
    asked: list[str] = []
    news = iter([([], False), ([TakeSnapshot(3, slots=True)], False), ([], True)])
    request = SnapshotRequest(3, evaluate=True, save=True)

    class Connection(LedgerConnection):
        def ask(self, method: str, *_: Any) -> Any:
            asked.append(method)
            if method == "rest":
                return next(news)
            return ((request,) if asked.count("rest") == 2 else (), []) if method == "snapshot_requests" else None

    worker = job.make_worker("pets/0", iter(()))

    server_of(job, worker, Connection(cluster, None, 0)).rest(worker)

    assert asked == [
        "rest",
        "snapshot_requests",
        "rest",
        "snapshot_requests",
        "report_state",
        "report_evaluation",
        "rest",
        "snapshot_requests",
    ]


def test_a_rank_carries_out_what_was_written_down_before_it_joined(job: Job, cluster: FakeCluster) -> None:
    worker = job.make_worker("pets/0", iter(()))
    operations: list[Operation] = [TakeSnapshot(3, slots=False)]

    server = RankServer(job, worker, LedgerConnection(cluster, None, 0), Reduction([], {}, {}), {}, operations)

    assert server.snapshot(3, "pets/0").keys() == {"shared:pets+cars"}


def test_a_rank_that_rests_hands_in_what_is_put_aside_at_the_moment_it_asks(job: Job, cluster: FakeCluster) -> None:
    """The last step of another worker comes between the news and the question what is asked."""
    handed_in: list[int] = []

    class Connection(LedgerConnection):
        def ask(self, method: str, *arguments: Any) -> Any:
            """Call a method of the ledger in this process; none of these waits."""
            if method == "report_evaluation":
                handed_in.append(arguments[0].version)
            coroutine = getattr(self.actor, method)(self.incarnation, *arguments)
            with pytest.raises(StopIteration) as answered:
                coroutine.send(None)
            return answered.value.value

    async def story() -> None:
        mine, incarnation = await resting(cluster, job, "pets/0")
        worker = job.make_worker("pets/0", iter(()))
        server = server_of(job, worker, Connection(cluster, mine, incarnation))
        await mine.finish(incarnation, "cars/0", 0)
        worker.answer_requests(server)

    asyncio.run(story())
    assert handed_in == [0]


@pytest.mark.parametrize(
    ("starting", "resting", "rounds_behind", "expected"),
    [
        pytest.param(True, (), {}, set(), id="those that have joined wait for the others"),
        pytest.param(True, ("a",), {"a": 1}, set(), id="also one that rests"),
        pytest.param(False, (), {}, {"a", "b", "c"}, id="all train"),
        pytest.param(False, ("a",), {}, {"b", "c"}, id="a rank that rests waits for those that train"),
        pytest.param(False, ("a",), {"a": 0}, {"a"}, id="those that train wait for one that evaluates"),
        pytest.param(False, ("a", "b"), {"a": 0, "b": 1}, {"b"}, id="only the one furthest behind is busy"),
        pytest.param(False, ("a", "b"), {"a": 2, "b": 2}, {"a", "b"}, id="two are equally far behind"),
        pytest.param(False, ("a", "b", "c"), {}, set(), id="all rest and have reported everything"),
    ],
)
def test_a_worker_is_busy_if_it_waits_for_no_other(
    starting: bool, resting: tuple[str, ...], rounds_behind: Mapping[str, int], expected: set[str]
) -> None:
    joined = {"a", "b", "c"}
    found = busy_workers(starting=starting, joined=joined, resting=resting, rounds_behind=rounds_behind)
    assert found == expected


@pytest.mark.parametrize(
    ("contributors", "expected"),
    [
        pytest.param(["a", "b"], 1.0, id="equal weights cancel"),
        pytest.param(["a", "c"], 2.0, id="a weighted sum"),
        pytest.param(["b", "c"], None, id="no contributor"),
    ],
)
def test_a_contribution_is_the_workers_factor_in_the_sum(contributors: list[str], expected: float | None) -> None:
    assert contribution("a", contributors, {"a": 2.0, "b": 2.0, "c": 1.0}) == expected


async def resting(cluster: FakeCluster, job: Job, *names: str) -> tuple[LedgerActor, int]:
    """Return a ledger that all workers have joined, where the named ones rest, and the incarnation of the group."""
    mine = LedgerActor(cluster)
    await mine.begin(job, store_of(job))
    incarnation = await mine.begin_group()
    for name in job.workers:
        await mine.join(incarnation, name, 0, f"the process of {name}")
    for name in names:
        await mine.finish(incarnation, name, 0)
        await rest(mine, incarnation, name)
    return mine, incarnation


async def rest(mine: LedgerActor, incarnation: int, name: str) -> list[Operation]:
    """Return the operations that a rank which rests reads now; none if it would have to wait for some."""
    call = asyncio.ensure_future(mine.rest(incarnation, name))
    await asyncio.sleep(0)
    if not call.done():
        call.cancel()
        return []
    operations, _ = call.result()
    return operations


async def silent(cluster: FakeCluster, mine: LedgerActor, incarnation: int, *alive: str) -> list[str]:
    """Return the workers that count as hung when only those in `alive` have given a sign of life for long."""
    cluster.clock.sleep(1000)
    for worker in alive:
        await mine.report_alive(incarnation, worker)
    return (await mine.report(600, next(NUMBERS))).silent


def test_a_rank_that_waits_for_others_to_start_does_not_hang(job: Job, cluster: FakeCluster) -> None:
    async def story() -> None:
        mine = LedgerActor(cluster)
        await mine.begin(job, store_of(job))
        incarnation = await mine.begin_group()
        await mine.join(incarnation, "pets/0", 0, "the process of pets/0")
        assert await silent(cluster, mine, incarnation) == []

    asyncio.run(story())
    assert cluster.killed == []


def test_a_rank_that_rests_does_not_hang(job: Job, cluster: FakeCluster) -> None:
    async def story() -> None:
        assert await silent(cluster, *await resting(cluster, job, "pets/0")) == ["cars/0"]

    asyncio.run(story())
    assert cluster.killed == ["the process of cars/0"]


def test_while_a_rank_that_rests_owes_something_all_others_wait_for_it(job: Job, cluster: FakeCluster) -> None:
    async def story() -> None:
        mine, incarnation = await resting(cluster, job, "pets/0")
        mine.server.snapshot_for_checkpoint()
        assert mine.server.workers_with_requests() == list(job.workers)
        assert await silent(cluster, mine, incarnation) == ["pets/0"]

    asyncio.run(story())


def test_a_rank_that_has_handed_in_everything_at_the_end_does_not_hang(job: Job, cluster: FakeCluster) -> None:
    async def story() -> None:
        mine, incarnation = await resting(cluster, job, *job.workers)
        [request], _ = await mine.snapshot_requests(incarnation, "pets/0")
        await mine.report_evaluation(incarnation, request, "pets", {"top1": 50.0}, {})
        assert mine.server.workers_with_requests() == ["cars/0"]
        assert await silent(cluster, mine, incarnation) == ["cars/0"]

    asyncio.run(story())
    assert cluster.killed == ["the process of cars/0"]


def test_a_rank_that_rests_waits_for_one_that_has_still_to_read_of_its_round(
    make_spec: MakeSpec, cluster: FakeCluster
) -> None:
    """Cars evaluates round 1 while pets, which was quicker, is in the sums of round 2 already."""
    tasks: dict[str, dict[str, Any]] = {"pets": {}, "cars": {}, "food": {}}
    job = Job(make_spec(tasks, engine={"name": "allreduce"}, evaluate_every=1))

    async def story() -> None:
        mine, incarnation = await resting(cluster, job, "pets/0", "cars/0")

        async def make_step(step: int) -> None:
            await mine.push(incarnation, Push("food/0", step, version=step, loss=1.0, images=8, seconds=0.1))

        async def report_evaluation(version: int, task: str) -> None:
            [request] = [
                request for request in mine.server.snapshot_requests(f"{task}/0") if request.version == version
            ]
            await mine.report_evaluation(incarnation, request, task, {"top1": 50.0}, {})

        await make_step(0)
        await rest(mine, incarnation, "pets/0")
        await rest(mine, incarnation, "cars/0")
        await report_evaluation(1, "food")
        await make_step(1)
        await report_evaluation(1, "pets")
        operations = await rest(mine, incarnation, "pets/0")
        assert [type(operation) for operation in operations] == [Apply, TakeSnapshot]
        assert mine.server.workers_with_requests() == list(job.workers)
        await mine.drop_snapshot([0])  # unread, and nothing to wait for

        assert await silent(cluster, mine, incarnation, "cars/0") == []

        await report_evaluation(1, "cars")
        await rest(mine, incarnation, "cars/0")
        assert await silent(cluster, mine, incarnation, "cars/0") == ["pets/0"]

    asyncio.run(story())
