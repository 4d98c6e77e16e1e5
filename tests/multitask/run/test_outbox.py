"""Records that wait for MLflow on disk, and the thread that sends them."""

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from multitask.run.outbox import OUTBOX, Outbox, Sender
from multitask.run.records import Artifact, End, Lost, Metrics, Open, Record, Tag, Text, from_line, to_line


def tag(number: int) -> Tag:
    return Tag(task=None, name="number", value=str(number))


def taken(outbox: Outbox) -> list[Record]:
    """Take and send everything, part by part."""
    found: list[Record] = []
    while (part := outbox.take()) is not None:
        records, place = part
        found += records
        outbox.sent(place)
    return found


@pytest.mark.parametrize(
    "record",
    [
        Metrics(task="pets", points=[("loss", 0.1, 1_700_000_000_000, 3), ("loss", None, 1_700_000_000_001, 4)]),
        Tag(task=None, name="a", value="ä\n"),
        Text(name="spec.yaml", text="a: 1\n"),
        Artifact(task=None, path="result.json"),
        Open(tasks=["pets"], time_ms=1),
        End(status="KILLED", time_ms=2),
        Lost(run_id="f00d"),
    ],
)
def test_a_record_comes_back_from_its_line(record: Record) -> None:
    line = to_line(record)
    assert line.count(b"\n") == 1
    assert from_line(line) == record


def test_records_wait_in_order_and_the_file_goes_with_the_last_one(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / OUTBOX)
    assert outbox.take() is None
    assert not outbox.path.exists()

    outbox.add(tag(0), tag(1))
    outbox.add(tag(2))

    assert outbox.waiting() == 3
    assert taken(Outbox(outbox.path)) == [tag(0), tag(1), tag(2)]
    assert list(tmp_path.iterdir()) == []


def test_what_is_added_while_others_are_sent_stays_and_the_file_does_not_grow_for_ever(tmp_path: Path) -> None:
    outbox, found = Outbox(tmp_path / OUTBOX), []
    outbox.add(tag(0))
    for number in range(1, 200):
        part = outbox.take()
        assert part is not None
        outbox.add(tag(number))
        found += part[0]
        outbox.sent(part[1])
        assert outbox.path.stat().st_size < 4 * len(to_line(tag(999)))
    assert found + taken(outbox) == [tag(number) for number in range(200)]


def test_what_was_not_sent_is_sent_again(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / OUTBOX)
    outbox.add(tag(0))
    first = outbox.take()
    assert first == outbox.take()
    outbox.close()
    assert first is not None
    outbox.sent(first[1])  # too late: the file may belong to another process
    assert taken(Outbox(outbox.path)) == [tag(0)]


@pytest.mark.parametrize("damage", [b"\x00\xff", b"[" * 100_000, b'{"kind": "tag"}', b'{"kind": "other"}', b"7"])
def test_a_damaged_line_costs_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes) -> None:
    path = tmp_path / OUTBOX
    path.write_bytes(to_line(tag(0)) + damage + b"\n" + to_line(tag(1)) + to_line(tag(2))[:9])
    outbox = Outbox(path)
    outbox.add(tag(3))  # behind the half line of a killed process

    with caplog.at_level(logging.WARNING):
        assert taken(outbox) == [tag(0), tag(1), tag(3)]

    assert [str(path) in record.getMessage() for record in caplog.records] == [True, True]
    assert max(len(record.getMessage()) for record in caplog.records) < 500
    assert not path.exists()


def test_what_cannot_be_written_is_kept_until_it_can(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "later" / OUTBOX)
    outbox.add(tag(0))
    assert outbox.waiting() == 1
    (tmp_path / "later").mkdir()
    outbox.add(tag(1))
    assert taken(Outbox(outbox.path)) == [tag(0), tag(1)]


class Store:
    """Takes records, except while it is down."""

    def __init__(self) -> None:
        self.down = False
        self.records: list[Record] = []

    def send(self, records: Sequence[Record]) -> None:
        if self.down:
            raise ConnectionError("nobody\nanswers")
        self.records += records


def test_a_store_that_was_away_gets_everything_once_and_in_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outbox, store = Outbox(tmp_path / OUTBOX), Store()
    sender = Sender(outbox, store.send)
    sender.start()
    outbox.add(tag(0))
    assert sender.flush(60) is None
    store.down = True
    outbox.add(tag(1), tag(2))
    trouble = sender.flush(60)
    assert isinstance(trouble, ConnectionError)
    assert outbox.waiting() == 2
    with caplog.at_level(logging.WARNING):
        sender.warn(trouble)
        sender.warn(trouble)
        store.down = False
        outbox.add(tag(3))
        assert sender.settle(60, 0) is None
    sender.stop()

    assert store.records == [tag(0), tag(1), tag(2), tag(3)]
    said = [record.getMessage() for record in caplog.records]
    assert [
        f"cannot be reached (nobody answers). Training does not wait for it: the records are kept in {outbox.path}"
        in said[0],
        "again" in said[1],
        len(said),
    ] == [True, True, 2]


def test_a_store_that_hangs_holds_nobody_up(tmp_path: Path) -> None:
    outbox, goes_on = Outbox(tmp_path / OUTBOX), threading.Event()

    def send(_: Sequence[Record]) -> None:
        goes_on.wait(60)

    sender = Sender(outbox, send)
    sender.start()
    outbox.add(tag(0))

    trouble = sender.settle(0.05, 0)
    sender.stop()

    assert isinstance(trouble, TimeoutError)
    assert outbox.waiting() == 1
    goes_on.set()
