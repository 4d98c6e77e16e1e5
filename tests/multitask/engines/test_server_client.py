"""The parameter server as the driver sees it, without processes."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from multitask.engines.decisions import Recovery
from multitask.engines.interface import WHOLE_RUN, Outcome
from multitask.engines.loss import RestartAllError
from multitask.engines.server_client import SERVER, ServerClient
from multitask.job.job import Job
from multitask.spec.schema import JobSpec
from tests.conftest import store_of
from tests.multitask.engines.fakes import FakeActor, FakeCluster


class FakeCrew:
    """A server with one other shard, whose incarnations a test sets."""

    def __init__(self, job: Job, recovery: Recovery = Recovery.REPLACE) -> None:
        self.job, self.store, self.recovery = job, store_of(job), recovery
        self.cluster = FakeCluster()
        self.cluster.kill = self.kill  # type: ignore[method-assign]
        self.incarnations, self.shard_incarnation = [1, 2], 2
        self.called: list[str] = []
        self.killed: list[Any] = []
        self.server = FakeActor(SimpleNamespace(ping=lambda: list(self.incarnations), call=self.called.append))
        self.shards = [FakeActor(SimpleNamespace(ping=lambda: self.shard_incarnation))]

    def begin(self) -> Any:
        return self.cluster.put(None)

    def kill(self, actor: Any, *, restart: bool = False) -> None:
        assert restart
        self.killed.append(actor)
        self.incarnations = [self.incarnations[0] + 10, self.shard_incarnation]


@pytest.fixture
def job(make_spec: Callable[..., JobSpec]) -> Job:
    return Job(make_spec(engine={"name": "async", "shards": 2}))


def client_of(crew: FakeCrew) -> tuple[ServerClient, Outcome]:
    outcome = Outcome(crew.cluster.clock)
    client = ServerClient(crew, outcome)  # type: ignore[arg-type]
    client.begin()
    return client, outcome


def test_a_server_that_was_started_again_is_noticed_once(job: Job) -> None:
    crew = FakeCrew(job)
    client, outcome = client_of(crew)
    assert not client.watch()
    crew.incarnations = [3, 2]
    assert client.watch()
    assert not client.watch()
    assert len(outcome.recoveries) == 1
    assert not outcome.lost_at
    assert not crew.killed


def test_a_shard_that_was_started_again_takes_the_server_back_with_it(job: Job) -> None:
    crew = FakeCrew(job)
    client, outcome = client_of(crew)
    crew.shard_incarnation = 5
    assert client.watch()
    assert crew.killed == [crew.server]
    assert len(outcome.recoveries) == 1
    assert not client.watch()


def test_a_restored_server_is_told_of_the_pause(job: Job) -> None:
    crew = FakeCrew(job)
    client, _ = client_of(crew)
    client.pause()
    assert client.pausing
    crew.incarnations = [3, 2]
    client.watch()
    assert crew.called == ["pause", "pause"]


def test_under_sync_a_lost_server_takes_all_processes_back(job: Job) -> None:
    crew = FakeCrew(job, Recovery.RESTART_ALL)
    client, outcome = client_of(crew)
    crew.incarnations = [3, 2]
    with pytest.raises(RestartAllError, match=r"^The parameter server was lost\.$"):
        client.watch()
    assert outcome.lost_at.keys() == {WHOLE_RUN}


def test_a_server_that_could_not_be_reached_for_a_while_counts_as_back(job: Job) -> None:
    client, outcome = client_of(FakeCrew(job))
    client.note_loss(SERVER, "The parameter server was lost.")
    assert outcome.lost_at.keys() == {SERVER}
    assert not client.watch()
    assert not outcome.lost_at
