"""The parameter server as a worker in another process sees it, without processes."""

from collections.abc import Callable
from types import SimpleNamespace

from multitask.engines.remote import RemoteServer
from multitask.job.job import Job
from multitask.spec.schema import JobSpec
from tests.multitask.engines.fakes import FakeActor, FakeCluster


def test_the_values_of_a_group_are_its_ranges_in_the_order_of_the_shards(make_spec: Callable[..., JobSpec]) -> None:
    cluster = FakeCluster()
    shards = [{"shared": cluster.put(values), "private": cluster.put(values.upper())} for values in ("first", "second")]
    server = FakeActor(SimpleNamespace(pull=lambda worker: (f"reply to {worker}", shards)))
    remote = RemoteServer(cluster, Job(make_spec(engine={"name": "async"})), "pets/0", 0, server, [])

    assert remote.pull("pets/0") == (
        "reply to pets/0",
        {"shared": ["first", "second"], "private": ["FIRST", "SECOND"]},
    )
