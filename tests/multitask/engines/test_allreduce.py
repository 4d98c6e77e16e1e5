"""How engine `allreduce` notices that a run has ended, without processes."""

import asyncio
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from multitask.engines import allreduce
from multitask.engines.interface import Driver, Outcome
from multitask.engines.ledger import LedgerActor
from multitask.errors import TrainingError
from multitask.job.job import Job
from multitask.server.messages import Push
from multitask.spec.schema import JobSpec
from tests.conftest import store_of

MakeSpec = Callable[..., JobSpec]
STEPS = 2


class FakeRanks:
    """Ranks that have done all their work as soon as they start, and a ledger that Ray has just started."""

    def __init__(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        self._job, self._ledger = job, LedgerActor()
        self.starts = 0
        self.trains = True
        """False for ranks whose ledger is lost before the driver hears that they have ended."""
        self.pause_at: int | None = None
        """Step before which a pause is asked for; None for no pause."""
        self.fit = lambda: None
        monkeypatch.setattr(allreduce.ray, "wait", lambda calls, **_: (calls, []))
        monkeypatch.setattr(allreduce.ray, "get", lambda call, **_: call())

    @property
    def ledger(self) -> "FakeRanks":
        return self

    def __getattr__(self, method: str) -> Any:
        """Return a method of the ledger in the form in which Ray offers it."""
        return SimpleNamespace(remote=lambda *arguments: partial(self.call, method, *arguments))

    def call(self, method: str, *arguments: Any) -> Any:
        return asyncio.run(getattr(self._ledger, method)(*arguments))

    def begin(self) -> Callable[[], Any]:
        return partial(self.call, "begin", self._job, store_of(self._job))

    def start(self) -> None:
        self.starts += 1
        if self.trains:
            asyncio.run(self.train())

    async def train(self) -> None:
        group = await self._ledger.begin_group()
        await asyncio.gather(*(self._rank(group, name) for name in self._job.workers))

    async def _rank(self, group: int, name: str) -> None:
        """Make the calls of the ledger that a rank makes."""
        ledger = self._ledger
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
            await ledger.finish(group, name)
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
def ranks(job: Job, monkeypatch: pytest.MonkeyPatch) -> FakeRanks:
    return FakeRanks(job, monkeypatch)


def run(job: Job, ranks: FakeRanks) -> Outcome:
    outcome = Outcome()
    allreduce.AllreduceRun(job, Driver(lambda *_: None, store_of(job)), outcome, ranks).run()  # type: ignore[arg-type]
    return outcome


def test_when_the_ledger_is_lost_after_the_ranks_ended_all_go_on_from_the_checkpoint(
    job: Job, ranks: FakeRanks, caplog: pytest.LogCaptureFixture
) -> None:
    outcome = run(job, ranks)

    assert ranks.starts == 1
    assert not outcome.paused
    assert outcome.versions["last"].version == STEPS
    lost = "The worker group was lost (the ledger, when all ranks had ended). All workers go back to the start."
    assert caplog.messages == [lost]


def test_a_ledger_that_is_lost_after_the_ranks_ended_again_and_again_ends_the_run(job: Job, ranks: FakeRanks) -> None:
    ranks.trains = False
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
    job: Job, ranks: FakeRanks, made: tuple[int, int], pause_at: int | None, paused: bool
) -> None:
    for worker, step in zip(job.progress.workers.values(), made, strict=True):
        worker.step = step
    job.progress.version = max(made)
    ranks.pause_at = pause_at
    ranks.begin()()
    asyncio.run(ranks.train())

    outcome = run(job, ranks)

    assert ranks.starts == 0
    assert outcome.paused == paused
    assert paused or outcome.versions["last"].version == job.progress.version + STEPS - min(made)
    assert (store_of(job).latest() is not None) == (pause_at is not None)
