"""Tests of when a snapshot is due. What is asked and handed out is tested with the whole server."""

from fractions import Fraction
from typing import Any

import pytest

from multitask.server.messages import SnapshotRequest
from multitask.server.progress import Progress, WorkerProgress
from multitask.server.rules import Rules
from multitask.server.snapshots import Snapshots


def snapshots_of(progress: Progress, **rules: Any) -> Snapshots:
    progress.workers |= {"a/0": WorkerProgress()}
    return Snapshots({"a"}, {"a/0": "a"}, Rules(**{"evaluate_every_rounds": 100, **rules}), progress, 7, now=50.0)


@pytest.mark.parametrize(
    ("before", "rounds", "due"),
    [
        (Fraction(1, 2), Fraction(1), (False, False)),
        (Fraction(3, 2), Fraction(2), (True, False)),
        (Fraction(2), Fraction(5, 2), (False, False)),
        (Fraction(5, 2), Fraction(3), (False, True)),
        (Fraction(5), Fraction(6), (True, True)),
        (Fraction(1), Fraction(8), (True, True)),
    ],
)
def test_snapshots_are_due_when_a_multiple_of_their_rounds_is_passed(
    before: Fraction, rounds: Fraction, due: tuple[bool, bool]
) -> None:
    snapshots = snapshots_of(Progress(rounds=rounds), evaluate_every_rounds=2, save_every_rounds=3)

    assert snapshots.due(before, now=1000.0) == due


def test_seconds_are_counted_from_the_latest_checkpoint() -> None:
    progress = Progress(version=1)
    snapshots = snapshots_of(progress, save_every_s=10.0)
    assert [snapshots.due(Fraction(0), now)[1] for now in (60.0, 60.5)] == [False, True]

    request = snapshots.take(evaluate=False, save=True, now=60.5)

    assert request == SnapshotRequest(1, evaluate=False, save=True, server_incarnation=7)
    snapshots.report_state(request, "a/0", 1, 8, {})
    assert [snapshots.due(Fraction(0), now)[1] for now in (70.5, 71.0)] == [False, True]


def test_no_checkpoint_is_due_while_an_earlier_one_waits_for_reports() -> None:
    progress = Progress(version=1, rounds=Fraction(2))
    snapshots = snapshots_of(progress, save_every_rounds=1, save_every_s=10.0)
    request = snapshots.take(evaluate=False, save=True, now=50.0)
    assert request is not None
    assert snapshots.due(Fraction(1), now=1000.0) == (False, False)

    snapshots.report_state(request, "a/0", 1, 8, {})

    assert snapshots.due(Fraction(1), now=1000.0) == (False, True)


def test_a_version_is_taken_once_for_each_reason_and_asked_for_in_one_request() -> None:
    snapshots = snapshots_of(Progress(version=4))

    reasons = [(True, False), (True, False), (True, True), (False, True)]
    new = [snapshots.take(evaluate=evaluate, save=save, now=0.0) for evaluate, save in reasons]

    assert [request and (request.evaluate, request.save) for request in new] == [
        (True, False),
        None,
        (False, True),
        None,
    ]
    assert snapshots.requests("a/0") == (SnapshotRequest(4, evaluate=True, save=True, server_incarnation=7),)


def test_a_version_is_needed_until_it_is_handed_out() -> None:
    snapshots = snapshots_of(Progress(version=4))
    request = snapshots.take(evaluate=False, save=True, now=0.0)
    assert request is not None
    assert snapshots.needs(4)
    snapshots.report_state(request, "a/0", 1, 8, {})
    assert snapshots.needs(4)

    assert snapshots.drain().keys() == {4}

    assert not snapshots.needs(4)
