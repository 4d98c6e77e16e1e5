from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multitask.data import ImageTable, open_table, write_table
from multitask.data.shared import SharedStream
from multitask.data.stream import Drawn, TrainStream
from tests.multitask.data.tables import png

SIZES = {"a": 8, "b": 12, "c": 8, "d": 20}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    """30 images of random pixels in two sizes, of which three cannot be decoded."""
    random = np.random.default_rng(0)
    images = [png(random.integers(0, 256, (24, 24 + i % 2, 3), dtype=np.uint8)) for i in range(30)]
    path = tmp_path_factory.mktemp("photos") / "train"
    rows = ((b"no image" if i % 10 == 4 else image, i % 2) for i, image in enumerate(images))
    write_table(path, rows, ["a", "b"], rows_per_shard=7)
    return open_table(path)


def make_stream(table: ImageTable, start: int) -> TrainStream:
    return TrainStream(table, batch_size=4, seed=5, augment="crop_flip", undecodable="skip", window=8, start=start)


def alone(table: ImageTable, resolution: int, batches: int) -> list[Drawn]:
    stream = make_stream(table, 0)
    return [stream.draw([resolution]) for _ in range(batches)]


def equal(first: Drawn, second: Drawn) -> bool:
    return (
        first.pixels.keys() == second.pixels.keys()
        and all(np.array_equal(first.pixels[size], second.pixels[size]) for size in first.pixels)
        and np.array_equal(first.labels, second.labels)
        and (first.skipped, first.position) == (second.skipped, second.position)
    )


@settings(max_examples=25)
@given(turns=st.lists(st.sampled_from(list(SIZES)), max_size=60), ahead=st.integers(0, 5))
def test_each_reader_gets_what_a_stream_of_its_own_would_give_in_any_order_of_turns(
    photos: ImageTable, turns: list[str], ahead: int
) -> None:
    shared = SharedStream(partial(make_stream, photos), SIZES, ahead)
    got: dict[str, list[Drawn]] = {reader: [] for reader in SIZES}
    for reader in turns:
        got[reader].append(shared.next(reader))
    for reader, batches in got.items():
        expected = alone(photos, SIZES[reader], len(batches))
        assert all(equal(*pair) for pair in zip(batches, expected, strict=True))


def test_readers_that_keep_pace_share_every_decode(photos: ImageTable) -> None:
    shared = SharedStream(partial(make_stream, photos), SIZES)
    for _ in range(20):
        for reader in SIZES:
            shared.next(reader)
    assert shared.decoded == 20
    for reader in ("b", "d", "a", "c") * 10:
        shared.next(reader)
    assert shared.decoded == 30


def test_streams_are_opened_once_where_readers_take_the_lead_in_turn(photos: ImageTable) -> None:
    opened: list[int] = []

    def make(start: int) -> TrainStream:
        opened.append(start)
        return make_stream(photos, start)

    shared = SharedStream(make, SIZES)
    for step in range(20):
        for reader in np.roll(list(SIZES), step):
            shared.next(str(reader))
    assert opened == [0]


def test_a_reader_far_ahead_waits_for_nobody_and_keeps_memory_bounded(photos: ImageTable) -> None:
    shared = SharedStream(partial(make_stream, photos), {"fast": 8, "slow": 12}, ahead=3)
    for _ in range(10):
        shared.next("fast")
    assert shared.decoded == 10
    for _ in range(10):
        shared.next("slow")
    # Three were kept for the slow one; the other seven it decoded itself.
    assert shared.decoded == 17


def test_a_reader_goes_on_where_it_is_told_to(photos: ImageTable) -> None:
    shared = SharedStream(partial(make_stream, photos), SIZES)
    expected = alone(photos, 8, 6)
    shared.seek("a", expected[2].position)
    assert [equal(shared.next("a"), batch) for batch in expected[3:]] == [True] * 3
    assert equal(shared.next("c"), expected[0])


def test_threads_that_decode_change_no_value(photos: ImageTable) -> None:
    one, many = (
        TrainStream(photos, batch_size=11, seed=0, augment="crop_flip", undecodable="skip", threads=threads)
        for threads in (1, 3)
    )
    assert all(equal(one.draw([8, 16]), many.draw([8, 16])) for _ in range(6))
