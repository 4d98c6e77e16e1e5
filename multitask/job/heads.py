"""The tasks' models with a head for each class list. What a model's outputs mean is decided here, once for a run."""

from collections.abc import Mapping
from dataclasses import replace

from multitask.data.classes import shown
from multitask.job.models import attach_task
from multitask.spec.errors import SpecError
from multitask.spec.schema import JobSpec, TaskSpec
from patches import Backbone, PatchedModel

Classes = tuple[str, ...]
"""Class names of a model, one for each output, in the order of the outputs."""


def attach_tasks(
    backbone: Backbone,
    spec: JobSpec,
    tables: Mapping[str, Classes],
    kept: Mapping[str, Classes],
    stand_ins: bool = False,
) -> tuple[JobSpec, dict[str, PatchedModel], dict[str, Classes]]:
    """Attach every task of a job, with as many outputs as the task has classes.

    Args:
        tables: task -> the class list of its training table.
        kept: task -> the class list that it has already, for the tasks that have been trained before.
        stand_ins: the tables only stand in for others with more classes. Missing names are then made up.
    Returns:
        The spec, in which a task without `num_classes` has one if its method owns the head and the backbone's head has
        another size; task -> its model in train mode; and task -> its class list.
    Raises:
        SpecError: a head has another number of outputs than its task has classes, or tasks that share the backbone's
            head have different classes.
        PatchError: a method does not fit the backbone.
    """
    classes = {task.name: kept.get(task.name, tables[task.name]) for task in spec.tasks}
    models, tasks = {}, []
    for task in spec.tasks:
        model, wanted = attach_task(backbone, task, spec), len(classes[task.name])
        if model.head == "private" and task.num_classes is None and model.num_classes != wanted:
            task = replace(task, num_classes=wanted)
            model = attach_task(backbone, task, spec)
        models[task.name] = model
        tasks.append(task)
    sharing = [name for name, model in models.items() if model.head == "shared"]
    first = next((name for name in sharing if name in kept), sharing[0] if sharing else None)
    for name in sharing:
        assert first is not None
        if set(classes[name]) != set(classes[first]):
            raise SpecError(
                f"Tasks '{first}' and '{name}' share the backbone's head, but their classes differ: "
                f"{shown(classes[first], classes[name])}, and {shown(classes[name], classes[first])}. Give their "
                "tables the same classes, or add '+last_layer' to their method so that each task has a head of its own."
            )
        classes[name] = classes[first]
    for task in tasks:
        if stand_ins:
            missing = range(len(classes[task.name]), models[task.name].num_classes)
            classes[task.name] += tuple(f"stand-in {number}" for number in missing)
        _check_head(task, models[task.name], classes[task.name])
    return replace(spec, tasks=tuple(tasks)), models, classes


def _check_head(task: TaskSpec, model: PatchedModel, classes: Classes) -> None:
    """Check that a model has exactly one output for each class.

    Raises:
        SpecError: it has more or fewer.
    """
    count = len(classes)
    if model.num_classes == count:
        return
    if model.head == "shared":
        whose = f"the backbone's own head, which method '{task.method}' shares,"
        advice = (
            f"Set backbone.num_classes to {count}, add '+last_layer' to the method so that the task gets a head of its "
            f"own, or set tasks.num_classes to {count} for a head of its own that is not trained"
        )
    else:
        whose = "its head"
        advice = f"Set tasks.num_classes to {count}" + (" or leave it out" if model.head == "private" else "")
    raise SpecError(
        f"Task '{task.name}': its data has {count} classes ({shown(classes)}), but {whose} has {model.num_classes} "
        f"outputs. {advice}, or import the data with the class list that the head was made for."
    )
