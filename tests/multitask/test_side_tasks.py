"""Side networks train through the same jobs as other patches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import multitask
import patches
from multitask.job.job import Job
from multitask.spec.schema import JobSpec
from patches import PatchBank, PatchError

MakeSpec = Callable[..., JobSpec]
VIT = {
    "name": "vit_b_16",
    "num_classes": 4,
    "options": {"image_size": 8, "patch_size": 4, "num_layers": 3, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 16},
}
JOBS: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "vit": (
        {"backbone": VIT},
        {"pets": {"method": "dtl_plus", "options": {"kernel_size": 3}}, "cars": {"method": "mist"}},
    ),
    # Its private BatchNorm statistics travel as any patch's.
    "convolutional": (
        {},
        {"pets": {"method": "parasite", "options": {"ratio": 0.5}}, "cars": {"method": "last_layer"}},
    ),
}


@pytest.mark.parametrize("name", JOBS)
def test_a_job_trains_side_tasks_and_exports_bundles_that_share_their_steps(name: str, make_spec: MakeSpec) -> None:
    changes, tasks = JOBS[name]
    spec = make_spec(tasks, train_shared=False, **changes)
    host, own = Job(spec).state({})

    run = multitask.train(spec)
    models = run.models("last")[1]
    export = run.export()
    backbone = patches.open_export(export.backbone.parent).backbone

    assert all(torch.equal(tensor, host[key]) for key, tensor in backbone.network.state_dict().items())
    bank, x = PatchBank(backbone), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for task in tasks:
        bank.add(task, export.bundles[task])
        trained = models[task].private_state()
        assert {key for key in trained if not torch.equal(trained[key], own[task][key])} >= {
            key for key in trained if key.endswith((".c", "out.weight", "running_mean", "head.weight"))
        }
    logits = bank.all_tasks(x)
    with torch.no_grad():
        for task in tasks:
            assert torch.equal(logits[task], patches.load_bundle(export.bundles[task], backbone)(x))


def test_joint_training_of_a_side_task_is_refused(make_spec: MakeSpec) -> None:
    with pytest.raises(PatchError, match=r"'dtl' stands on a frozen backbone.*train_shared: false"):
        Job(make_spec({"pets": {"method": "dtl"}}, backbone=VIT, train_shared=True))
