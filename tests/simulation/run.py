"""One simulated run: the real driver, server and workers on a simulated cluster, and a record of what they did."""

import contextlib
import json
import logging
import os
import re
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from multitask.cluster.arithmetic import Node
from multitask.cluster.interface import Clock
from multitask.errors import TrainingError
from multitask.job.checkpoint import Checkpoint, CheckpointError, CheckpointStore
from multitask.job.writing import WAITS_S
from multitask.run.directory import write_json, write_spec
from multitask.run.live import REQUESTS
from multitask.run.tasks import read_tasks, write_tasks
from multitask.run.trainer import Stopped, Training
from multitask.server.messages import Evaluation, StepRecord
from multitask.server.progress import Progress
from multitask.spec.reading import load_spec
from tests.simulation.cluster import SimulatedCluster
from tests.simulation.losses import Cause
from tests.simulation.messages import share
from tests.simulation.schedule import Request, Schedule, StoreFault
from tests.simulation.toy import ToyJob, ToyWorld
from tests.simulation.world import DriverKilledError, StuckError, World

PACKAGE = logging.getLogger("multitask")
LOSS = re.compile("goes on from its last checkpoint|go back to")
"""What the driver's warning of a loss says, and no other warning."""
UNWRITTEN = "The checkpoint cannot be written"
LIMIT_S = 3600.0
"""Virtual seconds in which a run has to end. A user who goes on with a run that has ended early waits ten of them."""
WAIT_S = 10.0
LIVES = 12
"""Largest number of drivers of a run."""
SHARED_MEMORY = Path("/dev/shm")
"""Files here are not written to a disk, so that thousands of runs do not wait for one."""


@dataclass
class News:
    """What one call of `Driver.watch` told."""

    life: int
    at_s: float
    """Virtual time."""
    records: list[StepRecord]
    evaluations: list[Evaluation]
    progress: Progress
    job: ToyJob
    changed: bool
    """The tasks have changed since the call before."""


@dataclass
class Story:
    """What a run did."""

    schedule: Schedule
    lives: list[str] = field(default_factory=list)
    """How each driver ended: "finished", "stopped", "killed", or the error's type and text."""
    news: list[News] = field(default_factory=list)
    saved: list[tuple[int, ToyJob, Checkpoint]] = field(default_factory=list)
    """Number of the driver, its job, and a checkpoint that it wrote."""
    paused: list[Checkpoint | None] = field(default_factory=list)
    """The latest checkpoint after each driver that stopped."""
    last: dict[str, Tensor] | None = None
    """Content of `last.safetensors`, if the run has finished."""
    best: dict[str, Any] | None = None
    """What `result.json` says of the best version, if the run has finished."""
    job: ToyJob | None = None
    """The job at the end."""
    raised: str | None = None
    """The traceback of an error that no user should see."""
    losses: list[float] = field(default_factory=list)
    """The virtual times at which a driver warned of a loss."""
    stuck: str | None = None
    """Who waits for what, if the run did not end."""
    leftovers: list[str] = field(default_factory=list)
    partial_files: list[str] = field(default_factory=list)
    seconds: float = 0.0
    """Virtual seconds."""
    messages: int = 0
    kills: int = 0
    """Number of processes that died before their work had ended."""
    trace: list[tuple[Any, ...]] = field(default_factory=list)
    """What happened, for `tests.simulation.trace`."""


class LossLog(logging.Handler):
    """Notes when the driver warns of a loss."""

    def __init__(self, noted: list[float], clock: Clock) -> None:
        super().__init__(logging.WARNING)
        self._noted, self._clock = noted, clock

    def emit(self, record: logging.LogRecord) -> None:
        if LOSS.search(record.getMessage()):
            self._noted.append(self._clock.monotonic())


class Recorder:
    """Stands in for the tracker and for the monitor of a training: it keeps what it is told."""

    run_id = "simulated"
    rejected_calls = 0

    def __init__(self, story: Story, life: int, clock: Clock) -> None:
        self._story, self._life, self._clock = story, life, clock

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def track_tasks(self, *_: Any) -> None:
        pass

    def log_artifact(self, *_: Any) -> None:
        pass

    @contextlib.contextmanager
    def showing(self, job: ToyJob) -> Iterator[None]:
        self.change_tasks(job)
        yield

    def change_tasks(self, job: ToyJob) -> None:
        self._story.job = self.job = job

    def say(self, _: str) -> None:
        pass

    def update(self, records: list[StepRecord], evaluations: list[Evaluation], progress: Progress) -> None:
        self.rejected_calls = progress.rejected_calls
        told = self._story.news
        changed = bool(told) and told[-1].job.workers != self.job.workers
        at_s = self._clock.monotonic()
        told.append(News(self._life, at_s, records, evaluations, progress, self.job, changed))

    def end(self, *_: Any) -> None:
        pass

    def summary(self) -> dict[str, Any]:
        return {}


