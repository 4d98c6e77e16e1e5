"""How many images per second does one core load, against torchvision, WebDataset and the bare decoder?

All competitors read the same generated JPEGs (500 x 375 pixels, 110 kB) and end with shuffled uint8 batches of 64. Each
competitor is a process of its own with one torch thread. All are pinned to the same core and take turns batch by batch,
while the others are stopped with their threads, so that a ratio compares measurements that are close in time. Rates are
images per second of processor time, which includes background threads and the system's work: on a core that other
programs use too, the clock would measure those programs as well (the clock's time is also in the tables).
"""

import io
import multiprocessing
import os
import signal
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.io import ImageReadMode, decode_image, decode_jpeg
from torchvision.transforms import v2

from benchmarks._common import Goal, at_least, at_most, environment, finish, make_parser
from benchmarks._pictures import make_jpegs
from multitask.data import open_table, write_table
from multitask.data.batches import BatchView, TrainBatches
from multitask.data.shared import SharedStream
from multitask.data.stream import TrainStream
from patches.images.preprocessing import Preprocessing

try:
    import webdataset
except ModuleNotFoundError as error:
    raise SystemExit("This benchmark compares with WebDataset, which is missing: pip install -e '.[bench]'") from error

BATCH, RESOLUTIONS, CLASSES = 64, (224, 96), 8
WINDOW = 512
"""Rows (or images) that are shuffled together. A round reads this number, so each one pays for reading one window."""
WARM_UP = 2
"""Batches of each competitor before the first turn, after a whole window."""
TOGETHER = (96, 128, 160, 192, 224)
MEMORY_WINDOW, MEMORY_RESOLUTION, MEMORY_SIZES = 256, 96, (2, 20)
"""Rows of a window, pixels, and the two tables' sizes in windows."""
NORMAL: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
OURS, LIMIT = "this project", "limit"
PEERS = ("ImageFolder, PIL", "ImageFolder, decode_image", "WebDataset, decode_jpeg")
SINGLE, FIVE, SEPARATE = "224 alone", "five together", "five separate loaders"
LIMIT_SINGLE, LIMIT_FIVE = "limit: one decode, one resize", "limit: one decode, five resizes"
MB = 1e6
STATUS = Path("/proc/self/status")


def resize(resolution: int) -> v2.Resize:
    return v2.Resize((resolution, resolution), v2.InterpolationMode.BILINEAR, antialias=True)


def ours(folder: Path, resolution: int) -> Iterator[Tensor]:
    table = open_table(folder / "table")
    loader = TrainBatches(table, batch_size=BATCH, resolution=resolution, seed=0, window=WINDOW, **NORMAL)
    return (cast(Tensor, batch.pixels) for batch in loader)


def image_folder(
    folder: Path, resolution: int, load: Callable[[str], Any], *to_tensor: v2.Transform
) -> Iterator[Tensor]:
    pictures = ImageFolder(str(folder / "files"), v2.Compose([*to_tensor, resize(resolution)]), loader=load)
    loader = DataLoader(pictures, batch_size=BATCH, shuffle=True, num_workers=0, drop_last=True)
    while True:
        yield from (pixels for pixels, _ in loader)


def read_rgb(path: str) -> Tensor:
    return decode_image(path, ImageReadMode.RGB)


def web_dataset(folder: Path, resolution: int) -> Iterator[Tensor]:
    # Tensors over the bytes of the tar as they are: a warning says that nobody should write to them.
    warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
    change = resize(resolution)

    def pixels(content: bytes) -> Tensor:
        return change(decode_jpeg(torch.frombuffer(content, dtype=torch.uint8), ImageReadMode.RGB))

    tars = sorted(str(path) for path in (folder / "tars").iterdir())
    samples = webdataset.WebDataset(tars, shardshuffle=len(tars)).repeat().shuffle(WINDOW, initial=WINDOW)
    batches = samples.to_tuple("jpg", "cls").map_tuple(pixels, int).batched(BATCH, partial=False)
    return (pixels for pixels, _ in batches)


