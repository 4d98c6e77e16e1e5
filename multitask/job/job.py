"""A job spec made concrete: models, groups and starting values; the server and the workers are built from it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import patches
from multitask.cluster.memory import keep_freed_memory
from multitask.data import Batch, ImageTable
from multitask.data.batches import BatchView
from multitask.data.feature_cache import FeatureCache
from multitask.data.shared import SharedStream
from multitask.data.stream import TrainStream
from multitask.job.assignment import rank_of, share_out
from multitask.job.caches import plan_caches, writers
from multitask.job.checkpoint import Checkpoint
from multitask.job.groups import Group, plan_groups
from multitask.job.models import attach_task, backbone_key, check_training, load_backbone
from multitask.job.rules import images_factor, make_rules, make_schedule
from multitask.job.tables import open_split, table_batches, table_key
from multitask.server.group import ParameterGroup
from multitask.server.messages import GroupValues, StepRecord
from multitask.server.optimizers import make_optimizer
from multitask.server.parameter_server import OtherShards, ParameterServer, ServedTask
from multitask.server.progress import Progress, WorkerProgress
from multitask.server.shard import Shard
from multitask.spec.errors import SpecError
from multitask.spec.schema import JobSpec, TaskSpec
from multitask.worker import StepSettings, TaskWorker, WorkerStart, task_loss


@dataclass(frozen=True)
class Loaded:
    """What many jobs over the same data and backbones load once; picklable."""

    tables: dict[str, ImageTable] = field(default_factory=dict)
    """`table_key` of a task and a split -> the table, opened and checked."""
    backbones: dict[str, patches.Backbone] = field(default_factory=dict)
    """`backbone_key` of a job -> its backbone with its weights."""

    def add(self, spec: JobSpec) -> None:
        """Load what this job needs and is not here yet.

        Raises:
            DataError, patches' errors: a table or the weights cannot be read.
        """
        for task in spec.tasks:
            for split in ("train", "validation"):
                key = table_key(task, split)
                if key not in self.tables:
                    self.tables[key] = open_split(task, split)
        if backbone_key(spec) not in self.backbones:
            self.backbones[backbone_key(spec)] = load_backbone(spec, spec.backbone.weights)


class Job:
    """What the driver prepares once and every process of the run builds its part from; picklable."""

    def __init__(self, spec: JobSpec, checkpoint: Checkpoint | None = None, loaded: Loaded | None = None) -> None:
        """Build the backbone and every task's model, open every table: what can fail fails here, before Ray starts.

        Args:
            checkpoint: where to go on from, perhaps with other tasks: one that is new starts from the shared tensors.
            loaded: gets what it lacks; no job changes what is in it.
        Raises:
            SpecError, patches' errors, DataError: the spec does not fit the backbone, a method or the data.
        """
        # One opening serves all tasks over the same data, and every process: a table is checked once.
        loaded = Loaded() if loaded is None else loaded
        loaded.add(spec)
        self._tables = loaded.tables
        self.spec = spec = self._with_workers(spec)
        """With the workers of each task."""
        for task in spec.tasks:
            self._check_data(task)
        self._backbone = loaded.backbones[backbone_key(spec)]
        models = {task.name: attach_task(self._backbone, task, spec) for task in spec.tasks}
        check_training(spec, models)
        tables = {task.name: self._table(task, "train") for task in spec.tasks}
        self.caches = plan_caches(spec, self._backbone, models, tables)
        """Task -> where it stores what the frozen backbone gives, for the tasks that do."""
        self._with_images = {task for task, model in models.items() if model.reads_images}
        self._opened: dict[Path, FeatureCache] = {}
        steps = {} if checkpoint is None else checkpoint.shared_steps()
        groups = plan_groups(models, {task.name: task.workers for task in spec.tasks}, steps)
        self.groups = {group.name: group for group in groups}
        self.workers = {f"{task.name}/{rank}": task.name for task in spec.tasks for rank in range(task.workers)}
        self.progress = Progress(workers={name: WorkerProgress() for name in self.workers})
        if checkpoint is not None:
            self._take_up(checkpoint)

    def _with_workers(self, spec: JobSpec) -> JobSpec:
        if spec.workers is None:
            return spec
        workers = share_out(spec.workers, {task.name: self._table(task, "train").num_rows for task in spec.tasks})
        return replace(spec, workers=None, tasks=tuple(replace(t, workers=workers[t.name]) for t in spec.tasks))

    def restored(self, checkpoint: Checkpoint | None) -> "Job":
        """The same job at a checkpoint; at its start where there is none."""
        job = copy(self)
        vars(job).update(vars(self))  # the backbone too, which `copy` leaves out as pickling does
        if checkpoint is not None:
            job._take_up(checkpoint)
        return job

    def loaded(self) -> Loaded:
        """What this job uses of what was loaded, for one with other tasks; in the process that built it alone."""
        keys = (table_key(task, split) for task in self.spec.tasks for split in ("train", "validation"))
        return Loaded({key: self._tables[key] for key in keys}, {backbone_key(self.spec): self._backbone})

    def _take_up(self, checkpoint: Checkpoint) -> None:
        self.groups = {name: group.restored(checkpoint.tensors) for name, group in self.groups.items()}
        self.progress = checkpoint.progress.with_workers(self.workers)

    def __getstate__(self) -> dict[str, Any]:
        """Workers and server take values from the groups; the backbone's own tensors stay with the driver.

        Every process opens its own caches.
        """
        return {key: value for key, value in vars(self).items() if key != "_backbone"} | {"_opened": {}}

    def task(self, name: str) -> TaskSpec:
        return next(task for task in self.spec.tasks if task.name == name)

    def cache(self, task: str) -> FeatureCache | None:
        """A task's cache, one for all tasks of this process that share it."""
        if task not in self.caches:
            return None
        plan = self.caches[task]
        if plan.path not in self._opened:
            self._opened[plan.path] = plan.open()
        return self._opened[plan.path]

    def groups_of(self, task: str) -> dict[str, Group]:
        return {name: group for name, group in self.groups.items() if task in group.tasks}

    def parameters(self) -> int:
        """Parameters of all tasks' models together, each shared one counted once; running statistics not counted."""
        return sum(group.layout.parameters for group in self.groups.values())

    def trained_parameters(self) -> int:
        """Those of them that training moves."""
        return sum(slot.size for group in self.groups.values() for slot in group.layout.trained_slots())

    @property
    def shards(self) -> int:
        """Processes over which the server is spread."""
        return getattr(self.spec.engine, "shards", 1)

    def served(self) -> list[Group]:
        """Groups that no push touches (a frozen backbone) stay with the workers, who hold them from the start."""
        return [group for group in self.groups.values() if group.on_server and group.layout.pushed]

    def pushed_bytes(self, task: str) -> int:
        """Bytes of one push of a task's worker."""
        return sum(4 * group.layout.pushed for group in self.served() if task in group.tasks)

    def make_shard(self, number: int) -> Shard:
        ranges = {group.name: group.layout.ranges(self.shards)[number] for group in self.served()}
        return Shard({group.name: self._parameter_group(group, ranges[group.name]) for group in self.served()})

    def make_replica(self, worker: str) -> Shard:
        """Whole copies of the server's groups that a worker's task uses, for a worker that applies updates itself."""
        task = self.workers[worker]
        return Shard({group.name: self._parameter_group(group) for group in self.served() if task in group.tasks})

    def make_server(
        self,
        shard: Shard | None = None,
        others: OtherShards | None = None,
        on_record: Callable[[StepRecord], None] = lambda _: None,
    ) -> ParameterServer:
        """The server.

        Args:
            shard: the one in its own process, by default the first of all.
            others: the shards in other processes.
            on_record: called with what the server notes of each push.
        """
        served = self.served()
        tasks = {
            task.name: ServedTask(
                shared=tuple(g.name for g in served if task.name in g.tasks and not g.private),
                private=tuple(g.name for g in served if task.name in g.tasks and g.private),
                weight=task.weight,
            )
            for task in self.spec.tasks
        }
        schedule = make_schedule(self.spec)
        rules = make_rules(self.spec)
        shard = self.make_shard(0) if shard is None else shard
        return ParameterServer(shard, tasks, self.workers, schedule, rules, self.progress, others, on_record)

    def holds_private(self, worker: str) -> bool:
        """The worker keeps private tensors itself, because its task has no other worker."""
        return any(not g.on_server and g.layout.pushed for g in self.groups_of(self.workers[worker]).values())

    def start_of(self, worker: str) -> tuple[int, int]:
        """Step and position at which a worker of this job begins."""
        progress = self.progress.workers[worker]
        if self.holds_private(worker):
            return progress.private_step, progress.private_position
        return progress.step, progress.position

    def make_worker(
        self, name: str, batches: Iterator[Batch], start: tuple[int, int] | None = None, incarnation: int = 0
    ) -> TaskWorker:
        """Build a worker with the values of this job's groups.

        Args:
            batches: the worker's training stream, from its start position on.
            start: the worker's first step and position; `start_of(name)` by default.
            incarnation: number of earlier processes that this worker has had.
        """
        keep_freed_memory()
        step, position = start or self.start_of(name)
        spec, task = self.spec, self.task(self.workers[name])
        # Only the structure: the values come from the groups, so no worker reads a weights file.
        backbone = load_backbone(spec, weights=None)
        groups = self.groups_of(task.name)
        settings = StepSettings(
            accumulate=task.accumulate,
            precision=torch.bfloat16 if task.precision == "bfloat16" else torch.float32,
            clip_norm=spec.clip_norm,
            loss=partial(task_loss, label_smoothing=task.label_smoothing, auxiliary_weight=task.auxiliary_weight),
            device=torch.device("cuda" if spec.resources.gpus_per_worker else "cpu"),
            seed=spec.seed,
        )
        return TaskWorker(
            name,
            task.name,
            attach_task(backbone, task, spec),
            layouts={group.name: group.layout for group in groups.values()},
            initial={group.name: (group.values, group.counters) for group in groups.values()},
            private={g.name: self._parameter_group(g) for g in groups.values() if not g.on_server and g.layout.pushed},
            batches=batches,
            settings=settings,
            validation=self._validation_batches(task) if rank_of(name) == 0 else None,
            cache=self.cache(task.name) if task.name in writers(self.caches) else None,
            start=WorkerStart(step, position, incarnation),
        )

    def checkpoint(self, progress: Progress, states: Mapping[str, GroupValues]) -> Checkpoint:
        """A checkpoint of a moment.

        Args:
            states: every group that training changes, with the optimiser's slots.
        """
        named = (self.groups[name].named(state) for name, state in states.items())
        return Checkpoint(progress, {name: tensor for tensors in named for name, tensor in tensors.items()})

    def state(self, states: Mapping[str, GroupValues]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """One version as named tensors: the backbone's, and task -> its private ones.

        The backbone holds trained shared tensors, and starting values wherever tasks own theirs.

        Args:
            states: group -> what training changed; groups left out kept their starting values.
        """
        backbone = {name: tensor.clone() for name, tensor in self._backbone.network.state_dict().items()}
        private: dict[str, dict[str, Tensor]] = {task.name: {} for task in self.spec.tasks}
        for group in self.groups.values():
            owner = private[group.tasks[0]] if group.private else backbone
            owner.update(group.tensors(states.get(group.name)))
        return backbone, private

    def _parameter_group(self, group: Group, part: tuple[int, int] | None = None) -> ParameterGroup:
        options = {key: value for key, value in asdict(self.spec.optimizer).items() if key not in ("name", "rate")}
        make = partial(make_optimizer, self.spec.optimizer.name, **options)
        factor = self.spec.private_rate_factor if group.private else 1.0
        factor *= images_factor(self.spec, group.tasks)
        return ParameterGroup(group.layout, group.state(), make, factor, part)

    def sharing(self, workers: Iterable[str]) -> list[list[str]]:
        """The workers in groups whose members read the same rows in the same order, at whatever resolutions.

        A worker with a cache reads alone: which images it needs depends on what is stored.
        """
        groups: dict[Any, list[str]] = {}
        for name in workers:
            task = self.task(self.workers[name])
            rows = table_key(task, "train")
            alike = (rows, task.batch_size, task.augment, task.workers, task.undecodable, task.shuffle_window)
            alone = name if task.name in self.caches else None
            groups.setdefault((*alike, rank_of(name), alone), []).append(name)
        return list(groups.values())

    def make_stream(self, workers: Sequence[str]) -> SharedStream:
        """The training stream of workers that `sharing` put together."""
        task, rank = self.task(self.workers[workers[0]]), rank_of(workers[0])
        make = partial(
            TrainStream,
            self._table(task, "train"),
            batch_size=task.batch_size,
            seed=self.spec.seed,
            augment=task.augment,
            rank=rank,
            workers=task.workers,
            undecodable=task.undecodable,
            window=task.shuffle_window,
            threads=self.spec.resources.decode_threads,
            cache=self.cache(task.name),
            decode_cached=task.name in self._with_images,
        )
        resolutions = {name: self.task(self.workers[name]).resolution for name in workers}
        stream = SharedStream(lambda position: make(start=position), resolutions)
        for name in workers:
            stream.seek(name, self.start_of(name)[1])
        return stream

    def view(self, worker: str) -> BatchView:
        """How a worker's task sees the images of its stream."""
        task = self.task(self.workers[worker])
        return BatchView(task.resolution, task.mean, task.std)

    def make_batches(self, worker: str, position: int | None = None) -> Iterator[Batch]:
        """A worker's batches from a stream of its own.

        Args:
            position: where the stream begins, as `Batch.position` gives it; by default as `start_of` has it.
        """
        stream = self.make_stream([worker])
        if position is not None:
            stream.seek(worker, position)
        return self.view(worker).batches(partial(stream.next, worker))

    def _validation_batches(self, task: TaskSpec) -> Callable[[], Iterator[Batch]]:
        table, threads = self._table(task, "validation"), self.spec.resources.decode_threads
        return lambda: table_batches(table, task, task.validation_images, threads)

    def _table(self, task: TaskSpec, split: str) -> ImageTable:
        return self._tables[table_key(task, split)]

    def _check_data(self, task: TaskSpec) -> None:
        train, validation = self._table(task, "train"), self._table(task, "validation")
        if train.classes != validation.classes:
            raise SpecError(
                f"Task '{task.name}': train and validation under '{task.data}' have other class lists "
                f"({len(train.classes)} and {len(validation.classes)} classes). Import both with one class list."
            )
        head = task.num_classes or self.spec.backbone.num_classes
        if len(train.classes) > head:
            where = "tasks.num_classes" if task.num_classes else "backbone.num_classes (the head that this task shares)"
            raise SpecError(
                f"Task '{task.name}': its data has {len(train.classes)} classes, but its head has {head} outputs. "
                f"Set {where} to {len(train.classes)} or more."
            )
