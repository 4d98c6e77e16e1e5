import logging
import pickle
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multitask.data import (
    Batch,
    DataError,
    ImageTable,
    TrainBatches,
    eval_batches,
    open_table,
    prefetch,
    write_table,
)
from multitask.data.order import EpochOrder
from multitask.data.windows import WindowReader
from tests.multitask.data.tables import PLAIN, number_image, numbered_table, numbers, png

CHANGES = ["crop_flip", "color_jitter", "rand_augment"]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[int, ImageTable]:
    root = tmp_path_factory.mktemp("tables")
    return {rows: numbered_table(root / str(rows), rows) for rows in (1, 2, 3, 7, 10, 16)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    """12 images of random pixels in two sizes."""
    random = np.random.default_rng(0)
    images = [png(random.integers(0, 256, (20, 20 + i % 2, 3), dtype=np.uint8)) for i in range(12)]
    path = tmp_path_factory.mktemp("photos") / "train"
    write_table(path, ((image, i % 2) for i, image in enumerate(images)), ["a", "b"])
    return open_table(path)


def train(table: ImageTable, **options: Any) -> TrainBatches:
    return TrainBatches(table, **{**PLAIN, "batch_size": 4, "seed": 0, **options})


def take_rows(batches: TrainBatches, count: int) -> list[int]:
    """At least `count` row numbers of a `numbered_table`, in order."""
    rows: list[int] = []
    while len(rows) < count:
        rows += numbers(next(batches).images())
    return rows


def equal(first: Batch, second: Batch) -> bool:
    return (
        torch.equal(first.images(), second.images())
        and torch.equal(first.labels, second.labels)
        and first.skipped == second.skipped
    )


layouts = st.sampled_from([1, 2, 3, 7, 10, 16]).flatmap(
    lambda rows: st.tuples(st.just(rows), st.integers(1, min(rows, 5)))
)


@settings(max_examples=40)
@given(layout=layouts, batch_size=st.integers(1, 20), epochs=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_each_epoch_gives_every_row_to_one_worker_once(
    tables: dict[int, ImageTable], layout: tuple[int, int], batch_size: int, epochs: int, seed: int
) -> None:
    rows, workers = layout
    seen: list[list[int]] = [[] for _ in range(epochs)]
    for rank in range(workers):
        batches = train(tables[rows], batch_size=batch_size, seed=seed, rank=rank, workers=workers)
        share = batches.rows_per_epoch
        stream = take_rows(batches, share * epochs)
        assert len(stream) % batch_size == 0
        assert batches.position == len(stream)
        for epoch in range(epochs):
            seen[epoch] += stream[epoch * share : (epoch + 1) * share]
    assert [Counter(epoch) for epoch in seen] == [Counter(range(rows))] * epochs


@settings(max_examples=25)
@given(
    layout=layouts,
    batch_size=st.integers(1, 9),
    steps=st.integers(0, 6),
    seed=st.integers(0, 2**32),
    changes=st.sampled_from([{}, {"augment": "crop_flip"}, {"augment": CHANGES, "sampling": "balanced"}]),
)
def test_a_stream_goes_on_from_its_position_bit_for_bit(
    tables: dict[int, ImageTable],
    layout: tuple[int, int],
    batch_size: int,
    steps: int,
    seed: int,
    changes: dict[str, Any],
) -> None:
    rows, workers = layout
    options = {"batch_size": batch_size, "seed": seed, "rank": workers - 1, "workers": workers, **changes}
    whole = train(tables[rows], **options)
    for _ in range(steps):
        next(whole)
    again = train(tables[rows], **options, start=whole.position)
    assert all(equal(next(whole), next(again)) for _ in range(4))
    assert again.position == whole.position


def test_any_row_is_a_place_to_start(tables: dict[int, ImageTable]) -> None:
    stream = take_rows(train(tables[7], batch_size=1), 20)
    for start in range(13):
        assert take_rows(train(tables[7], batch_size=3, start=start), 3)[:3] == stream[start : start + 3]


def test_epochs_and_seeds_shuffle_differently(tables: dict[int, ImageTable]) -> None:
    stream = take_rows(train(tables[16]), 32)
    other = take_rows(train(tables[16], seed=1), 16)
    orders = [tuple(stream[:16]), tuple(stream[16:]), tuple(other), tuple(range(16))]
    assert len(set(orders)) == 4


def test_labels_belong_to_their_images(tables: dict[int, ImageTable]) -> None:
    batch = next(train(tables[16], batch_size=40))
    assert batch.images().shape == (40, 3, 2, 2)
    assert batch.images().dtype == torch.float32
    assert batch.labels.dtype == torch.int64
    assert batch.labels.tolist() == [number % 2 for number in numbers(batch.images())]


@pytest.mark.parametrize("augment", ["none", CHANGES])
def test_a_seed_fixes_every_batch_and_the_global_random_state_stays(photos: ImageTable, augment: str) -> None:
    torch_state, numpy_state = torch.get_rng_state(), pickle.dumps(np.random.get_state())
    first, second = (train(photos, augment=augment, resolution=8, batch_size=5) for _ in range(2))
    next(first)
    torch.rand(3)
    np.random.rand(3)
    next(second)
    torch.set_rng_state(torch_state)
    np.random.set_state(pickle.loads(numpy_state))
    assert all(equal(next(first), next(second)) for _ in range(5))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert pickle.dumps(np.random.get_state()) == numpy_state


def test_augmentation_follows_seed_epoch_and_row_and_not_the_worker_or_the_batch(photos: ImageTable) -> None:
    def crops(seed: int, batch_size: int, workers: int) -> list[list[bytes]]:
        """For each of two epochs the augmented images, sorted."""
        epochs: list[list[bytes]] = [[], []]
        for rank in range(workers):
            options = {"seed": seed, "batch_size": batch_size, "rank": rank, "workers": workers}
            batches = train(photos, augment=CHANGES, resolution=8, **options)
            share = batches.rows_per_epoch
            images = torch.cat([batch.images() for batch in islice(batches, -(-2 * share // batch_size))])
            for epoch in range(2):
                epochs[epoch] += [image.numpy().tobytes() for image in images[epoch * share :][:share]]
        return [sorted(epoch) for epoch in epochs]

    assert crops(0, 5, 1) == crops(0, 7, 3)
    assert not set(crops(0, 5, 1)[0]) & set(crops(0, 5, 1)[1])
    assert not set(crops(0, 5, 1)[0]) & set(crops(1, 5, 1)[0])


def test_an_image_that_is_read_again_in_an_epoch_is_changed_in_another_way(tmp_path: Path) -> None:
    """One class has a single image among nine, so that balanced classes read it four or five times in an epoch."""
    random = np.random.default_rng(0)
    images = ((png(random.integers(0, 256, (20, 20, 3), dtype=np.uint8)), int(row == 3)) for row in range(9))
    write_table(tmp_path / "train", images, ["many", "one"], rows_per_shard=4)
    table = open_table(tmp_path / "train")

    batch = next(train(table, batch_size=9, augment="crop_flip", sampling="balanced", resolution=8))

    assert batch.rows is not None
    again = batch.images()[batch.rows == 3]
    assert len(again) in (4, 5)
    assert len({image.numpy().tobytes() for image in again}) == len(again)
    first = np.flatnonzero(next(train(table, batch_size=9, augment="crop_flip", resolution=8)).rows == 3)
    natural = next(train(table, batch_size=9, augment="crop_flip", resolution=8)).images()[first]
    assert any(torch.equal(image, natural[0]) for image in again), "the first reading has the draw of (epoch, row)"


def test_a_bad_image_that_is_read_often_is_named_once_and_counted_each_time(tmp_path: Path) -> None:
    images = ((b"no image" if row == 11 else number_image(row), int(row >= 10)) for row in range(12))
    write_table(tmp_path / "few", images, ["many", "two"])
    batches = train(open_table(tmp_path / "few"), batch_size=4, sampling="balanced", undecodable="skip")
    taken = []
    while batches.position < 5 * 12:
        taken.append(next(batches))
    # Each of the two rows of the second class comes three times in an epoch.
    assert sum(batch.skipped for batch in taken) == pytest.approx(15, abs=3)
    named = [bad for batch in taken for bad in batch.bad_images]
    assert len([bad for bad in named if "few/shard-00000.parquet, row 11" in bad]) == 1


def test_a_row_is_found_without_reading_it(tmp_path: Path) -> None:
    """As a batch of stored features needs it; also where classes are balanced."""
    table = numbered_table(tmp_path / "train", 10, classes=3)
    order = EpochOrder(table.group_rows, seed=0, window=4, labels=np.array([0] * 8 + [1, 2]))
    reader, other = WindowReader(table, order), WindowReader(table, order)
    places = [order.place(position) for position in range(25)]
    assert [reader.table_row(*place) for place in places] == [other.row(*place).row for place in places]


def test_evaluation_reads_all_rows_in_order_and_ends_with_a_short_batch(tables: dict[int, ImageTable]) -> None:
    batches = list(eval_batches(tables[10], batch_size=4, **PLAIN))
    assert [len(batch.labels) for batch in batches] == [4, 4, 2]
    assert [n for batch in batches for n in numbers(batch.images())] == list(range(10))
    assert [n for batch in batches for n in batch.labels.tolist()] == [0, 1] * 5
    assert len(list(eval_batches(tables[10], batch_size=5, **PLAIN))) == 2


def test_training_and_evaluation_make_the_same_tensor_of_an_image(photos: ImageTable) -> None:
    options = {"resolution": 16, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "batch_size": 12}
    trained, evaluated = next(train(photos, **options)), next(eval_batches(photos, **options))
    assert not torch.equal(trained.images(), evaluated.images()), "the training batch should be in another order"
    assert {image.numpy().tobytes() for image in trained.images()} == {
        image.numpy().tobytes() for image in evaluated.images()
    }


def test_an_undecodable_image_fails_by_default_with_its_file_and_row(tmp_path: Path) -> None:
    table = numbered_table(tmp_path / "train", 9, bad=(7,))
    message = r"train/shard-00001\.parquet, row 2: found an image that cannot be decoded .* undecodable='skip'"
    with pytest.raises(DataError, match=message) as caught:
        take_rows(train(table), 9)
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), DataError)
    with pytest.raises(DataError, match=message):
        list(eval_batches(table, batch_size=4, **PLAIN))


def test_skipped_images_are_counted_named_and_replaced_by_the_next_row(tmp_path: Path) -> None:
    table = numbered_table(tmp_path / "train", 9, bad=(1, 7))
    batches = train(table, undecodable="skip")
    # 9 epochs of 7 good rows fill 63 of 64 places; 9 epochs hold 18 bad rows.
    taken = list(islice(batches, 16))
    rows = [n for batch in taken for n in numbers(batch.images())]
    epochs, place = divmod(batches.position, 9)
    assert {len(batch.labels) for batch in taken} == {4}
    assert epochs == 9
    assert place in (1, 2, 3)
    assert Counter(rows[:63]) == Counter(dict.fromkeys((0, 2, 3, 4, 5, 6, 8), 9))
    assert sum(batch.skipped for batch in taken) == batches.position - 64
    # Counted each time, named once.
    named = [bad.split(":")[0] for batch in taken for bad in batch.bad_images if "tenth" not in bad]
    assert sorted(named) == [table.source(row) for row in (1, 7)]
    resumed = train(table, undecodable="skip", start=batches.position)
    assert all(equal(next(batches), next(resumed)) for _ in range(5))


@pytest.mark.parametrize(
    ("bad", "rows", "skipped"),
    [
        ((1, 7), [[0, 2, 3, 4], [5, 6, 8]], [1, 1]),
        ((8,), [[0, 1, 2, 3], [4, 5, 6, 7]], [0, 1]),
        ((4, 5, 6, 7, 8), [[0, 1, 2, 3]], [5]),
        ((0, 1, 2, 3, 4), [[5, 6, 7, 8]], [5]),
    ],
)
def test_evaluation_counts_each_skipped_image_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bad: tuple[int, ...], rows: list[list[int]], skipped: list[int]
) -> None:
    table = numbered_table(tmp_path / "train", 9, bad=bad)
    with caplog.at_level(logging.WARNING):
        batches = list(eval_batches(table, batch_size=4, undecodable="skip", **PLAIN))
    named = [message.split(":")[0] for message in caplog.messages if "tenth" not in message]
    assert named == [f"Skipped {table.source(row)}" for row in bad]
    assert [numbers(batch.images()) for batch in batches] == rows
    assert [batch.skipped for batch in batches] == skipped


@pytest.mark.parametrize("workers", [1, 3])
def test_one_percent_of_corrupt_images_is_counted_exactly(tmp_path: Path, workers: int) -> None:
    bad = tuple(range(17, 1000, 100))
    table = numbered_table(tmp_path / "train", 1000, bad=bad, shard=120)
    skipped, seen = 0, Counter[int]()
    for rank in range(workers):
        batches = train(table, undecodable="skip", batch_size=1, rank=rank, workers=workers, window=64)
        while batches.position < batches.rows_per_epoch:
            batch = next(batches)
            # A bad row at the end of the epoch is counted with the first batch of the next one.
            beyond = batches.position - batches.rows_per_epoch
            skipped += batch.skipped - max(0, beyond - 1)
            seen.update(numbers(batch.images()) if beyond <= 0 else [])
    assert skipped == len(bad)
    assert seen == Counter(set(range(1000)) - set(bad))
    assert sum(b.skipped for b in eval_batches(table, **PLAIN, batch_size=64, undecodable="skip")) == len(bad)


def test_prefetched_batches_are_the_same(photos: ImageTable) -> None:
    ahead = prefetch(train(photos, resolution=8), depth=3)
    plain = train(photos, resolution=8)
    assert all(equal(next(ahead), next(plain)) for _ in range(9))
    ahead.close()
    assert [len(batch.labels) for batch in prefetch(eval_batches(photos, **PLAIN, batch_size=5))] == [5, 5, 2]


def test_readers_in_the_background_leave_torchs_threads_alone(photos: ImageTable) -> None:
    torch.set_num_threads(2)
    next(prefetch(train(photos, threads=3)))
    assert torch.get_num_threads() == 2


def test_an_error_in_the_background_reaches_the_reader(tmp_path: Path) -> None:
    table = numbered_table(tmp_path / "train", 9, bad=(7,))
    with pytest.raises(DataError, match="cannot be decoded"):
        list(islice(prefetch(train(table)), 9))


def test_at_most_two_windows_of_encoded_images_are_in_memory(tmp_path: Path) -> None:
    held = []
    for rows in (40, 400):
        # 1 MiB images that do not compress, eight to a row group.
        images = [np.random.default_rng(row).bytes(1 << 20) for row in range(8)]
        path = tmp_path / str(rows)
        write_table(path, ((number_image(i) + images[i % 8], 0) for i in range(rows)), ["x"], rows_per_shard=50)
        batches, before, peak = train(open_table(path), window=20, batch_size=4), pa.total_allocated_bytes(), 0
        for _ in range(rows // 4):
            next(batches)
            peak = max(peak, pa.total_allocated_bytes() - before)
        held.append(peak / (1 << 20))
    # Two windows of 20 rows, and the groups of up to 8 rows at their ends.
    assert max(held) <= 2 * (20 + 4 * 8) * 1.05
    assert held[1] <= held[0] * 1.5


def test_a_table_without_a_decodable_image_ends_with_an_error(tmp_path: Path) -> None:
    table = numbered_table(tmp_path / "train", 4, bad=(0, 1, 2, 3))
    with pytest.raises(DataError, match="found no image that can be decoded in 4 rows"):
        next(train(table, undecodable="skip", start=3))
    with pytest.raises(DataError, match="found no image that can be decoded in 4 rows"):
        list(eval_batches(table, batch_size=4, undecodable="skip", **PLAIN))


def test_a_class_that_loses_more_than_a_tenth_of_its_images_is_named_once(tmp_path: Path) -> None:
    table = numbered_table(tmp_path / "train", 40, bad=(1, 3, 5, 0, 2))
    batches = train(table, undecodable="skip", batch_size=8)
    named = [bad for batch in islice(batches, 15) for bad in batch.bad_images if "tenth" in bad]
    message = f"more than a tenth of class '{{}}': 3 of its 20 images cannot be decoded so far ({table.uri})"
    assert named == [message.format("class 1")]


def test_evaluation_warns_of_a_class_that_loses_its_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = numbered_table(tmp_path / "test", 20, bad=tuple(range(1, 20, 2)))
    with caplog.at_level(logging.WARNING):
        assert len(list(eval_batches(table, batch_size=20, undecodable="skip", **PLAIN))) == 1
    assert sum("more than a tenth of class 'class 1': 10 of its 10 images" in text for text in caplog.messages) == 1


@pytest.mark.parametrize("workers", [1, 3])
def test_training_ends_when_no_image_of_a_class_can_be_decoded(tmp_path: Path, workers: int) -> None:
    table = numbered_table(tmp_path / "train", 20, classes=5, bad=(3, 8, 13, 18))
    batches = train(table, undecodable="skip", workers=workers)
    with pytest.raises(DataError, match=r"train: found no image that can be decoded of class 'class 3', expected some"):
        take_rows(batches, 20 * 20)


@pytest.mark.parametrize("workers", [1, 4])
def test_one_decodable_image_is_enough(tmp_path: Path, workers: int) -> None:
    table = numbered_table(tmp_path / "train", 4, classes=1, bad=(0, 1, 3))
    for rank in range(workers):
        batch = next(train(table, undecodable="skip", batch_size=6, rank=rank, workers=workers))
        assert numbers(batch.images()) == [2] * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, but allowed is 1 or more"),
        ({"resolution": 1}, "resolution is 1, but allowed is 2 or more pixels"),
        ({"mean": (0.5,)}, r"mean is \(0.5,\), but allowed is three numbers"),
        ({"std": (0.5, 0.5, 0.0)}, "std is .* three numbers above 0"),
        ({"undecodable": "ignore"}, r"undecodable is 'ignore', but allowed is one of \['fail', 'skip'\]"),
    ],
)
def test_options_out_of_range_are_refused_at_once(
    tables: dict[int, ImageTable], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(tables[7], **options)
    with pytest.raises(ValueError, match=message):
        eval_batches(tables[7], **{**PLAIN, "batch_size": 4, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": "flap"}, r"augment is 'flap', but allowed is one or several of \['none', 'crop_flip', "),
        ({"sampling": "fair"}, r"sampling is 'fair', but allowed is one of \['natural', 'balanced'\]"),
        ({"seed": -1}, "seed is -1"),
        ({"workers": 8}, "workers is 8, but allowed is 1 to 7, the table's rows"),
        ({"workers": 0}, "workers is 0"),
        ({"workers": 2, "rank": 2}, "rank is 2, but allowed is 0 to 1 with 2 worker"),
        ({"start": -1}, "start is -1"),
    ],
)
def test_a_stream_out_of_range_is_refused(tables: dict[int, ImageTable], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(tables[7], **options)


@pytest.mark.parametrize(
    ("rows", "expected"), [(1, [0]), (3, [0, 5, 10]), (5, [0, 3, 6, 9, 12]), (99, list(range(16)))]
)
def test_a_limited_evaluation_reads_rows_spread_over_the_whole_table(
    tables: dict[int, ImageTable], rows: int, expected: list[int]
) -> None:
    batches = eval_batches(tables[16], **PLAIN, batch_size=4, rows=rows)

    assert [number for batch in batches for number in numbers(batch.images())] == expected