def limit(folder: Path, resolutions: Sequence[int]) -> Iterator[Tensor]:
    """Only decode and resize; the last image stands for its batch.

    The resize is v2.Resize as everyone writes it. Its own code takes some 40 us a call, which this project's loader
    saves: so it can come close to this limit, and with five resizes pass it.
    """
    encoded = [decode_input(path) for path in sorted((folder / "files").rglob("*.jpg"))]
    changes = [resize(resolution) for resolution in resolutions]
    for number, content in enumerate(cycle(encoded), 1):
        image_chw = decode_jpeg(content, ImageReadMode.RGB)
        for change in changes:
            resized_chw = change(image_chw)
        if number % BATCH == 0:
            yield resized_chw


def decode_input(path: Path) -> Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def together(folder: Path) -> Iterator[Tensor]:
    """Yield the next batch of each of five readers that share one stream."""
    table = open_table(folder / "table")

    def stream(start: int) -> TrainStream:
        return TrainStream(table, batch_size=BATCH, seed=0, window=WINDOW, start=start)

    shared = SharedStream(stream, {str(resolution): resolution for resolution in TOGETHER})
    views = {str(resolution): BatchView(Preprocessing(resolution, **NORMAL)) for resolution in TOGETHER}
    while True:
        batches = [cast(Tensor, view.batch(shared.next(reader)).pixels) for reader, view in views.items()]
        yield batches[-1]


def separate(folder: Path) -> Iterator[Tensor]:
    return (batches[-1] for batches in zip(*(ours(folder, resolution) for resolution in TOGETHER), strict=True))


class Turn(NamedTuple):
    """The seconds that some batches took."""

    processor: float
    clock: float


Turns = dict[str, list[Turn]]
"""Competitor -> its turns, one for each round."""


class Competitor:
    """A process that reads a batch when it is told to and is stopped at all other times."""

    def __init__(self, make: Callable[[], Iterator[Tensor]], core: int | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=compete, args=(make, core, other), daemon=True)
        self._process.start()
        other.close()
        self._wait()
        self._signal(signal.SIGSTOP)

    def turn(self) -> Turn:
        self._signal(signal.SIGCONT)
        self._connection.send("one batch")
        taken = self._wait()
        self._signal(signal.SIGSTOP)
        return taken

    def end(self) -> None:
        self._process.kill()
        self._process.join()

    def _wait(self) -> Turn:
        if not self._connection.poll(300):
            raise TimeoutError("A competitor took more than 300 s for a batch. Try fewer --images.")
        return self._connection.recv()

    def _signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)


