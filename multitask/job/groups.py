"""Groups: the tensors that the same set of tasks shares, or the private tensors of one task."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import patches
from multitask.job.checkpoint import CheckpointError
from multitask.server.layout import Layout, flatten, make_layout, named_tensors, tensor_roles
from multitask.server.messages import GroupValues, as_tensor


@dataclass(frozen=True)
class Group:
    """The tensors that the same set of tasks shares, or the private tensors of one task, in one flat buffer."""

    name: str
    tasks: tuple[str, ...]
    private: bool
    on_server: bool
    layout: Layout
    values: Tensor
    """Values at the start of the run or at the checkpoint, shape (layout.size,), float32."""
    counters: Tensor
    """Numbers of batches that batch norms have seen, shape (layout.counters,), int64."""
    slots: dict[str, Tensor] = field(default_factory=dict)
    """Optimizer slots at the checkpoint, each of shape (layout.trained,); empty at the start of the run."""
    scalars: dict[str, float] = field(default_factory=dict)
    """Single numbers of the optimizer at the checkpoint."""

    @property
    def owner(self) -> str:
        """Owner of the tensors in the names of a checkpoint: `backbone` or `tasks/TASK`."""
        return f"tasks/{self.tasks[0]}" if self.private else "backbone"

    def state(self) -> GroupValues:
        """Return the part of the group that training changes, with the optimizer's slots."""
        slots = {name: slot.numpy() for name, slot in self.slots.items()}
        return GroupValues(self.values[: self.layout.pushed].numpy(), self.counters.numpy(), slots, self.scalars)

    def tensors(self, state: GroupValues | None) -> dict[str, Tensor]:
        """Return copies of the group's tensors by name.

        Args:
            state: values that training has changed. The rest come from this group; with None all of them do.
        """
        values, counters = self.values.clone(), self.counters
        if state is not None:
            values[: self.layout.pushed] = as_tensor(state.values)
            counters = as_tensor(state.counters)
        # A view would be saved or pickled together with its whole buffer, so each tensor is cloned.
        return {name: view.clone() for name, view in self.layout.tensors(values, counters).items()}

    def named(self, state: GroupValues) -> dict[str, Tensor]:
        """Return copies of a state's tensors and optimizer slots, under the names that `Checkpoint` uses."""
        found = {f"values/{self.owner}/{name}": tensor for name, tensor in self.tensors(state).items()}
        for slot in self.layout.trained_slots():
            name = f"{self.owner}/{slot.name}"
            found |= {f"slots/{kind}/{name}": slot.view(as_tensor(flat)).clone() for kind, flat in state.slots.items()}
            found |= {f"scalars/{kind}/{name}": torch.tensor(value) for kind, value in state.scalars.items()}
        return found

    def restored(self, tensors: Mapping[str, Tensor]) -> "Group":
        """Return this group with the tensors of a checkpoint. A tensor that the checkpoint lacks keeps its value.

        Raises:
            CheckpointError: a tensor has another shape than the job's.
        """
        values, counters = self.values.clone(), self.counters.clone()
        for name, view in self.layout.tensors(values, counters).items():
            _copy(tensors, f"values/{self.owner}/{name}", view)
        slots: dict[str, Tensor] = {}
        scalars: dict[str, float] = {}
        kinds = {tuple(name.split("/", 2)[:2]) for name in tensors}
        for slot in self.layout.trained_slots():
            for prefix, kind in kinds:
                name = f"{prefix}/{kind}/{self.owner}/{slot.name}"
                if name in tensors and prefix == "slots":
                    _copy(tensors, name, slot.view(slots.setdefault(kind, torch.zeros(self.layout.trained))))
                elif name in tensors and prefix == "scalars":
                    scalars[kind] = float(tensors[name])
        return replace(self, values=values, counters=counters, slots=slots, scalars=scalars)


def _copy(tensors: Mapping[str, Tensor], name: str, to: Tensor) -> None:
    """Copy a tensor of a checkpoint, if the checkpoint has it.

    Raises:
        CheckpointError: it has another shape.
    """
    tensor = tensors.get(name, to)
    if tensor.shape != to.shape:
        raise CheckpointError(
            f"The checkpoint has shape {tuple(tensor.shape)} for '{name}', and the job has {tuple(to.shape)}. Give the "
            "run's spec.yaml the content with which the run began, or start a new run."
        )
    to.copy_(tensor)


def plan_groups(
    models: Mapping[str, patches.PatchedModel], workers: Mapping[str, int], steps: Mapping[str, float] | None = None
) -> list[Group]:
    """Divide all tasks' tensors into groups: one for each set of tasks that shares tensors, and one for each patch.

    Args:
        models: task -> its model, in train mode.
        workers: task -> number of its workers. The server also holds the private group of a task with several workers.
        steps: name of a shared tensor -> steps that its optimizer has counted. Tensors with different counts go to
            different groups.
    """
    live = {task: named_tensors(model.network) for task, model in models.items()}
    roles: dict[str, dict[str, Any]] = {}
    momenta: dict[str, dict[str, float]] = {}
    for task, model in models.items():
        roles[task], momenta[task] = tensor_roles(model.network)
    shared: dict[tuple[tuple[str, ...], float], list[str]] = {}
    for name in dict.fromkeys(name for model in models.values() for name in model.shared_names):
        tasks = tuple(task for task, model in models.items() if name in model.shared_names)
        shared.setdefault((tasks, (steps or {}).get(name, 0.0)), []).append(name)
    members = [(tasks, False, names) for (tasks, _), names in shared.items()]
    members += [((task,), True, list(model.private_names)) for task, model in models.items() if model.private_names]
    groups: list[Group] = []
    for tasks, private, names in members:
        first = tasks[0]
        # The order is that of the state dict, because the layout has to be the same in every process.
        tensors = {name: tensor for name, tensor in live[first].items() if name in set(names)}
        for task in tasks[1:]:
            assert all(roles[task][name] == roles[first][name] for name in tensors)
        layout = make_layout(tensors, roles[first], momenta[first])
        values, counters = flatten(tensors, layout)
        name = f"{'private' if private else 'shared'}:{'+'.join(tasks)}"
        name += "'" * sum(group.tasks == tasks and group.private == private for group in groups)
        groups.append(Group(name, tasks, private, not private or workers[first] > 1, layout, values, counters))
    return groups
