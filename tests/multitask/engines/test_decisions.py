"""What the driver decides about losses, hanging workers, guests, pauses and the end of a run."""

import pytest

from multitask.engines.decisions import (
    RESTARTS_WITHOUT_A_STEP,
    AfterTrain,
    LossCounter,
    MissingRanks,
    Recovery,
    ServerChange,
    TrainResult,
    WorkerStatus,
    after_train,
    assign_hosts,
    guests_to_place,
    hanging_workers,
    idle_workers,
    is_back,
    is_paused,
    overdue_workers,
    recovery,
    server_change,
    silence_limit_s,
    worker_to_make_room,
    workers_to_confirm,
)

WORKERS = {"pets/0": "pets", "pets/1": "pets", "pets/2": "pets", "cars/0": "cars", "cars/1": "cars"}


# Losses.


def test_a_lost_process_is_replaced_unless_rounds_are_averaged() -> None:
    assert recovery(averages_rounds=False) is Recovery.REPLACE
    assert recovery(averages_rounds=True) is Recovery.RESTART_ALL


def test_losses_without_a_step_in_between_become_too_many() -> None:
    losses = LossCounter()
    counted = [losses.add("pets/0", steps=7) for _ in range(RESTARTS_WITHOUT_A_STEP + 1)]
    assert [loss.count for loss in counted] == [1, 2, 3, 4]
    assert [loss.too_often for loss in counted] == [False, False, False, True]
    assert [loss.steps_before for loss in counted] == [-1, 7, 7, 7]


def test_a_step_between_two_losses_starts_the_count_anew() -> None:
    losses = LossCounter()
    assert [losses.add("pets/0", steps).count for steps in (0, 0, 1, 1, 2)] == [1, 2, 1, 2, 1]


def test_steps_that_a_restored_server_has_forgotten_are_no_steps_made_in_between() -> None:
    losses = LossCounter()
    assert [losses.add("pets/0", steps).count for steps in (9, 4, 4)] == [1, 2, 3]


def test_losses_are_counted_for_each_name() -> None:
    losses = LossCounter()
    assert [losses.add(name, 0).count for name in ("pets/0", "pets/1", "pets/0")] == [1, 1, 2]


@pytest.mark.parametrize(
    ("server", "shards", "change"),
    [
        pytest.param([1, 2, 3], [2, 3], ServerChange.NONE, id="all as before"),
        pytest.param([9, 2, 3], [2, 3], ServerChange.RESTARTED, id="the server began anew"),
        pytest.param([9, 8, 3], [8, 3], ServerChange.RESTARTED, id="the server began anew with a new shard"),
        pytest.param([1, 2, 3], [2, 8], ServerChange.SHARD_RESTARTED, id="a shard began without the server"),
        pytest.param([9, 2, 3], [2, 8], ServerChange.SHARD_RESTARTED, id="a shard began after the restored server"),
    ],
)
def test_a_shard_that_began_without_the_server_takes_the_server_back(
    server: list[int], shards: list[int], change: ServerChange
) -> None:
    assert server_change([1, 2, 3], server, shards) is change


def test_a_server_without_other_shards_is_compared_too() -> None:
    assert server_change([1], [1], []) is ServerChange.NONE
    assert server_change([1], [2], []) is ServerChange.RESTARTED


# Workers.


def test_a_lost_worker_is_back_with_a_step_of_another_process() -> None:
    """The driver may hear of the last steps of the lost process later."""
    assert is_back(WorkerStatus(), pid=11)
    assert not is_back(WorkerStatus(pid=11, lost_pid=11), pid=11)
    assert is_back(WorkerStatus(pid=11, lost_pid=11), pid=12)


def test_workers_confirm_their_last_step_when_they_have_made_it_and_the_server_was_restored() -> None:
    workers = {
        "trains": WorkerStatus(confirm_again=True),
        "has trained": WorkerStatus(trained=True),
        "may be unknown": WorkerStatus(trained=True, confirm_again=True),
    }
    assert workers_to_confirm(workers) == ["may be unknown"]


def test_idle_workers_have_made_their_last_step_and_have_no_call() -> None:
    workers = {"trains": WorkerStatus(), "busy": WorkerStatus(trained=True), "idle": WorkerStatus(trained=True)}
    assert idle_workers(workers, workers, busy={"trains", "busy"}) == ["idle"]
    assert idle_workers(["busy"], workers, busy={"busy"}) == []


def test_workers_that_share_a_process_may_be_silent_for_a_turn_of_each() -> None:
    assert silence_limit_s(["a", "b"], step_timeout_s=10) == 10
    assert silence_limit_s(["a", "b", "a", "a"], step_timeout_s=10) == 30