def compete(make: Callable[[], Iterator[Tensor]], core: int | None, connection: Connection) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    batches = make()
    for _ in range(WINDOW // BATCH + WARM_UP):
        pixels = next(batches)
    assert pixels.dtype == torch.uint8, "every competitor ends with pixels 0 to 255"
    used = time.process_time()
    connection.send("ready")
    while connection.recv():
        clock = time.perf_counter()
        pixels = next(batches)
        # Counted since the last answer, so that a thread that went on after it is included.
        before, used = used, time.process_time()
        connection.send(Turn(used - before, time.perf_counter() - clock))


def race(makers: Mapping[str, Callable[[], Iterator[Tensor]]], rounds: int) -> Turns:
    """Let all competitors read a window in each round, batch by batch; all exist at once, and one runs at a time."""
    core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else None
    competitors: dict[str, Competitor] = {}
    turns: Turns = {name: [] for name in makers}
    try:
        for name, make in makers.items():
            competitors[name] = Competitor(make, core)
        for _ in range(rounds):
            taken: Turns = {name: [] for name in makers}
            for number in range(WINDOW // BATCH):
                # The order changes with each sweep, so that a load from outside meets all competitors alike.
                names = list(makers)
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    taken[name].append(competitors[name].turn())
            for name, parts in taken.items():
                turns[name].append(Turn(sum(part.processor for part in parts), sum(part.clock for part in parts)))
    finally:
        for competitor in competitors.values():
            competitor.end()
    return turns


def ratios(turns: Turns, name: str, base: str) -> list[float]:
    """Return the processor time of `name` divided by that of `base`, for each round."""
    return [turn.processor / other.processor for turn, other in zip(turns[name], turns[base], strict=True)]


def clock_ratios(turns: Turns, name: str, base: str) -> list[float]:
    return [turn.clock / other.clock for turn, other in zip(turns[name], turns[base], strict=True)]


def measure_rates(folder: Path, resolution: int, rounds: int) -> tuple[list[dict[str, Any]], list[Goal], Turns]:
    pil = partial(image_folder, folder, resolution, default_loader, v2.ToImage())
    turns = race(
        {
            LIMIT: partial(limit, folder, [resolution]),
            OURS: partial(ours, folder, resolution),
            PEERS[0]: pil,
            PEERS[1]: partial(image_folder, folder, resolution, read_rgb),
            PEERS[2]: partial(web_dataset, folder, resolution),
        },
        rounds,
    )
    rows: list[dict[str, Any]] = []
    for name, taken in turns.items():
        to_limit = ratios(turns, LIMIT, name)
        rows.append(
            {
                "loader": name,
                "images/s per core": WINDOW / median(turn.processor for turn in taken),
                "by the clock": WINDOW / median(turn.clock for turn in taken),
                "ratio to limit": median(to_limit),
                "lowest": min(to_limit),
                "highest": max(to_limit),
                "ours / this": median(ratios(turns, name, OURS)),
                "the same by the clock": median(clock_ratios(turns, name, OURS)),
            }
        )
    goals = [
        at_least(f"{resolution} px: images/s of {OURS} / images/s of {row['loader']}", row["ours / this"], 1.0)
        for row in rows
        if row["loader"] in PEERS
    ]
    if resolution == max(RESOLUTIONS):
        goals.append(
            at_least(f"{resolution} px: images/s of {OURS} / images/s of the limit", rows[0]["ours / this"], 0.9)
        )
    return rows, goals, turns


def measure_together(folder: Path, rounds: int) -> tuple[list[dict[str, Any]], Goal, Turns]:
    turns = race(
        {
            SINGLE: partial(ours, folder, max(TOGETHER)),
            FIVE: partial(together, folder),
            SEPARATE: partial(separate, folder),
            LIMIT_SINGLE: partial(limit, folder, [max(TOGETHER)]),
            LIMIT_FIVE: partial(limit, folder, TOGETHER),
        },
        rounds,
    )
    rows: list[dict[str, Any]] = []
    for name, taken in turns.items():
        base = LIMIT_SINGLE if name.startswith("limit") else SINGLE
        to_base = ratios(turns, name, base)
        rows.append(
            {
                "reading": name,
                "ms per image row": 1000 * median(turn.processor for turn in taken) / WINDOW,
                "by the clock": 1000 * median(turn.clock for turn in taken) / WINDOW,
                "cost / cost of": base,
                "ratio": median(to_base),
                "lowest": min(to_base),
                "highest": max(to_base),
            }
        )
    goal = at_most("Cost of a row at five resolutions together / at 224 px alone", rows[1]["ratio"], 1.5)
    return rows, goal, turns


def measure_memory(folder: Path, jpegs: Sequence[bytes], repeats: int) -> tuple[list[dict[str, Any]], Goal]:
    """Measure the peak resident memory of one epoch of a small and of a large table, each in a new process."""
    for size in MEMORY_SIZES:
        rows = ((jpegs[row % len(jpegs)], row % CLASSES) for row in range(size * MEMORY_WINDOW))
        write_table(folder / f"windows-{size}", rows, class_names())
    found: dict[int, list[tuple[int, int]]] = {size: [] for size in MEMORY_SIZES}
    for _ in range(repeats):
        for size, taken in found.items():
            taken.append(in_new_process(peak_memory, folder / f"windows-{size}"))
    table: list[dict[str, Any]] = [
        {
            "table": f"{size} windows of {MEMORY_WINDOW} rows",
            "rows": size * MEMORY_WINDOW,
            "before MB": median(before for before, _ in taken) / MB,
            "peak MB": median(peak for _, peak in taken) / MB,
            "peak - before MB": median(peak - before for before, peak in taken) / MB,
        }
        for size, taken in found.items()
    ]
    for row in table:
        row["peak / smaller table's"] = row["peak MB"] / table[0]["peak MB"]
        row["without what was before"] = row["peak - before MB"] / table[0]["peak - before MB"]
    small, large = MEMORY_SIZES
    name = f"Peak resident memory with a table of {large} windows / of {small}"
    return table, at_most(name, table[-1]["peak / smaller table's"], 1.1)


def peak_memory(uri: Path) -> tuple[int, int]:
    """Resident bytes just before the loader is made, and the most until an epoch is read (pages of files that the
    process maps are counted, such as its libraries; the system's page cache is not)."""
    torch.set_num_threads(1)
    table = open_table(uri)
    before = status_bytes("VmRSS")
    loader = TrainBatches(table, batch_size=BATCH, resolution=MEMORY_RESOLUTION, seed=0, window=MEMORY_WINDOW, **NORMAL)
    while loader.position < loader.rows_per_epoch:
        next(loader)
    return before, status_bytes("VmHWM")


def status_bytes(field: str) -> int:
    lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="utf-8").splitlines())
    return 1024 * int(lines[field].split()[0])


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def class_names() -> list[str]:
    return [f"class {label}" for label in range(CLASSES)]


