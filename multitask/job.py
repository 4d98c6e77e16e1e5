"""A job spec made concrete: models, groups and starting values; the server and the workers are built from it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import patches
from multitask.data import Batch, ImageTable, eval_batches, open_table
from multitask.data.batches import BatchView, TrainStream
from multitask.data.shared import SharedStream
from multitask.server.group import ParameterGroup
from multitask.server.layout import Layout, flatten, make_layout, named_tensors, tensor_roles
from multitask.server.messages import GroupValues, as_tensor
from multitask.server.optimizers import make_optimizer
from multitask.server.parameter_server import ParameterServer
from multitask.server.schedules import SCHEDULES, Schedule
from multitask.spec import JobSpec, SpecError, TaskSpec
from multitask.worker import TaskWorker, task_loss


@dataclass(frozen=True)
class Group:
    """The tensors that the same tasks share, or one task's private ones."""

    name: str
    tasks: tuple[str, ...]
    private: bool
    on_server: bool
    layout: Layout
    values: Tensor
    """Starting values, shape (layout.size,), float32."""
    counters: Tensor
    """Starting batch counters, shape (layout.counters,), int64."""


class Job:
    """What the driver prepares once and every process of the run builds its part from; picklable."""

    def __init__(self, spec: JobSpec) -> None:
        """Build the backbone and every task's model, open every table: what can fail fails here, before Ray starts.

        Raises:
            SpecError, patches' errors, DataError: the spec does not fit the backbone, a method or the data.
        """
        self.spec = spec
        # One opening serves all tasks over the same data, and every process: a table is checked once.
        self._tables: dict[str, ImageTable] = {}
        for task in spec.tasks:
            for split in ("train", "validation"):
                uri = f"{task.data}/{split}"
                if uri not in self._tables:
                    self._tables[uri] = open_split(task, split)
            self._check_data(task)
        self._backbone = load_backbone(spec, spec.backbone.weights)
        models = {task.name: attach_task(self._backbone, task, spec) for task in spec.tasks}
        self.groups = {group.name: group for group in plan_groups(models, {t.name: t.workers for t in spec.tasks})}
        self.workers = {f"{task.name}/{rank}": task.name for task in spec.tasks for rank in range(task.workers)}

    def __getstate__(self) -> dict[str, Any]:
        """Workers and server take values from the groups; the backbone's own tensors stay with the driver."""
        return {key: value for key, value in vars(self).items() if key != "_backbone"}

    def task(self, name: str) -> TaskSpec:
        return next(task for task in self.spec.tasks if task.name == name)

    def groups_of(self, task: str) -> dict[str, Group]:
        return {name: group for name, group in self.groups.items() if task in group.tasks}

    def parameters(self) -> int:
        """Parameters of all tasks' models together, each shared one counted once; running statistics not counted."""
        return sum(group.layout.parameters for group in self.groups.values())

    def make_server(self) -> ParameterServer:
        """Groups that no push touches (a frozen backbone) stay with the workers, who hold them from the start."""
        served = [group for group in self.groups.values() if group.on_server and group.layout.pushed]
        return ParameterServer(
            groups={group.name: self._parameter_group(group) for group in served},
            uses={t.name: [group.name for group in served if t.name in group.tasks] for t in self.spec.tasks},
            workers=self.workers,
            schedule=make_schedule(self.spec),
            evaluate_every_rounds=self.spec.evaluate_every,
        )

    def make_worker(self, name: str, batches: Iterator[Batch]) -> TaskWorker:
        spec, task, rank = self.spec, self.task(self.workers[name]), rank_of(name)
        # The structure alone: values come from the groups, so no worker reads a weights file.
        backbone = load_backbone(spec, weights=None)
        groups = self.groups_of(task.name)
        return TaskWorker(
            name,
            task.name,
            attach_task(backbone, task, spec),
            layouts={group.name: group.layout for group in groups.values()},
            initial={group.name: (group.values, group.counters) for group in groups.values()},
            private={g.name: self._parameter_group(g) for g in groups.values() if not g.on_server},
            batches=batches,
            accumulate=task.accumulate,
            precision=torch.bfloat16 if task.precision == "bfloat16" else torch.float32,
            clip_norm=spec.clip_norm,
            loss=partial(task_loss, label_smoothing=task.label_smoothing, auxiliary_weight=task.auxiliary_weight),
            validation=self._validation_batches(task) if rank == 0 else None,
            device=torch.device("cuda" if spec.resources.gpus_per_worker else "cpu"),
        )

    def state(self, states: Mapping[str, GroupValues]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """One version as named tensors: the backbone's, and task -> its private ones.

        The backbone holds trained shared tensors, and starting values wherever tasks own theirs.

        Args:
            states: group -> what training changed; groups left out kept their starting values.
        """
        backbone = {name: tensor.clone() for name, tensor in self._backbone.network.state_dict().items()}
        private: dict[str, dict[str, Tensor]] = {task.name: {} for task in self.spec.tasks}
        for group in self.groups.values():
            values, counters = group.values.clone(), group.counters.clone()
            if group.name in states:
                values[: group.layout.pushed] = as_tensor(states[group.name].values)
                counters = as_tensor(states[group.name].counters)
            owner = private[group.tasks[0]] if group.private else backbone
            # Clones: a view would be saved, or pickled, with its whole buffer.
            owner.update((name, view.clone()) for name, view in group.layout.tensors(values, counters).items())
        return backbone, private

    def _parameter_group(self, group: Group) -> ParameterGroup:
        options = {key: value for key, value in asdict(self.spec.optimizer).items() if key not in ("name", "rate")}
        make = partial(make_optimizer, self.spec.optimizer.name, **options)
        factor = self.spec.private_rate_factor if group.private else 1.0
        factor *= images_factor(self.spec, group.tasks)
        return ParameterGroup(group.layout, group.values.clone(), group.counters.clone(), make, factor)

    def sharing(self, workers: Iterable[str]) -> list[list[str]]:
        """The workers in groups whose members read the same rows in the same order, at whatever resolutions."""
        groups: dict[Any, list[str]] = {}
        for name in workers:
            task = self.task(self.workers[name])
            alike = (task.data, task.batch_size, task.augment, task.workers, task.undecodable, task.shuffle_window)
            groups.setdefault((*alike, rank_of(name)), []).append(name)
        return list(groups.values())

    def make_stream(self, workers: Sequence[str]) -> SharedStream:
        """The training stream of workers that `sharing` put together."""
        task, rank = self.task(self.workers[workers[0]]), rank_of(workers[0])
        make = partial(
            TrainStream,
            self._tables[f"{task.data}/train"],
            batch_size=task.batch_size,
            seed=self.spec.seed,
            augment=task.augment,
            rank=rank,
            workers=task.workers,
            undecodable=task.undecodable,
            window=task.shuffle_window,
            threads=self.spec.resources.decode_threads,
        )
        resolutions = {name: self.task(self.workers[name]).resolution for name in workers}
        return SharedStream(lambda position: make(start=position), resolutions)

    def view(self, worker: str) -> BatchView:
        """How a worker's task sees the images of its stream."""
        task = self.task(self.workers[worker])
        return BatchView(task.resolution, task.mean, task.std)

    def make_batches(self, worker: str) -> Iterator[Batch]:
        """A worker's batches from a stream of its own."""
        return self.view(worker).batches(partial(self.make_stream([worker]).next, worker))

    def _validation_batches(self, task: TaskSpec) -> Callable[[], Iterator[Batch]]:
        table, threads = self._tables[f"{task.data}/validation"], self.spec.resources.decode_threads
        return lambda: table_batches(table, task, task.validation_images, threads)

    def _check_data(self, task: TaskSpec) -> None:
        train, validation = self._tables[f"{task.data}/train"], self._tables[f"{task.data}/validation"]
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


def load_backbone(spec: JobSpec, weights: str | None) -> patches.Backbone:
    """The job's backbone, with the spec's weights or, for its structure alone, with None."""
    backbone = spec.backbone
    return patches.load_backbone(backbone.name, weights, backbone.num_classes, seed=spec.seed, **backbone.options)


def attach_task(backbone: patches.Backbone, task: TaskSpec, spec: JobSpec) -> patches.PatchedModel:
    """A task's model as the job trains it, in train mode."""
    model = patches.attach(backbone, task.method, task.num_classes, seed=spec.seed, **task.options)
    model.set_shared_trainable(spec.train_shared)
    return model.train()


def make_schedule(spec: JobSpec) -> Schedule:
    options = {key: value for key, value in asdict(spec.schedule).items() if key != "name"}
    if spec.schedule.name == "cosine":
        options["rounds"] = spec.steps
    return SCHEDULES[spec.schedule.name](spec.optimizer.rate, **options)


def images_factor(spec: JobSpec, tasks: Sequence[str]) -> float:
    """What the rate rule makes of the rate of a group: 1, or images of one of its updates / 256.

    An update is one push (one worker's batch * accumulate), or under `sync` the mean over the pushes of all workers
    that use the group: a private group's update has fewer images than a shared one's.

    Args:
        tasks: those that use the group.
    Source: Goyal et al., "Accurate, Large Minibatch SGD", 2017, arXiv:1706.02677; "Parasite Networks" and "Visual
        Prompt Tuning" state their rates for 256 images.
    """
    if spec.rate_rule == "fixed":
        return 1.0
    users = [task for task in spec.tasks if task.name in tasks]
    pushes = sum(task.workers for task in users) if spec.engine.name == "sync" else 1
    return users[0].batch_size * users[0].accumulate * pushes / 256


def open_split(task: TaskSpec, split: str, *, verify: bool = True) -> ImageTable:
    """One of a task's tables: train, validation or test, checked as the task's spec says.

    Args:
        verify: False for a table that was checked before.
    """
    return open_table(f"{task.data}/{split}", verify=verify and task.verify_data, damaged=task.damaged_shards)


def rank_of(worker: str) -> int:
    """Number of a worker among those of its task."""
    return int(worker.rpartition("/")[2])


def table_batches(table: ImageTable, task: TaskSpec, rows: int | None = None, threads: int = 1) -> Iterator[Batch]:
    """A table in order, as the task's model reads images: all rows, or so many spread over the table."""
    return eval_batches(
        table,
        batch_size=task.batch_size,
        resolution=task.resolution,
        mean=task.mean,
        std=task.std,
        undecodable=task.undecodable,
        rows=rows,
        threads=threads,
    )


def plan_groups(models: Mapping[str, patches.PatchedModel], workers: Mapping[str, int]) -> list[Group]:
    """Partition all tasks' tensors into groups: one for each set of tasks that share tensors, one for each patch.

    Args:
        models: task -> its model, in train mode.
        workers: task -> number of workers; with several, the private group lies on the server too.
    """
    live = {task: named_tensors(model.network) for task, model in models.items()}
    roles: dict[str, dict[str, Any]] = {}
    momenta: dict[str, dict[str, float]] = {}
    for task, model in models.items():
        roles[task], momenta[task] = tensor_roles(model.network)
    shared: dict[tuple[str, ...], list[str]] = {}
    for name in dict.fromkeys(name for model in models.values() for name in model.shared_names):
        tasks = tuple(task for task, model in models.items() if name in model.shared_names)
        shared.setdefault(tasks, []).append(name)
    members = [(tasks, False, names) for tasks, names in shared.items()]
    members += [((task,), True, list(model.private_names)) for task, model in models.items() if model.private_names]
    groups = []
    for tasks, private, names in members:
        first = tasks[0]
        # In the order of the state dict: sets have none, and the layout has to be the same in every process.
        tensors = {name: tensor for name, tensor in live[first].items() if name in set(names)}
        for task in tasks[1:]:
            assert all(roles[task][name] == roles[first][name] for name in tensors)
        layout = make_layout(tensors, roles[first], momenta[first])
        values, counters = flatten(tensors, layout)
        name = f"{'private' if private else 'shared'}:{'+'.join(tasks)}"
        groups.append(Group(name, tasks, private, not private or workers[first] > 1, layout, values, counters))
    return groups
