"""A job: the models, groups and starting values of a job spec, from which the server and the workers are built."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multitask.cluster.memory import keep_freed_memory
from multitask.data import Batch, ImageTable, prefetch
from multitask.data.batches import BatchView
from multitask.data.feature_cache import FeatureCache
from multitask.data.shared import SharedStream
from multitask.job.assignment import check_workers, rank_of, share_out
from multitask.job.caches import plan_caches, writers
from multitask.job.checkpoint import Checkpoint
from multitask.job.class_weights import weigh_classes
from multitask.job.groups import Group, plan_groups
from multitask.job.heads import Classes, attach_tasks
from multitask.job.inputs import SPLITS, LoadedInputs
from multitask.job.models import attach_task, backbone_key, check_training, load_backbone
from multitask.job.rules import make_rules, make_schedule
from multitask.job.serving import parameter_group, served_tasks
from multitask.job.streams import group_by_rows, stream_factory
from multitask.job.tables import table_batches, table_key
from multitask.server.clock import Clock
from multitask.server.group import ParameterGroup
from multitask.server.messages import GroupValues, StepRecord
from multitask.server.parameter_server import OtherShards, ParameterServer
from multitask.server.progress import Progress, WorkerProgress
from multitask.server.shard import Shard
from multitask.spec.schema import JobSpec, TaskSpec
from multitask.worker import Learner, NetworkLearner, StepSettings, TaskWorker, WorkerStart, make_mix, task_loss
from patches import PatchedModel


class Job:
    """A job that is ready to train. The driver builds it once, and every process of the run builds its part from it.

    A job is picklable.
    """

    def __init__(
        self,
        spec: JobSpec,
        checkpoint: Checkpoint | None = None,
        loaded: LoadedInputs | None = None,
        kept: Mapping[str, Classes] | None = None,
        stand_ins: bool = False,
    ) -> None:
        """Build the backbone and every task's model, and open every table, so that errors appear before Ray starts.

        Args:
            checkpoint: the state to go on from. The spec may have other tasks than the checkpoint. A new task gets the
                checkpoint's shared tensors; its private tensors start as in a new run.
            loaded: inputs that are loaded already. The job adds those that it lacks and changes none of the others.
            kept: task -> the class list that its model has, for tasks that go on. A new task gets that of its training
                table.
            stand_ins: the tables only stand in for others, and may have fewer classes than the heads have outputs.
        Raises:
            SpecError, patches' errors, DataError: the spec does not fit the backbone, a patch method or the data.
        """
        # A table is opened and checked once, for all tasks that read it and for every process.
        loaded = LoadedInputs() if loaded is None else loaded
        loaded.add(spec)
        self._tables = loaded.tables
        spec = self._with_workers(spec)
        self.backbone = loaded.backbones[backbone_key(spec)]
        """The backbone with its starting values. Only the process that built the job has it."""
        found = {task.name: self._tables[table_key(task, "train")].classes for task in spec.tasks}
        spec, models, classes = attach_tasks(self.backbone, spec, found, kept or {}, stand_ins)
        self.spec = spec
        """The job spec, in which every task has its number of workers and of its head's outputs."""
        self.classes = classes
        """Task -> the names of its model's outputs. Labels of all its tables are positions in this list."""
        check_training(spec, models)
        for task in spec.tasks:
            self._table(task, "validation")
        tables = {task.name: self._table(task, "train") for task in spec.tasks}
        self.class_weights = {task.name: weigh_classes(task, tables[task.name]) for task in spec.tasks}
        """Task -> weights of its classes in the training loss, or None."""
        self.caches = plan_caches(spec, self.backbone, models, tables)
        """Task -> the plan of its feature cache, for the tasks that have one."""
        self._with_images = {task for task, model in models.items() if model.reads_images}
        self._opened: dict[Path, FeatureCache] = {}
        self._plan(models, checkpoint)

    def _plan(self, models: Mapping[str, PatchedModel], checkpoint: Checkpoint | None) -> None:
        """Divide the models' tensors into groups, and take up the state of a checkpoint if there is one."""
        steps = {} if checkpoint is None else checkpoint.shared_steps()
        groups = plan_groups(models, {task.name: task.workers for task in self.spec.tasks}, steps)
        self.groups = {group.name: group for group in groups}
        self.workers = {f"{task.name}/{rank}": task.name for task in self.spec.tasks for rank in range(task.workers)}
        self.progress = Progress(workers={name: WorkerProgress() for name in self.workers})
        if checkpoint is not None:
            self._take_up(checkpoint)

    def _with_workers(self, spec: JobSpec) -> JobSpec:
        """Divide the job's workers among its tasks, where the spec gives one number for all of them.

        Raises:
            SpecError: a task gets more workers than its training table has rows.
        """
        rows = {task.name: self._tables[table_key(task, "train")].num_rows for task in spec.tasks}
        if spec.workers is not None:
            workers = share_out(spec.workers, rows)
            spec = replace(spec, workers=None, tasks=tuple(replace(t, workers=workers[t.name]) for t in spec.tasks))
        check_workers({task.name: task.workers for task in spec.tasks}, rows)
        return spec

    def restored(self, checkpoint: Checkpoint | None) -> "Job":
        """Return this job with the state of a checkpoint, or as it is where there is no checkpoint."""
        job = copy(self)
        vars(job).update(vars(self))  # with the backbone, which `copy` leaves out because pickling leaves it out
        if checkpoint is not None:
            job._take_up(checkpoint)
        return job

    def changed(self, spec: JobSpec, checkpoint: Checkpoint | None = None) -> "Job":
        """Return a job with another spec, which uses the inputs that this job has loaded.

        Only the process that built this job can call it.

        Args:
            checkpoint: the state to go on from, as for a new job.
        Raises:
            The errors of a new job.
        """
        keys = (table_key(task, split) for task in self.spec.tasks for split in SPLITS)
        loaded = LoadedInputs({key: self._tables[key] for key in keys}, {backbone_key(self.spec): self.backbone})
        return Job(spec, checkpoint, loaded, self.classes)

    def _take_up(self, checkpoint: Checkpoint) -> None:
        self.groups = {name: group.restored(checkpoint.tensors) for name, group in self.groups.items()}
        self.progress = checkpoint.progress.with_workers(self.workers)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: everything but the backbone and the open caches.

        Workers and server take their values from the groups, and every process opens its own caches.
        """
        return {key: value for key, value in vars(self).items() if key != "backbone"} | {"_opened": {}}

    def task(self, name: str) -> TaskSpec:
        """Return the spec of a task."""
        return next(task for task in self.spec.tasks if task.name == name)

    def cache(self, task: str) -> FeatureCache | None:
        """Return a task's feature cache, or None. Tasks with the same cache get the same object in this process."""
        if task not in self.caches:
            return None
        plan = self.caches[task]
        if plan.path not in self._opened:
            self._opened[plan.path] = plan.open()
        return self._opened[plan.path]

    def groups_of(self, task: str) -> dict[str, Group]:
        """Return the groups that a task uses, by name."""
        return {name: group for name, group in self.groups.items() if task in group.tasks}

    def parameters(self) -> int:
        """Return the number of parameters of all tasks' models together.

        A shared parameter counts once, and running statistics do not count.
        """
        return sum(group.layout.parameters for group in self.groups.values())

    def trained_parameters(self) -> int:
        """Return the number of those parameters that training changes."""
        return sum(slot.size for group in self.groups.values() for slot in group.layout.trained_slots())

    @property
    def shards(self) -> int:
        """Number of processes over which the server is spread."""
        return self.spec.engine.shards

    def served(self) -> list[Group]:
        """Return the groups that the server holds.

        Groups that no push changes, such as a frozen backbone, are not among them: every worker has their values.
        """
        return [group for group in self.groups.values() if group.on_server and group.layout.pushed]

    def pushed_bytes(self, task: str) -> int:
        """Return the bytes of one push of a worker of this task."""
        return sum(4 * group.layout.pushed for group in self.served() if task in group.tasks)

    def make_shard(self, number: int) -> Shard:
        """Return one shard of the server: its part of every group that the server holds."""
        ranges = {group.name: group.layout.ranges(self.shards)[number] for group in self.served()}
        return Shard({group.name: self._parameter_group(group, ranges[group.name]) for group in self.served()})

    def make_replica(self, worker: str) -> Shard:
        """Return a shard with whole copies of the groups that a worker's task uses.

        A worker needs it where it applies updates itself.
        """
        task = self.workers[worker]
        return Shard({group.name: self._parameter_group(group) for group in self.served() if task in group.tasks})

    def make_server(
        self,
        shard: Shard | None = None,
        others: OtherShards | None = None,
        on_record: Callable[[StepRecord], None] = lambda _: None,
        clock: Clock = time,
    ) -> ParameterServer:
        """Build the parameter server.

        Args:
            shard: the shard in the server's own process; by default the first shard.
            others: the shards in other processes.
            on_record: called with the record of each push.
            clock: the time of the server's process.
        """
        tasks = served_tasks(self.spec, self.served())
        schedule = make_schedule(self.spec)
        rules = make_rules(self.spec)
        shard = self.make_shard(0) if shard is None else shard
        return ParameterServer(shard, tasks, self.workers, schedule, rules, self.progress, others, on_record, clock)

    def holds_private(self, worker: str) -> bool:
        """Return whether a worker keeps private tensors itself, because its task has no other worker."""
        return any(not g.on_server and g.layout.pushed for g in self.groups_of(self.workers[worker]).values())

    def start_of(self, worker: str) -> tuple[int, int]:
        """Return the step and the stream position at which a worker of this job begins."""
        progress = self.progress.workers[worker]
        if self.holds_private(worker):
            return progress.private_step, progress.private_position
        return progress.step, progress.position

    def make_worker(
        self,
        name: str,
        batches: Iterator[Batch],
        start: tuple[int, int] | None = None,
        incarnation: int = 0,
        process: int | None = None,
    ) -> TaskWorker:
        """Build a worker with the values of this job's groups.

        Args:
            batches: the worker's training stream, from its start position on.
            start: the worker's first step and position; `start_of(name)` by default.
            incarnation: number of earlier processes that this worker has had.
            process: id of the worker's process; this process by default.
        """
        step, position = start or self.start_of(name)
        groups = self.groups_of(self.workers[name]).values()
        private = {g.name: self._parameter_group(g) for g in groups if not g.on_server and g.layout.pushed}
        process = os.getpid() if process is None else process
        began = WorkerStart(step, position, incarnation, process)
        return TaskWorker(name, self.workers[name], self.make_learner(name, batches), private, began)

    def make_learner(self, name: str, batches: Iterator[Batch]) -> Learner:
        """Build a worker's model with the values of this job's groups.

        Args:
            batches: the worker's training stream, from its start position on.
        """
        keep_freed_memory()
        spec, task = self.spec, self.task(self.workers[name])
        # Only the structure: the values come from the groups, so no worker reads a weights file.
        backbone = load_backbone(spec, weights=None)
        groups = self.groups_of(task.name)
        device = torch.device("cuda" if spec.resources.gpus_per_worker else "cpu")
        weights = self.class_weights[task.name]
        settings = StepSettings(
            accumulate=task.accumulate,
            precision=torch.bfloat16 if task.precision == "bfloat16" else torch.float32,
            clip_norm=spec.clip_norm,
            loss=partial(
                task_loss,
                label_smoothing=task.label_smoothing,
                auxiliary_weight=task.auxiliary_weight,
                class_weights=None if weights is None else weights.to(device),
            ),
            mix=make_mix(task.mix, task.mix_alpha, len(self.classes[task.name])),
            device=device,
            seed=spec.seed,
        )
        return NetworkLearner(
            name,
            attach_task(backbone, task, spec),
            layouts={group.name: group.layout for group in groups.values()},
            initial={group.name: (group.values, group.counters) for group in groups.values()},
            batches=batches,
            settings=settings,
            validation=self._validation_batches(task) if rank_of(name) == 0 else None,
            cache=self.cache(task.name) if task.name in writers(self.caches) else None,
        )

    def checkpoint(self, progress: Progress, states: Mapping[str, GroupValues]) -> Checkpoint:
        """Return a checkpoint of the run.

        Args:
            progress: the run's counters.
            states: group -> its state with the optimizer's slots, for every group that training changes.
        """
        named = (self.groups[name].named(state) for name, state in states.items())
        return Checkpoint(progress, {name: tensor for tensors in named for name, tensor in tensors.items()})

    def state(self, states: Mapping[str, GroupValues]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Return one version as named tensors: those of the backbone, and task -> its private tensors.

        The backbone has the trained shared tensors, and starting values for the tensors that every task owns itself.

        Args:
            states: group -> its state. Groups that are left out have their starting values.
        """
        backbone = {name: tensor.clone() for name, tensor in self.backbone.network.state_dict().items()}
        private: dict[str, dict[str, Tensor]] = {task.name: {} for task in self.spec.tasks}
        for group in self.groups.values():
            owner = private[group.tasks[0]] if group.private else backbone
            owner.update(group.tensors(states.get(group.name)))
        return backbone, private

    def _parameter_group(self, group: Group, part: tuple[int, int] | None = None) -> ParameterGroup:
        return parameter_group(self.spec, group, part)

    def sharing(self, workers: Iterable[str]) -> list[list[str]]:
        """Return the workers in lists whose members can share one stream.

        Workers share a stream if they read the same rows in the same order; their resolutions may differ. A worker with
        a feature cache has a stream of its own, because the images that it needs depend on the stored features.
        """
        tasks = {name: self.task(task) for name, task in self.workers.items()}
        return group_by_rows(workers, tasks, self.classes, self.caches)

    def make_stream(self, workers: Sequence[str]) -> SharedStream:
        """Return the training stream of workers that `sharing` put into one list."""
        first = workers[0]
        task = self.task(self.workers[first])
        decode_cached = task.name in self._with_images
        table, cache = self._table(task, "train"), self.cache(task.name)
        make = stream_factory(self.spec, task, rank_of(first), table, cache, decode_cached)
        stream = SharedStream(make, {name: self.task(self.workers[name]).resolution for name in workers})
        for name in workers:
            stream.seek(name, self.start_of(name)[1])
        return stream

    def view(self, worker: str) -> BatchView:
        """Return the resolution and the normalisation with which a worker's task sees the images of its stream."""
        task = self.task(self.workers[worker])
        return BatchView(task.resolution, task.mean, task.std)

    def make_batches(self, worker: str, position: int | None = None) -> Iterator[Batch]:
        """Return a worker's batches from a stream of its own, which prepares them in the background.

        Args:
            position: the position at which the stream begins (see `Batch.position`); by default that of `start_of`.
        """
        stream = self.make_stream([worker])
        if position is not None:
            stream.seek(worker, position)
        return prefetch(self.view(worker).batches(partial(stream.next, worker)))

    def _validation_batches(self, task: TaskSpec) -> Callable[[], Iterator[Batch]]:
        table, threads = self._table(task, "validation"), self.spec.resources.decode_threads
        return lambda: table_batches(table, task, task.validation_images, threads)

    def _table(self, task: TaskSpec, split: str) -> ImageTable:
        """Return a task's table with labels that are positions in the task's class list."""
        return self._tables[table_key(task, split)].in_classes(self.classes[task.name])

    def table_identities(self, task: str) -> dict[str, str]:
        """Return split -> `ImageTable.identity` of the task's table as it is on disk."""
        return {split: self._tables[table_key(self.task(task), split)].identity for split in SPLITS}
