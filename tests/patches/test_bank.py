"""Many tasks over one backbone: each gives the same bits as its model alone, and the shared steps run once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import patches
from patches import Backbone, BundleError, PatchBank, PatchedModel, PatchError
from patches.methods.mist import MistNetwork
from tests.patches.helpers import images, network, randomise_side, small_backbone, small_transformer, train

TASKS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "small_vit": [
        ("dtl", {}),
        ("dtl", {"first_block": 3}),
        ("dtl_plus", {}),
        ("dtl_plus_star", {}),
        ("mist", {}),
        ("mist", {"k": 2}),
        ("last_layer", {}),
        ("scale_bias+last_layer", {}),
        ("full", {}),
    ],
    "small_swin": [("dtl", {}), ("dtl_plus_star", {}), ("last_layer", {}), ("scale_bias", {})],
    "resnet18": [
        ("parasite", {"ratio": 0.1}),
        ("parasite", {"ratio": 0.2, "join": "add"}),
        ("last_layer", {}),
        ("norm_statistics+last_layer", {}),
    ],
    "mobilenet_v2": [
        ("parasite", {"ratio": 0.25}),
        ("depthwise+last_layer", {}),
        ("last_layer", {}),
        ("scale_bias", {}),
        ("shared", {}),
    ],
}


def backbone_named(name: str) -> Backbone:
    return small_backbone() if name == "mobilenet_v2" else network(name)


def bank_of(backbone: Backbone, name: str) -> tuple[PatchBank, dict[str, PatchedModel]]:
    """Return a bank with a task for each entry of TASKS, and the tasks' models."""
    bank, models = PatchBank(backbone), {}
    for number, (method, options) in enumerate(TASKS[name]):
        model = randomise_side(patches.attach(backbone, method, 3 + number, seed=number, **options), number)
        train(model, steps=1, size=32, count=4)
        models[f"task{number}"] = model.train()
        bank.add(f"task{number}", model)
    return bank, models


@pytest.mark.parametrize("name", TASKS)
def test_all_tasks_give_the_bits_of_each_alone_and_of_the_host(name: str) -> None:
    backbone, x = backbone_named(name), images(3, 32)
    bank, models = bank_of(backbone, name)
    bank.add("host")
    logits = bank.all_tasks(x)
    assert tuple(logits) == bank.tasks == (*models, "host")
    with torch.no_grad():
        for task, model in models.items():
            assert logits[task].shape == (3, model.num_classes)
            assert torch.equal(logits[task], model(x)), model.method
        assert torch.equal(logits["host"], backbone.network(x))
    assert not any(tensor.requires_grad for tensor in logits.values())


def test_tasks_a_b_a_give_the_same_bits() -> None:
    backbone, x = network("small_vit"), images(3, 32)
    bank, _ = bank_of(backbone, "small_vit")
    together = bank.all_tasks(x)
    for task in ("task0", "task4", "task0", "task7", "task4"):
        alone = bank.all_tasks(x, [task])
        assert tuple(alone) == (task,)
        assert torch.equal(alone[task], together[task])


@pytest.mark.parametrize(
    ("name", "first_private"),
    [("small_vit", [("dtl", {}), ("dtl_plus", {}), ("mist", {"k": 1})]), ("resnet18", TASKS["resnet18"][:3])],
)
def test_shared_steps_run_once_and_a_rest_once_for_each_task(name: str, first_private: list) -> None:
    backbone = network(name)
    bank = PatchBank(backbone)
    calls: dict[str, int] = {}

    def count(owner: str, copy: Backbone) -> None:
        for block in range(1, copy.num_blocks + 1):
            module = copy.network.get_submodule(copy.paths(block, block + 1)[-1])

            def note(*_: Any, key: str = f"{owner}{block}") -> None:
                calls[key] = calls.get(key, 0) + 1

            module.register_forward_pre_hook(note)

    count("shared", bank.trunk)
    for number, (method, options) in enumerate(first_private):
        model = patches.attach(backbone, method, 3, **options)
        bank.add(f"task{number}", model)
        count(f"task{number} ", model.as_backbone())
    bank.all_tasks(images(2, 32))
    if name == "small_vit":
        # DTL's M is 2 of 4 blocks. MIST runs no block of its own after the shared ones.
        assert calls == {"shared1": 1, "shared2": 1, "task0 3": 1, "task0 4": 1, "task1 3": 1, "task1 4": 1}
    else:
        assert calls == {f"shared{block}": 1 for block in range(1, 9)}


def test_mist_sums_the_maps_once_for_all_its_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[int] = []
    condense = MistNetwork.condense

    def noted(self: MistNetwork, outputs: Mapping[int, Tensor]) -> dict[int, Tensor]:
        sums.append(max(self.reads))
        return condense(self, outputs)

    monkeypatch.setattr(MistNetwork, "condense", noted)
    backbone = network("small_vit")
    bank = PatchBank(backbone)
    for number, k in enumerate((4, 2, 4, 4)):
        bank.add(f"task{number}", patches.attach(backbone, "mist", 3, k=k))
    bank.all_tasks(images(2, 32))
    assert sums == [4, 2]


def test_a_bundle_joins_by_its_path(tmp_path: Path) -> None:
    backbone, x = small_transformer("small_vit"), images(2, 32)
    model = randomise_side(patches.attach(backbone, "dtl", 3))
    patches.save_bundle(model, tmp_path / "task.patch", classes=["a", "b", "c"], preprocessing={})
    bank = PatchBank(backbone)
    bank.add("task", tmp_path / "task.patch")
    with torch.no_grad():
        assert torch.equal(bank.all_tasks(x)["task"], model(x))
    with pytest.raises(BundleError, match="found none"):
        bank.add("other", tmp_path / "none.patch")
    assert bank.tasks == ("task",)


def test_a_backbone_in_train_mode_answers_as_in_eval_mode() -> None:
    backbone, x = small_transformer("small_swin", stochastic_depth_prob=0.9), images(2, 32)
    bank = PatchBank(backbone)
    bank.add("host")
    expected = bank.all_tasks(x)["host"]
    backbone.network.train()
    assert torch.equal(bank.all_tasks(x)["host"], expected)
    assert backbone.network.training


def test_what_a_bank_refuses() -> None:
    backbone = small_transformer("small_vit")
    bank = PatchBank(backbone)
    bank.add("pets", patches.attach(backbone, "dtl", 3))
    with pytest.raises(PatchError, match="has a task 'pets' already"):
        bank.add("pets")
    with pytest.raises(PatchError, match="attached to another backbone"):
        bank.add("cars", patches.attach(small_transformer("small_vit"), "dtl", 3))
    with pytest.raises(PatchError, match="attached to another backbone"):
        bank.add("cars", patches.attach(small_backbone(), "last_layer", 3))
    with pytest.raises(PatchError, match=r"Unknown task of this bank 'pet'\. Did you mean 'pets'"):
        bank.all_tasks(images(1, 32), ["pet"])
    assert bank.tasks == ("pets",)