class SimulatedStore(CheckpointStore):
    """A store of checkpoints that takes virtual time to write them, and fails where the schedule says so."""

    def __init__(self, simulation: "Simulation", life: int) -> None:
        super().__init__(str(simulation.folder / "checkpoints"), simulation.schedule.job.checkpoints["keep"])
        self._simulation, self._life = simulation, life

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        """Other processes only read checkpoints, each with a store of its own."""
        return CheckpointStore, (self._uri, self._keep)

    def save(self, checkpoint: Checkpoint) -> str:
        simulation, world = self._simulation, self._simulation.world
        fault = simulation.next_store_fault()
        world.sleep(simulation.schedule.write_s)
        match fault:
            case "fails":
                world.sleep(sum(WAITS_S))  # in which the real store tries again
                raise TrainingError(f"{UNWRITTEN}: No space left on device")
            case "killed before":
                simulation.kill_driver()
            case "killed in the middle":
                # The old ones are deleted when the new one is complete.
                path = Path(CheckpointStore(self._uri, keep=100).save(checkpoint))
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                simulation.kill_driver()
        path = super().save(checkpoint)
        story = simulation.story
        assert story.job is not None
        story.saved.append((self._life, story.job, checkpoint))
        if fault == "killed after":
            simulation.kill_driver()
        world.sleep(simulation.schedule.write_s)
        return path


share(ToyJob)


class Simulation:
    """One schedule while it runs."""

    def __init__(self, schedule: Schedule, folder: Path) -> None:
        self.schedule, self.folder = schedule, folder
        self.story = Story(schedule)
        self.world = World(schedule.seed, limit_s=LIMIT_S)
        nodes = [Node({"CPU": cpus, "memory": 2.0**34}) for cpus in schedule.nodes]
        self.cluster = SimulatedCluster(
            self.world, nodes, timing=schedule.timing, faults=schedule.faults, grows=len(nodes) > 1
        )
        self._toy = ToyWorld(schedule.behaviour, self.cluster.clock)
        self._training: Training | None = None
        self._saves = 0
        for request in schedule.requests:
            self.world.at(request.at_s, self._ask, request)

    def run(self) -> Story:
        """Let drivers work on the run, one after the other, until it has ended."""
        story = self.story
        losses = LossLog(story.losses, self.cluster.clock)
        PACKAGE.addHandler(losses)
        try:
            for life in range(LIVES):
                if not self._live(life):
                    break
                self.world.settle(WAIT_S)
            else:
                story.stuck = f"{LIVES} drivers did not end the run: {story.lives}"
            self.world.settle(WAIT_S)
            story.leftovers = self.cluster.leftovers()
        except StuckError as error:
            story.stuck = str(error)
        finally:
            story.seconds, story.messages, story.trace = self.world.now, self.cluster.calls.sent, self.world.trace
            story.kills = sum(kind == "death" for _, kind, *_ in story.trace)
            self.world.close()
            PACKAGE.removeHandler(losses)
        story.partial_files = [path.name for path in self.folder.rglob("*.partial")]
        return story

    def _live(self, life: int) -> bool:
        """Let one driver work; return whether another one has to go on."""
        story = self.story
        try:
            self.cluster.run(partial(self._drive, life))
        except DriverKilledError:
            story.lives.append("killed")
            return True
        except Stopped:
            story.lives.append("stopped")
            story.paused.append(SimulatedStore(self, life).latest())
            return True
        except CheckpointError as error:
            story.lives.append(f"CheckpointError: {error}")
            for path in (self.folder / "checkpoints").iterdir():  # what the message tells the user to do
                path.unlink()
            return True
        except Exception as error:
            story.lives.append(f"{type(error).__name__}: {error}")
            if not isinstance(error, TrainingError):
                story.raised = traceback.format_exc()
            return UNWRITTEN in str(error)
        story.lives.append("finished")
        story.last = load_file(self.folder / "last.safetensors")
        story.best = json.loads((self.folder / "result.json").read_text())["best"]
        return False

    def _drive(self, life: int) -> None:
        """Do what `multitask train`, and later `multitask resume`, does."""
        path = self.folder / "spec.yaml"
        if life:
            spec = load_spec(path)
        else:
            spec = self.schedule.job.spec()
            write_spec(path, spec)
        store = SimulatedStore(self, life)
        job = ToyJob(spec, self._toy, store.latest() if life else None)
        write_tasks(self.folder, job, read_tasks(self.folder))
        recorder: Any = Recorder(self.story, life, self.cluster.clock)
        self._training = Training(self.folder, job, store, recorder, recorder, cluster=self.cluster)
        self._training.run()

    def _ask(self, request: Request) -> None:
        """Do what a user does who wants something of the running job."""
        self.world.note("request", request)
        if request.kind == "interrupt":
            if self._training is not None:
                self._training.interrupt()
            return
        added = self.schedule.job.later_content(request.task) if request.kind == "attach" else None
        folder = self.folder / REQUESTS
        folder.mkdir(exist_ok=True)
        path = folder / f"{request.kind}.json"
        write_json(path, {"attach": added, "remove": None if added else request.task})
        os.utime(path, (request.at_s, request.at_s))

    def next_store_fault(self) -> str | None:
        """Return what happens to the checkpoint that is written next."""
        self._saves += 1
        found: list[StoreFault] = [fault for fault in self.schedule.store_faults if fault.number == self._saves - 1]
        return found[0].kind if found else None

    def kill_driver(self) -> None:
        """Let the driver, whose code runs, be killed now."""
        self.world.soon(self.cluster.losses.end_process, self.world.here(), Cause.KILLED)
        self.world.sleep(1.0)


def simulate(schedule: Schedule) -> Story:
    """Run a schedule to its end."""
    place = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=place, prefix="simulation-") as folder:
        return Simulation(schedule, Path(folder)).run()
