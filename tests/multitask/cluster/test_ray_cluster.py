"""What the cluster by Ray promises beyond Ray, without processes."""

import weakref
from typing import Any

import pytest

from multitask.cluster import ray_cluster
from multitask.cluster.ray_cluster import FETCHING, RayCluster


class Reference:
    """A reference to an object in Ray's store."""


def test_no_thread_receives_a_reference_while_another_lets_go_of_its_last(monkeypatch: pytest.MonkeyPatch) -> None:
    let_go: list[bool] = []
    store: dict[int, Any] = {}

    def reference(to: Any) -> Reference:
        made = Reference()
        weakref.finalize(made, lambda: let_go.append(FETCHING.locked()))
        store[id(made)] = to
        return made

    def get(what: Any) -> Any:
        assert FETCHING.locked()
        return [store[id(one)] for one in what] if isinstance(what, list) else store.pop(id(what))

    monkeypatch.setattr(ray_cluster.ray, "wait", lambda _: None)
    monkeypatch.setattr(ray_cluster.ray, "get", get)
    answer: list[Any] = [
        reference(("the reply", [{"shared": reference("values of the first shard")}, {"shared": reference("second")}]))
    ]

    assert RayCluster().fetch(answer) == ("the reply", [{"shared": "values of the first shard"}, {"shared": "second"}])
    assert let_go == [True] * 3


@pytest.mark.parametrize(("address", "grows"), [(None, False), ("local", False), ("10.0.0.1:6379", True)])
def test_only_a_cluster_that_the_run_joins_may_get_more_nodes(
    monkeypatch: pytest.MonkeyPatch, address: str | None, grows: bool
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert RayCluster().can_grow() == grows
