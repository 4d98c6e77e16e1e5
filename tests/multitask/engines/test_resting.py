"""What ranks of engine `allreduce` do after their last step, without processes."""

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from multitask.engines import ledger
from multitask.engines.ledger import Apply, LedgerActor, TakeSnapshot
from multitask.engines.ranks import RankServer
from multitask.job.job import Job
from multitask.server.messages import Push, SnapshotRequest
from multitask.spec.schema import JobSpec
from tests.conftest import store_of

NUMBERS = itertools.count(1)
MakeSpec = Callable[..., JobSpec]


@pytest.fixture
def job(make_spec: MakeSpec) -> Job:
    return Job(make_spec(engine={"name": "allreduce"}, evaluate_every=1))


def test_a_rank_that_rests_hands_in_what_is_asked_while_others_train(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    server = RankServer(job, "pets/0", None, 0)
    asked: list[str] = []
    news = iter([([], False), ([TakeSnapshot(3, slots=True)], False), ([], True)])
    request = SnapshotRequest(3, evaluate=True, save=True)

    def ask(method: str, *arguments: Any) -> Any:
        asked.append(arguments[0] if method == "call" else method)
        if method == "rest":
            return next(news)
        return ((request,) if asked.count("rest") == 2 else (), []) if method == "snapshot_requests" else None

    monkeypatch.setattr(server, "_ask", ask)

    server.rest(job.make_worker("pets/0", iter(())))

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


def test_a_rank_that_rests_hands_in_what_is_put_aside_at_the_moment_it_asks(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step of another worker comes between the news and the question what is asked."""

    async def story() -> list[int]:
        mine = await resting(job, "pets/0")
        server = RankServer(job, "pets/0", None, mine._group)
        worker = job.make_worker("pets/0", iter(()))
        handed_in: list[int] = []

        def ask(method: str, *arguments: Any) -> Any:
            if method == "call" and arguments[0] == "report_evaluation":
                handed_in.append(arguments[1].version)
            # A method of an actor as Ray would call it; none of these waits.
            coroutine = getattr(mine, method)(mine._group, *arguments)
            with pytest.raises(StopIteration) as answered:
                coroutine.send(None)
            return answered.value.value

        monkeypatch.setattr(server, "_ask", ask)
        mine._server.finish("cars/0")
        worker.answer_requests(server)
        return handed_in

    assert asyncio.run(story()) == [0]


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    processes: list[str] = []
    monkeypatch.setattr(ledger.ray, "kill", processes.append)
    return processes


async def resting(job: Job, *names: str) -> LedgerActor:
    """A ledger that all workers have joined, and some have finished."""
    mine = LedgerActor()
    await mine.begin(job, store_of(job))
    group = await mine.begin_group()
    for name in job.workers:
        await mine.join(group, name, 0, f"the process of {name}")
    for name in names:
        mine._server.finish(name)
        mine._resting.add(name)
    return mine


async def silent(mine: LedgerActor, *alive: str) -> list[str]:
    """Who hangs, after nothing was heard for long of anybody else."""
    for worker in mine._server._heard:
        mine._server._heard[worker] -= 1000
    for worker in alive:
        mine._server.report_alive(worker)
    return (await mine.report(600, next(NUMBERS))).silent


def test_a_rank_that_waits_for_others_to_start_does_not_hang(job: Job, killed: list[str]) -> None:
    async def story() -> None:
        mine = LedgerActor()
        await mine.begin(job, store_of(job))
        await mine.join(await mine.begin_group(), "pets/0", 0, "the process of pets/0")
        assert await silent(mine) == []

    asyncio.run(story())
    assert killed == []


def test_a_rank_that_rests_does_not_hang(job: Job, killed: list[str]) -> None:
    async def story() -> None:
        assert await silent(await resting(job, "pets/0")) == ["cars/0"]

    asyncio.run(story())
    assert killed == ["the process of cars/0"]


@pytest.mark.usefixtures("killed")
def test_while_a_rank_that_rests_owes_something_all_others_wait_for_it(job: Job) -> None:
    async def story() -> None:
        mine = await resting(job, "pets/0")
        mine._server.snapshot_for_checkpoint()
        assert mine._server.workers_with_requests() == list(job.workers)
        assert await silent(mine) == ["pets/0"]

    asyncio.run(story())


def test_a_rank_that_has_handed_in_everything_at_the_end_does_not_hang(job: Job, killed: list[str]) -> None:
    async def story() -> None:
        mine = await resting(job, *job.workers)
        mine._server.report_evaluation(mine._server.snapshot_requests("pets/0")[0], "pets", {"top1": 50.0}, {})
        assert mine._server.workers_with_requests() == ["cars/0"]
        assert await silent(mine) == ["cars/0"]

    asyncio.run(story())
    assert killed == ["the process of cars/0"]


@pytest.mark.usefixtures("killed")
def test_a_rank_that_rests_waits_for_one_that_has_still_to_read_of_its_round(make_spec: MakeSpec) -> None:
    """Cars evaluates round 1 while pets, which was quicker, is in the sums of round 2 already."""
    tasks: dict[str, dict[str, Any]] = {"pets": {}, "cars": {}, "food": {}}
    job = Job(make_spec(tasks, engine={"name": "allreduce"}, evaluate_every=1))

    async def story() -> None:
        mine = await resting(job, "pets/0", "cars/0")
        group = mine._group

        async def make_step(step: int) -> None:
            await mine.push(group, Push("food/0", step, version=step, loss=1.0, images=8, seconds=0.1))

        async def report_evaluation(version: int, task: str) -> None:
            [request] = [
                request for request in mine._server.snapshot_requests(f"{task}/0") if request.version == version
            ]
            await mine.call(group, "report_evaluation", request, task, {"top1": 50.0}, {})

        await make_step(0)
        await mine.rest(group, "pets/0")
        await mine.rest(group, "cars/0")
        await report_evaluation(1, "food")
        await make_step(1)
        await report_evaluation(1, "pets")
        operations, _ = await mine.rest(group, "pets/0")
        assert [type(operation) for operation in operations] == [Apply, TakeSnapshot]
        assert mine._server.workers_with_requests() == list(job.workers)
        await mine.drop_snapshot([0])  # unread, and nothing to wait for

        assert await silent(mine, "cars/0") == []

        await report_evaluation(1, "cars")
        await mine.rest(group, "cars/0")
        assert await silent(mine, "cars/0") == ["pets/0"]

    asyncio.run(story())
