"""The backbone and the tasks' models of a job."""

import json
from collections.abc import Mapping
from dataclasses import asdict

import torch

import patches
from multitask.spec.errors import SpecError
from multitask.spec.schema import JobSpec, TaskSpec
from patches.weights import is_weights_file


def backbone_key(spec: JobSpec) -> str:
    """Return a key that is equal for jobs whose backbones start from equal values.

    Without a weights file some of the values are drawn at random, so the key then has the seed.
    """
    from_file = is_weights_file(spec.backbone.weights or "")
    return json.dumps([asdict(spec.backbone), None if from_file else spec.seed])


def load_backbone(spec: JobSpec, weights: str | None) -> patches.Backbone:
    """Load the job's backbone in float32, in which the server keeps and trains all values.

    Args:
        weights: the spec's weights, of any floating dtype; None where only the structure is needed.
    """
    backbone = spec.backbone
    loaded = patches.load_backbone(backbone.name, weights, backbone.num_classes, seed=spec.seed, **backbone.options)
    return loaded.to(torch.float32)


def attach_task(backbone: patches.Backbone, task: TaskSpec, spec: JobSpec) -> patches.PatchedModel:
    """Return a task's model in train mode, in which the tensors that the job trains require gradients."""
    model = patches.attach(backbone, task.method, task.num_classes, seed=spec.seed, **task.options)
    model.set_shared_trainable(spec.train_shared)
    return model.train()


def check_training(spec: JobSpec, models: Mapping[str, patches.PatchedModel]) -> None:
    """Check that every task has a parameter to train, and one of its own if it averages them.

    Raises:
        SpecError: a task has none.
    """
    for task in spec.tasks:
        trained = {name for name, parameter in models[task.name].network.named_parameters() if parameter.requires_grad}
        if task.ema is not None and not trained.intersection(models[task.name].private_names):
            raise SpecError(
                f"Task '{task.name}': ema averages the task's own parameters, but method '{task.method}' owns none. "
                "Leave ema out, or use a method that owns parameters."
            )
        if not any(parameter.requires_grad for parameter in models[task.name].parameters()):
            raise SpecError(
                f"Task '{task.name}': method '{task.method}' owns no parameter, and train_shared is false, so "
                "nothing would be trained. Set train_shared: true, or use a method that owns parameters."
            )
