"""The parameter server as an actor, without Ray."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from multitask.engines.server_actors import Refs, ServerActor
from multitask.job.job import Job
from multitask.server.messages import Gradients, OutOfStepError, Push, PushRejectedError, Reply
from multitask.server.parameter_server import ParameterServer
from multitask.spec.schema import JobSpec
from tests.multitask.engines.fakes import FakeCluster

MakeSpec = Callable[..., JobSpec]


@pytest.fixture
def job(make_spec: MakeSpec) -> Job:
    return Job(make_spec({"pets": {}}, engine={"name": "async", "in_flight": 1}))


def push_of(job: Job, step: int) -> tuple[Push, Gradients]:
    gradients = {group.name: np.zeros(group.layout.pushed, np.float32) for group in job.served()}
    return Push("pets/0", step, version=0, loss=1.0, images=8, seconds=0.1), gradients


async def overtaking(job: Job) -> tuple[ServerActor, "asyncio.Task[tuple[Reply, object]]"]:
    """Return a server, and a push that has overtaken the push that was sent before it."""
    server = ServerActor(FakeCluster())
    server.begin(job)
    server.join("pets/0", 0, None, 0)
    early = asyncio.create_task(server.push(*push_of(job, 1)))
    await asyncio.sleep(0)
    return server, early


def test_a_push_that_has_overtaken_the_one_before_it_waits_for_its_turn(job: Job) -> None:
    async def story() -> list[int]:
        server, early = await overtaking(job)
        with pytest.raises(OutOfStepError):
            await server.push(*push_of(job, 2))
        replies = [(await server.push(*push_of(job, 0)))[0], (await early)[0]]
        return [reply.step for reply in replies]

    assert asyncio.run(story()) == [1, 2]


def test_an_early_push_does_not_wait_for_one_of_a_process_that_was_replaced(job: Job) -> None:
    async def story() -> None:
        server, early = await overtaking(job)
        server.join("pets/0", 1, None, 0)
        with pytest.raises(PushRejectedError, match="process 1 took its place"):
            await early

    asyncio.run(story())


def test_pushes_that_wait_are_applied_before_values_are_published_once_for_all(make_spec: MakeSpec) -> None:
    job = Job(make_spec({"pets": {}, "pets_too": {}}, engine={"name": "async"}))
    server = ServerActor(FakeCluster())
    server.begin(job)

    async def push_all() -> list[tuple[Reply, list[Refs]]]:
        pushes = []
        for worker, task in job.workers.items():
            groups = [group for group in job.served() if task in group.tasks]
            gradients = {group.name: np.zeros(group.layout.pushed, np.float32) for group in groups}
            pushes.append(server.push(Push(worker, 0, 0, loss=1.0, images=8, seconds=0.1), gradients))
        return await asyncio.gather(*pushes)

    (first, first_refs), (second, second_refs) = asyncio.run(push_all())

    assert (first.version, second.version) == (2, 2)
    shared = first_refs[0].keys() & second_refs[0].keys()
    assert shared
    assert all(first_refs[0][name] == second_refs[0][name] for name in shared)


@pytest.mark.parametrize("engine", [{"name": "sync"}, {"name": "bounded", "staleness": 1}])
def test_a_push_wakes_up_others_only_if_it_lets_them_go_on(
    make_spec: MakeSpec, engine: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(make_spec({"pets": {"workers": 20}}, engine=engine))
    server = ServerActor(FakeCluster())
    server.begin(job)
    looks = []
    reply = ParameterServer.reply
    monkeypatch.setattr(ParameterServer, "reply", lambda *about: looks.append(about[1]) or reply(*about))
    gradients = push_of(job, 0)[1]

    async def story() -> list[int]:
        waiting = []
        for worker in list(job.workers):
            push = Push(worker, 0, version=0, loss=1.0, images=8, seconds=0.1)
            waiting.append(asyncio.create_task(server.push(push, gradients)))
            for _ in range(3):
                await asyncio.sleep(0)
        return [(await answer)[0].step for answer in waiting]

    assert asyncio.run(story()) == [1] * 20
    assert len(looks) < 2 * 20
