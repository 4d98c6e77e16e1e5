"""How engine `allreduce` notices that a run has ended, without processes."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from multitask.cluster.interface import Process
from multitask.engines import allreduce
from multitask.engines.interface import Driver, Outcome
from multitask.engines.ledger import LedgerActor
from multitask.errors import TrainingError
from multitask.job.job import Job
from multitask.server.messages import Push
from multitask.spec.schema import JobSpec
from tests.conftest import store_of
from tests.multitask.engines.fakes import FakeActor, FakeCluster

MakeSpec = Callable[..., JobSpec]
STEPS = 2


class Ended:
    """Ranks that have ended their work."""

    def wait(self, timeout_s: float) -> bool:  # noqa: ARG002
        return True

    def result(self) -> None: ...

    def cancel(self) -> None: ...

    def release(self) -> None: ...


class Ranks(FakeCluster):
    """A cluster whose ranks have ended as soon as they start."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job = job
        self.starts = 0
        self.trains_from = 1
        """The first start whose ranks do their work. To the driver, ranks that end without it look as if the ledger was
        lost after they had done their work."""
        self.pause_at: int | None = None
        """Step before which a pause is asked for; None for no pause."""

    def start(self, kind: type, arguments: Sequence[Any], process: Process) -> FakeActor:
        self.ledger = LedgerActor(self)
        assert (kind, arguments, process.restarts) == (LedgerActor, [self], True)
        return FakeActor(self.ledger)

    def run_ranks(self, ranks: object, work: object, leader: object) -> Ended:  # noqa: ARG002
        self.starts += 1
        if self.starts >= self.trains_from:
            asyncio.run(self._train())
        return Ended()

    async def _train(self) -> None:
        if self.starts == 1:  # the driver hands out the job while the first ranks start
            await self.ledger.begin(self._job, store_of(self._job))
        group = await self.ledger.begin_group()
        await asyncio.gather(*(self._rank(group, name) for name in self._job.workers))

    async def _rank(self, group: int, name: str) -> None:
        """Make the calls of the ledger that a rank makes."""
        ledger = self.ledger
        reply, _ = await ledger.join(group, name, 0, None)
        step = reply.step

        async def answer_requests() -> None:
            requests, _ = await ledger.snapshot_requests(group, name)
            for request in requests:
                if request.save:
                    await ledger.report_state(group, request, name, step, 0, {})
                if request.evaluate:
                    await ledger.report_evaluation(group, request, self._job.workers[name], {"top1": 50.0}, {})

        async def ask_for_a_pause() -> None:
            if step == self.pause_at:
                await ledger.pause()

        await ask_for_a_pause()
        while step < STEPS and not reply.pause:
            reply, _ = await ledger.push(group, Push(name, step, reply.version, loss=1.0, images=8, seconds=0.1))
            step += 1
            await answer_requests()
            await ask_for_a_pause()
        if step == STEPS:
            await ledger.finish(group, name, step)
        ended = False
        while not ended:
            _, ended = await ledger.rest(group, name)
            await answer_requests()
        await ledger.pull(group, name)
        await answer_requests()


@pytest.fixture
def job(make_spec: MakeSpec) -> Job:
    return Job(make_spec(engine={"name": "allreduce"}, steps=STEPS, evaluate_every=1))


@pytest.fixture
def ranks(job: Job) -> Ranks:
    return Ranks(job)


def run(job: Job, ranks: Ranks) -> Outcome:
    return allreduce.run(job, Driver(lambda *_: None, store_of(job), cluster=ranks))


def test_when_the_ledger_is_lost_after_the_ranks_ended_all_go_on_from_the_checkpoint(
    job: Job, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    ranks.trains_from = 2

    outcome = run(job, ranks)

    assert ranks.starts == 2
    assert not outcome.paused
    assert outcome.versions["last"].version == STEPS
    lost = "The worker group was lost (the ledger, when all ranks had ended). All workers go back to the start."
    assert caplog.messages == [lost]


def test_a_ledger_that_is_lost_after_the_ranks_ended_again_and_again_ends_the_run(job: Job, ranks: Ranks) -> None:
    ranks.trains_from = 100
    with pytest.raises(TrainingError, match="lost 4 times without a step made: the ledger"):
        run(job, ranks)


@pytest.mark.parametrize(
    ("made", "pause_at", "paused"),
    [
        pytest.param((0, 0), None, False, id="finished"),
        pytest.param((0, 0), 0, True, id="paused"),
        pytest.param((0, 0), 1, False, id="a pause wanted in the last round"),
        pytest.param((0, 0), 2, False, id="a pause wanted after the last round"),
        pytest.param((2, 0), None, False, id="a task joined late"),
        pytest.param((2, 0), 0, True, id="a task joined late and paused"),
        pytest.param((1, 0), 0, True, id="a task joined late and paused in the last round of the other"),
        pytest.param((2, 2), None, False, id="gone on from the last step"),
        pytest.param((2, 2), 2, False, id="gone on from the last step, and a pause wanted"),
    ],
)
def test_a_run_whose_ranks_have_handed_in_everything_has_ended(
    job: Job, ranks: Ranks, made: tuple[int, int], pause_at: int | None, paused: bool
) -> None:
    for worker, step in zip(job.progress.workers.values(), made, strict=True):
        worker.step = step
    job.progress.version = max(made)
    ranks.pause_at = pause_at

    outcome = run(job, ranks)

    assert ranks.starts == 1
    assert outcome.paused == paused
    assert paused or outcome.versions["last"].version == job.progress.version + STEPS - min(made)
    assert (store_of(job).latest() is not None) == (pause_at is not None)
