"""How engine `allreduce` sees that a run has ended, without processes."""

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


class FakeCrew:
    """A crew whose groups are at their end as soon as they start; its ledger has just been started by Ray."""

    def __init__(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        self._job, self._ledger = job, LedgerActor()
        self.starts = 0
        self.trains = True
        """False for groups whose ledger is lost before the driver hears of their end."""
        self.pause_at: int | None = None
        """A step before which a pause is asked for."""
        self.fit = lambda: None
        monkeypatch.setattr(allreduce.ray, "wait", lambda calls, **_: (calls, []))
        monkeypatch.setattr(allreduce.ray, "get", lambda call, **_: call())

    @property
    def ledger(self) -> "FakeCrew":
        return self

    def __getattr__(self, method: str) -> Any:
        """A method of the ledger as Ray would call it."""
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
        """What a rank asks of the ledger."""
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
def crew(job: Job, monkeypatch: pytest.MonkeyPatch) -> FakeCrew:
    return FakeCrew(job, monkeypatch)


def run(job: Job, crew: FakeCrew) -> Outcome:
    outcome = Outcome()
    allreduce.AllreduceRun(job, Driver(lambda *_: None, store_of(job)), outcome, crew).run()  # type: ignore[arg-type]
    return outcome


def test_when_the_ledger_is_lost_after_the_ranks_ended_all_go_on_from_the_checkpoint(
    job: Job, crew: FakeCrew, caplog: pytest.LogCaptureFixture
) -> None:
    outcome = run(job, crew)

    assert crew.starts == 1
    assert not outcome.paused
    assert outcome.versions["last"].version == STEPS
    lost = "The worker group was lost (the ledger, when all ranks had ended). All workers go back to the start."
    assert caplog.messages == [lost]


def test_a_ledger_that_is_lost_after_the_ranks_ended_again_and_again_ends_the_run(job: Job, crew: FakeCrew) -> None:
    crew.trains = False
    with pytest.raises(TrainingError, match="lost 4 times without a step made: the ledger"):
        run(job, crew)


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
    job: Job, crew: FakeCrew, made: tuple[int, int], pause_at: int | None, paused: bool
) -> None:
    for worker, step in zip(job.progress.workers.values(), made, strict=True):
        worker.step = step
    job.progress.version = max(made)
    crew.pause_at = pause_at
    crew.begin()()
    asyncio.run(crew.train())

    outcome = run(job, crew)

    assert crew.starts == 0
    assert outcome.paused == paused
    assert paused or outcome.versions["last"].version == job.progress.version + STEPS - min(made)
    assert (store_of(job).latest() is not None) == (pause_at is not None)
