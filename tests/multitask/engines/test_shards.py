"""The shards of the server other than the first one, without processes."""

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest

from multitask.engines.loss import NotBegunError
from multitask.engines.server_actors import RemoteShards, ShardActor
from multitask.job.job import Job
from multitask.server.shard import GroupUpdate
from multitask.spec.schema import JobSpec
from tests.multitask.engines.fakes import FakeCluster


@pytest.fixture
def job(make_spec: Callable[..., JobSpec]) -> Job:
    return Job(make_spec(engine={"name": "async", "shards": 2}))


def told(shard: ShardActor, lost: int | None) -> RemoteShards:
    """Return the sender of changes to a shard; the call with the number `lost` does not arrive."""

    def follow(number: int, *what: Any) -> None:
        if number != lost:
            shard.follow(number, *what)

    handle = Mock()
    handle.follow.remote = follow
    return RemoteShards([handle])


@pytest.mark.parametrize("lost", [None, 2])
def test_a_shard_that_misses_a_change_is_as_one_that_was_started_again(job: Job, lost: int | None) -> None:
    shard = ShardActor(FakeCluster())
    incarnation = shard.begin(job, 1)
    others = told(shard, lost)
    others.take_snapshot(0, slots=False)
    others.apply({}, [])

    if lost is None:
        others.take_snapshot(1, slots=False)
        assert (shard.ping(), shard.snapshot(1) is not None) == (incarnation, True)
        return
    with pytest.raises(NotBegunError, match="3 of its values came when 2 was next"):
        others.take_snapshot(1, slots=False)
    assert shard.ping() != incarnation
    with pytest.raises(NotBegunError):
        shard.snapshot(0)
    assert shard.begin(job, 1) == shard.ping()
    told(shard, lost=None).take_snapshot(0, slots=False)
    assert shard.snapshot(0) is not None


def test_a_shard_that_cannot_make_a_change_lets_its_values_go(job: Job) -> None:
    shard = ShardActor(FakeCluster())
    incarnation = shard.begin(job, 1)
    update = {job.served()[0].name: GroupUpdate((("pets/0", 0, 0),), (1.0,), 0.1)}

    with pytest.raises(KeyError):
        told(shard, lost=None).apply(update, [])

    assert shard.ping() != incarnation
    with pytest.raises(NotBegunError):
        shard.snapshot(0)