def write_data(folder: Path, jpegs: Sequence[bytes]) -> None:
    """Write the same images as a table, as a folder for each class, and as tars."""
    write_table(folder / "table", ((content, row % CLASSES) for row, content in enumerate(jpegs)), class_names())
    for name in class_names():
        (folder / "files" / name).mkdir(parents=True)
    (folder / "tars").mkdir()
    for start in range(0, len(jpegs), WINDOW):
        with tarfile.open(folder / "tars" / f"{start:06d}.tar", "w") as tar:
            for row in range(start, min(start + WINDOW, len(jpegs))):
                (folder / "files" / f"class {row % CLASSES}" / f"{row:06d}.jpg").write_bytes(jpegs[row])
                for suffix, content in (("jpg", jpegs[row]), ("cls", str(row % CLASSES).encode())):
                    entry = tarfile.TarInfo(f"{row:06d}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=int, default=2048, help="distinct JPEGs")
    parser.add_argument("--rounds", type=int, default=7, help="windows that every competitor reads")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each reading of peak memory")
    arguments = parser.parse_args()
    around = environment() | {"webdataset": webdataset.__version__}
    tables: dict[str, list[dict[str, Any]]] = {}
    goals: list[Goal] = []
    turns: dict[str, Turns] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jpegs = make_jpegs(arguments.images)
        mean_bytes = mean(len(content) for content in jpegs)
        print(f"{len(jpegs)} JPEGs of {mean_bytes / 1000:.1f} kB in the mean")
        write_data(folder, jpegs)
        for resolution in RESOLUTIONS:
            rows, found, taken = measure_rates(folder, resolution, arguments.rounds)
            tables[f"One core, {resolution} px, medians over rounds"] = rows
            goals += found
            turns[f"{resolution} px"] = taken
        title = f"One core, resolutions {', '.join(map(str, TOGETHER))}"
        tables[title], goal, turns["together"] = measure_together(folder, arguments.rounds)
        goals.append(goal)
        if STATUS.exists():
            title = f"Peak resident memory of an epoch at {MEMORY_RESOLUTION} px, batch {BATCH}"
            tables[title], goal = measure_memory(folder, jpegs[:MEMORY_WINDOW], arguments.repeats)
            goals.append(goal)
    finish(
        arguments.out,
        tables=tables,
        environment=around,
        goals=goals,
        settings={
            "images": arguments.images,
            "mean_bytes": mean_bytes,
            "rounds": arguments.rounds,
            "images_per_round": WINDOW,
            "batch": BATCH,
            "shuffle_window": WINDOW,
            "memory_repeats": arguments.repeats,
            "turns": {
                race: {name: [turn._asdict() for turn in taken] for name, taken in found.items()}
                for race, found in turns.items()
            },
        },
    )


if __name__ == "__main__":
    main()
