"""What is left of a group of ranks when its process is gone, without Ray."""

import pytest

from multitask.cluster import ray_ranks
from multitask.cluster.ray_ranks import TrainRun

KEY = "multitask/places/one"


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """What the store of the cluster's head has; nobody waits for a process that ends."""
    store = {KEY: b"\x01" * 18}
    monkeypatch.setattr(ray_ranks, "_internal_kv_exists", store.__contains__)
    monkeypatch.setattr(ray_ranks, "_internal_kv_get", store.get)
    monkeypatch.setattr(ray_ranks, "_internal_kv_del", store.pop)
    monkeypatch.setattr(ray_ranks.time, "sleep", lambda _: None)
    return store


@pytest.fixture
def given_back(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    groups: list[bytes] = []
    monkeypatch.setattr(ray_ranks, "remove_placement_group", lambda group: groups.append(group.id.binary()))
    return groups


def test_places_that_a_lost_process_left_are_given_back_once(kept: dict[str, bytes], given_back: list[bytes]) -> None:
    run = TrainRun(None, KEY)
    places = kept[KEY]

    run.release()
    run.release()

    assert given_back == [places]
    assert kept == {}


def test_a_process_that_ends_late_gives_its_places_back_itself(
    kept: dict[str, bytes], given_back: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_ranks.time, "sleep", lambda _: kept.clear())

    TrainRun(None, KEY).release()

    assert given_back == []
