"""The backbone and the tasks' models of a job."""

import json
from collections.abc import Mapping
from dataclasses import asdict

import patches
from multitask.spec.errors import SpecError
from multitask.spec.schema import JobSpec, TaskSpec


def backbone_key(spec: JobSpec) -> str:
    """Equal for jobs whose backbones start from equal values: a file gives all of them, otherwise some are drawn."""
    from_file = (spec.backbone.weights or "").endswith((".safetensors", ".pth", ".pt"))
    return json.dumps([asdict(spec.backbone), None if from_file else spec.seed])


def load_backbone(spec: JobSpec, weights: str | None) -> patches.Backbone:
    """The job's backbone, with the spec's weights or, for its structure alone, with None."""
    backbone = spec.backbone
    return patches.load_backbone(backbone.name, weights, backbone.num_classes, seed=spec.seed, **backbone.options)


def attach_task(backbone: patches.Backbone, task: TaskSpec, spec: JobSpec) -> patches.PatchedModel:
    """A task's model as the job trains it, in train mode."""
    model = patches.attach(backbone, task.method, task.num_classes, seed=spec.seed, **task.options)
    model.set_shared_trainable(spec.train_shared)
    return model.train()


def check_training(spec: JobSpec, models: Mapping[str, patches.PatchedModel]) -> None:
    for task in spec.tasks:
        if not any(parameter.requires_grad for parameter in models[task.name].parameters()):
            raise SpecError(
                f"Task '{task.name}': method '{task.method}' owns no parameter, and with train_shared: false nothing "
                "else is trained. Set train_shared: true, or use a method that owns some."
            )
