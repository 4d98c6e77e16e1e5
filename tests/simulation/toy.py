"""A toy job for simulated clusters: a real `Job` around a network without a forward pass.

Server, shards, groups, workers, checkpoints and progress are the real ones. Only networks, images and their tables have
stand-ins, and these are made so that the values themselves tell what happened to them:

- A shared part has one value for each worker and batch (`counts`). The worker's gradient of it is -1 in the step that
  learns from this batch. So with rate 1 and no momentum the value is the number of times that the push was applied.
- A shared part also has `answers`, whose gradients are small whole numbers that depend on every bit of the values that
  the worker holds. A step that was computed on other values leaves other bits behind.
- The gradients of a private part depend on the task and the batch alone, so `tests.simulation.formulas` says what the
  private tensors are after any number of steps.
- Both parts have a normalisation layer with running statistics, and the shared one has a tensor that is not trained.
- Metrics are a hash of the values.

All gradients are small whole numbers, so that sums of float32 are exact in any order.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from multitask.cluster.interface import Clock
from multitask.data import Batch
from multitask.data.shared import SharedStream
from multitask.job import Job
from multitask.job.assignment import rank_of
from multitask.job.checkpoint import Checkpoint
from multitask.server.messages import GroupValues
from multitask.spec.reading import load_spec
from multitask.spec.schema import JobSpec
from tests.simulation.behaviour import Behaviour, StillClock
from tests.simulation.formulas import RANKS
from tests.simulation.toy_model import ToyLearner, ToyModel, ToyPlace, ToyStream


@dataclass(frozen=True, kw_only=True)
class ToyTask:
    """A task of a toy job."""

    name: str
    workers: int = 1
    """At most `RANKS`."""
    min_workers: int | None = None
    shares: tuple[str, ...] = ("body",)
    """Names of the shared parts that the task uses. A part forms a group with the other parts of the same tasks."""
    private: bool = True
    """The task has a private part."""
    weight: float = 1.0
    ema: float | None = None
    rows: int = 1
    """Rows of a batch, so the positions of the stream advance by this number."""
    skips: bool = False
    """Every third batch passes over one more row, which is undecodable."""
    data: str = ""
    """Tasks with the same data share their streams; every task has its own by default."""

    def content(self, row: int) -> dict[str, Any]:
        """Return the task as a job spec has it.

        Args:
            row: row of the first worker in the tensors `counts`.
        """
        return {
            "name": self.name,
            "data": self.data or f"rows of {self.name}",
            "method": "toy",
            "options": {"shares": list(self.shares), "private": self.private, "row": row},
            "resolution": 8,
            "batch_size": self.rows,
            "undecodable": "skip" if self.skips else "fail",
            "workers": self.workers,
            "min_workers": self.min_workers,
            "weight": self.weight,
            "ema": self.ema,
        }


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """A toy job in a few words."""

    tasks: tuple[ToyTask, ...]
    later: tuple[ToyTask, ...] = ()
    """Tasks that may be attached while the run goes on."""
    engine: Mapping[str, Any] = field(default_factory=lambda: {"name": "local"})
    """The key `engine` of the job spec."""
    optimizer: Mapping[str, Any] = field(default_factory=lambda: {"name": "sgd", "rate": 1.0, "momentum": 0.0})
    """The key `optimizer` of the job spec. With momentum 0 the values `counts` count under every engine; with 0.5 the
    slots matter too, and the formulas stay exact for 20 steps."""
    private_rate_factor: float = 0.5
    schedule: Mapping[str, Any] = field(default_factory=lambda: {"name": "constant"})
    """The key `schedule` of the job spec."""
    train_shared: bool = True
    steps: int = 20
    evaluate_every: int = 5
    stop_after: int | None = None
    checkpoints: Mapping[str, Any] = field(default_factory=dict)
    """The key `checkpoints` of the job spec."""
    resources: Mapping[str, Any] = field(default_factory=dict)
    """The key `resources` of the job spec."""
    directory: str = "toy"

    def spec(self) -> JobSpec:
        """Return the job spec."""
        everything = (*self.tasks, *self.later)
        return load_spec(
            {
                "name": "toy",
                "backbone": {"name": "toy", "options": {"rows": RANKS * len(everything)}},
                "tasks": [task.content(RANKS * number) for number, task in enumerate(self.tasks)],
                "train_shared": self.train_shared,
                "steps": self.steps,
                "evaluate_every": self.evaluate_every,
                "stop_after": self.stop_after,
                "optimizer": dict(self.optimizer),
                "private_rate_factor": self.private_rate_factor,
                "schedule": dict(self.schedule),
                "engine": dict(self.engine),
                "checkpoints": dict(self.checkpoints),
                "resources": dict(self.resources),
                "directory": self.directory,
            }
        )

    def later_content(self, name: str) -> dict[str, Any]:
        """Return a task of `later` as a request to attach it has it."""
        everything = (*self.tasks, *self.later)
        return next(task.content(RANKS * row) for row, task in enumerate(everything) if task.name == name)


class ToyWorld:
    """What all processes of a simulated run have in common."""

    def __init__(self, behaviour: Behaviour | None = None, clock: Clock | None = None) -> None:
        """Args:
        behaviour: by default all workers work without faults.
        clock: the virtual time in which workers compute; by default a clock that nobody waits for.
        """
        self.behaviour = behaviour or Behaviour()
        self.clock: Clock = clock or StillClock()
        self.processes: Counter[str] = Counter()
        """Worker -> number of learners that were made for it."""


class ToyJob(Job):
    """A job that trains `ToyModel`s. Simulated processes share it, with its world, and do not pickle it."""

    def __init__(self, spec: JobSpec, world: ToyWorld, checkpoint: Checkpoint | None = None) -> None:
        """Args:
        spec: what `ToyConfig.spec` returned, or that spec with tasks attached or removed.
        checkpoint: the state to go on from.
        """
        self.spec, self.world = spec, world
        self.caches = {}
        self.classes = {task.name: ("toy",) for task in spec.tasks}
        models = {task.name: self._model(task.name) for task in spec.tasks}
        self._plan(models, checkpoint)

    def changed(self, spec: JobSpec, checkpoint: Checkpoint | None = None) -> "ToyJob":
        return ToyJob(spec, self.world, checkpoint)

    def table_identities(self, task: str) -> dict[str, str]:  # noqa: ARG002
        return {}

    def state(self, states: Mapping[str, GroupValues]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        backbone: dict[str, Tensor] = {}
        private: dict[str, dict[str, Tensor]] = {task.name: {} for task in self.spec.tasks}
        for group in self.groups.values():
            owner = private[group.tasks[0]] if group.private else backbone
            owner.update(group.tensors(states.get(group.name)))
        return backbone, private

    def make_stream(self, workers: Sequence[str]) -> SharedStream:
        task = self.task(self.workers[workers[0]])
        stream = SharedStream(partial(ToyStream, task), dict.fromkeys(workers, task.resolution))
        for name in workers:
            stream.seek(name, self.start_of(name)[1])
        return stream

    def make_batches(self, worker: str, position: int | None = None) -> Iterator[Batch]:
        """Return a worker's batches, which no thread prepares in the background."""
        stream = self.make_stream([worker])
        if position is not None:
            stream.seek(worker, position)
        return self.view(worker).batches(partial(stream.next, worker))

    def make_learner(self, name: str, batches: Iterator[Batch]) -> ToyLearner:
        task = self.task(self.workers[name])
        place = ToyPlace(name, task, rank_of(name), self.world.processes[name])
        self.world.processes[name] += 1
        groups = self.groups_of(task.name)
        return ToyLearner(
            place,
            self._model(task.name),
            {group.name: group.layout for group in groups.values()},
            {group.name: (group.values, group.counters) for group in groups.values()},
            batches,
            self.world.behaviour,
            self.world.clock,
        )

    def _model(self, task: str) -> ToyModel:
        rows = self.spec.backbone.options["rows"]
        return ToyModel(self.task(task), rows, self.spec.steps, self.spec.train_shared)
