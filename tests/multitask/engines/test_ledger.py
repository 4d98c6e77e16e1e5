"""The ledger of engine `allreduce`, without Ray."""

import asyncio
import itertools
from collections.abc import Callable

import pytest

from multitask.engines.ledger import LedgerActor
from multitask.job.job import Job
from multitask.server.messages import Push, PushRejectedError
from multitask.spec.schema import JobSpec
from tests.conftest import store_of
from tests.multitask.engines.fakes import FakeCluster


def test_a_report_that_is_asked_for_again_is_the_same_and_the_next_one_has_what_came_since(
    make_spec: Callable[..., JobSpec],
) -> None:
    job = Job(make_spec(engine={"name": "allreduce"}))

    async def ask() -> list[tuple[list[int], list[str]]]:
        ledger = LedgerActor(FakeCluster())
        await ledger.begin(job, store_of(job))
        incarnation = await ledger.begin_group()
        found = []
        for step, number in enumerate((1, 1, 2)):
            await ledger.lose(f"loss {step}")
            pushes = [Push(worker, step, step, loss=1.0, images=8, seconds=0.1) for worker in job.workers]
            await asyncio.gather(*(ledger.push(incarnation, push) for push in pushes))
            report = await ledger.report(600.0, number)
            found.append(([record.step for record in report.news[0]], report.lost))
        return found

    first = [0, 0], ["loss 0"]
    assert asyncio.run(ask()) == [first, first, ([1, 1, 2, 2], ["loss 1", "loss 2"])]


def test_after_a_loss_all_ranks_are_missing_until_they_join_the_next_group(make_spec: Callable[..., JobSpec]) -> None:
    job = Job(make_spec(engine={"name": "allreduce"}))

    async def lose_a_group() -> list[tuple[set[str], bool, list[str]]]:
        ledger, numbers = LedgerActor(FakeCluster()), itertools.count(1)
        await ledger.begin(job, store_of(job))
        found = []

        async def look() -> None:
            report = await ledger.report(600.0, next(numbers))
            found.append((set(report.processes), await ledger.starting(), report.lost))

        for loses in (True, False):
            incarnation = await ledger.begin_group()
            for process, worker in enumerate(job.workers):
                await ledger.join(incarnation, worker, process, None)
            await look()
            if loses:
                await ledger.lose("rank 1: gone")
                await look()
        return found

    everyone = set(job.workers)
    assert asyncio.run(lose_a_group()) == [
        (everyone, False, []),
        (set(), True, ["rank 1: gone"]),
        (everyone, False, []),
    ]


def test_ranks_of_an_earlier_group_are_rejected_also_while_they_wait(make_spec: Callable[..., JobSpec]) -> None:
    job = Job(make_spec(engine={"name": "allreduce"}))

    async def start_twice() -> None:
        ledger = LedgerActor(FakeCluster())
        with pytest.raises(PushRejectedError):
            await ledger.report_alive(0, "pets/0")
        await ledger.begin(job, store_of(job))
        first = await ledger.begin_group()
        waits = asyncio.ensure_future(ledger.push(first, Push("pets/0", 0, 0, loss=1.0, images=8, seconds=0.1)))
        await asyncio.sleep(0)
        assert not waits.done(), "the round waits for the other worker"

        second = await ledger.begin_group()

        with pytest.raises(PushRejectedError, match="place was taken by a newer one"):
            await waits
        with pytest.raises(PushRejectedError, match="place was taken by a newer one"):
            await ledger.finish(first, "pets/0", 0)
        await ledger.finish(second, "pets/0", 0)

    asyncio.run(start_twice())
