"""The ledger of engine `allreduce`, without Ray."""

import asyncio
from collections.abc import Callable

from multitask.engines.ledger import LedgerActor
from multitask.job import Job
from multitask.spec import JobSpec
from tests.conftest import store_of


def test_after_a_loss_all_ranks_are_missing_until_they_join_the_next_group(make_spec: Callable[..., JobSpec]) -> None:
    job = Job(make_spec(engine={"name": "allreduce"}))

    async def lose_a_group() -> list[tuple[set[str], bool, list[str]]]:
        ledger = LedgerActor()
        await ledger.begin(job, store_of(job))
        found = []

        async def look() -> None:
            report = await ledger.report(600.0)
            found.append((set(report.processes), await ledger.starting(), report.lost))

        for loses in (True, False):
            group = await ledger.begin_group()
            for process, worker in enumerate(job.workers):
                await ledger.join(group, worker, process, None)
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