def test_a_silent_worker_that_is_lost_already_does_not_hang() -> None:
    assert hanging_workers(["pets/0", "cars/0"], lost={"pets/0": 1.0, "server": 2.0}) == ["cars/0"]


def test_a_lost_worker_is_overdue_when_its_time_to_start_is_over() -> None:
    lost_at = {"pets/0": 0.0, "pets/1": 50.0, "server": 0.0}
    assert overdue_workers(WORKERS, lost_at, now=60.0, timeout_s=60) == []
    assert overdue_workers(WORKERS, lost_at, now=61.0, timeout_s=60) == ["pets/0"]


# Guests.


def test_guests_are_dealt_out_to_the_workers_of_their_task_that_have_a_process() -> None:
    assert assign_hosts(WORKERS, {"pets": 1, "cars": 2}) == {"pets/1": "pets/0", "pets/2": "pets/0"}
    assert assign_hosts(WORKERS, {"pets": 2, "cars": 1}) == {"pets/2": "pets/0", "cars/1": "cars/0"}


def test_no_guest_is_placed_while_something_is_lost_or_the_run_pauses() -> None:
    assert guests_to_place({"pets/1"}, any_lost=False, pausing=False) == {"pets/1"}
    assert not guests_to_place({"pets/1"}, any_lost=True, pausing=False)
    assert not guests_to_place({"pets/1"}, any_lost=False, pausing=True)


@pytest.mark.parametrize(
    ("lost", "grown", "room"),
    [
        pytest.param(["pets/0"], {}, [], id="nobody can make room"),
        pytest.param(["pets/0"], {"cars/1": "a"}, ["cars/1"], id="a worker of another task"),
        pytest.param(["pets/0"], {"pets/1": "a", "cars/1": "a"}, ["pets/1"], id="the same task is preferred"),
        pytest.param(["pets/0"], {"cars/1": "dead"}, [], id="a dead node gives no room"),
        pytest.param(["pets/0", "pets/1"], {"pets/1": "a"}, [], id="the lost worker itself"),
    ],
)
def test_a_worker_that_can_be_a_guest_makes_room_for_a_needed_one(
    lost: list[str], grown: dict[str, str], room: list[str]
) -> None:
    assert worker_to_make_room(lost, grown, {"a", "b"}, WORKERS) == room


# The end of a run.


def test_a_run_is_paused_when_a_worker_has_steps_left() -> None:
    assert is_paused([4, 3], steps=4)
    assert not is_paused([4, 4], steps=4)


# Engine `allreduce`.


def test_ranks_are_missing_since_the_first_of_them_went() -> None:
    start = MissingRanks(("pets/0", "cars/0"), 5.0)
    assert start.seconds(7.0) == 2.0
    one = start.updated(["pets/0", "cars/0"], {"cars/0"}, now=8.0)
    assert one == MissingRanks(("pets/0",), 5.0)
    none = one.updated(["pets/0", "cars/0"], {"pets/0", "cars/0"}, now=9.0)
    assert none == MissingRanks((), None)
    assert none.seconds(99.0) == 0.0
    assert none.updated(["pets/0", "cars/0"], {"pets/0"}, now=20.0) == MissingRanks(("cars/0",), 20.0)


@pytest.mark.parametrize(
    ("result", "all_reported", "missing_s", "expected"),
    [
        pytest.param(TrainResult.RETURNED, True, 0.0, AfterTrain.END, id="all ranks have done their work"),
        pytest.param(TrainResult.RETURNED, False, 0.0, AfterTrain.START_AGAIN, id="the ledger was lost at the end"),
        pytest.param(TrainResult.LOST, True, 0.0, AfterTrain.START_AGAIN, id="Train was lost"),
        pytest.param(TrainResult.LOST, False, 99.0, AfterTrain.START_AGAIN, id="Train was lost while ranks started"),
        pytest.param(TrainResult.NOT_STARTED, False, 59.0, AfterTrain.START_AGAIN, id="lost while they started"),
        pytest.param(TrainResult.NOT_STARTED, False, 61.0, AfterTrain.NO_PLACES, id="no places in time"),
        pytest.param(TrainResult.RAISED, False, 61.0, AfterTrain.FAIL, id="Train raised"),
    ],
)
def test_when_train_has_ended_the_run_ends_only_with_everything_reported(
    result: TrainResult, all_reported: bool, missing_s: float, expected: AfterTrain
) -> None:
    found = after_train(result, all_reported=all_reported, missing_s=missing_s, start_timeout_s=60)
    assert found is expected
