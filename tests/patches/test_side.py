"""Promises of every side method: the host does not change, no gradient crosses it, and the shared steps are shared."""

import copy
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import patches
from patches import Backbone, PatchedModel, PatchError
from patches.side import side_of
from tests.patches.helpers import bits, images, network, randomise_side, small_backbone, small_transformer, train

EXAMPLES: list[tuple[str, str, dict[str, Any], int]] = [
    ("small_vit", "dtl", {}, 3),
    ("small_vit", "dtl_plus", {"first_block": 4}, 5),
    ("small_vit", "dtl_plus_star", {}, 2),
    ("small_swin", "dtl", {"first_block": 4}, 5),
    ("small_swin", "dtl_plus_star", {}, 2),
    ("small_vit", "mist", {}, 5),
    ("small_vit", "mist", {"k": 2}, 3),
    ("resnet18", "parasite", {"ratio": 0.1}, 10),
    ("mobilenet_v2", "parasite", {"ratio": 0.25}, 6),
]
"""Network, method, options, and the first step that is the task's own."""
examples = pytest.mark.parametrize(("name", "method", "options", "first"), EXAMPLES)
SIZE = {"mobilenet_v2": 16}


def fresh(name: str) -> Backbone:
    """Return a backbone with everything that train mode changes: dropout, stochastic depth, BatchNorm's statistics."""
    if name == "mobilenet_v2":
        return small_backbone(dropout=0.5)
    if name == "small_swin":
        return small_transformer(name, stochastic_depth_prob=0.5)
    backbone = small_transformer(name) if name == "small_vit" else copy.deepcopy(network(name))
    for module in backbone.network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    return backbone


def nodes(output: Tensor) -> Iterator[Any]:
    """Yield every node of the autograd graph of a tensor."""
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            yield node


def recorded(backbone: Backbone, model: PatchedModel, x: Tensor) -> dict[int, Tensor]:
    """Run the model once and return the output of each step's last module: step -> output."""
    found: dict[int, Tensor] = {}
    hooks = []
    for step in range(len(backbone.steps) - 1):
        paths = [path for path in backbone.paths(step, step + 1) if isinstance(getattr_path(model, path), nn.Module)]
        module = getattr_path(model, paths[-1])

        def note(_module: nn.Module, _inputs: Any, output: Tensor, step: int = step) -> None:
            found[step] = output.clone()

        hooks.append(module.register_forward_hook(note))
    model(x)
    for hook in hooks:
        hook.remove()
    return found


def getattr_path(model: PatchedModel, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    return getattr(model.network.get_submodule(parent), name)


@examples
def test_twenty_training_steps_leave_the_host_bit_identical(name: str, method: str, options: dict, first: int) -> None:
    backbone, size = fresh(name), SIZE.get(name, 32)
    x = images(2, size, seed=9)
    model = patches.attach(backbone, method, 3, **options)
    with torch.no_grad():
        logits = backbone.network(x)
    before, own = bits(dict(backbone.network.state_dict())), bits(model.private_state())
    train(model, steps=20, size=size, count=4)
    assert bits(model.private_state()) != own
    assert bits(dict(backbone.network.state_dict())) == before
    assert (model.first_private_block, max(model.reads)) == (first, first - 1)
    with torch.no_grad():
        assert torch.equal(backbone.network(x), logits)


def _whole(model: PatchedModel) -> list[nn.Module]:
    return [model]


def _bottom_up(model: PatchedModel) -> list[nn.Module]:
    return list(model.modules())[::-1]


@pytest.mark.parametrize("callees", [_whole, _bottom_up])
@pytest.mark.parametrize("clone", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@examples
def test_shared_steps_give_the_same_bits_to_every_task_in_train_mode(
    name: str, method: str, options: dict, first: int, clone: Callable, callees: Callable
) -> None:
    backbone, size = fresh(name), SIZE.get(name, 32)
    x = images(2, size)
    models = [clone(randomise_side(patches.attach(backbone, method, 3, **options), seed)) for seed in (1, 2)]
    with torch.no_grad():
        alone = {step: backbone.run(x, 0, step + 1) for step in range(first)}
    side = side_of(models[0].network)
    assert side is not None
    expected = side.condense({step: alone[step] for step in models[0].reads})
    runs = []
    for model in models:
        for module in callees(model):
            module.train()
        runs.append(model.shared_part(x))
        assert model.network.training
    for outputs in runs:
        assert outputs.keys() == expected.keys()
        assert all(torch.equal(output, expected[step]) for step, output in outputs.items())
    with torch.no_grad():
        assert not torch.equal(models[0].eval()(x), models[1].eval()(x))


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [(name, method, options) for name, method, options, _ in EXAMPLES if name.startswith("small")],
)
def test_no_activation_of_a_shared_step_requires_grad(name: str, method: str, options: dict) -> None:
    backbone, x = fresh(name), images(2, 32)
    model = randomise_side(patches.attach(backbone, method, 3, **options)).train()
    # The tail is left out, because some side networks run its modules on other tokens, or not at all.
    outputs = {s: y for s, y in recorded(backbone, model, x).items() if 0 < s <= backbone.num_blocks}
    # A shared block that ran a second time, with gradients, would show here too.
    needs = {step: output.requires_grad for step, output in outputs.items()}
    assert needs == {step: step >= model.first_private_block for step in needs}
    assert needs


@examples
def test_the_autograd_graph_ends_at_the_tasks_own_tensors(name: str, method: str, options: dict, first: int) -> None:
    backbone, size = fresh(name), SIZE.get(name, 32)
    model = randomise_side(patches.attach(backbone, method, 3, **options)).train()
    graph = list(nodes(model(images(2, size))))
    leaves = {node.variable.data_ptr() for node in graph if hasattr(node, "variable")}
    private = {t.data_ptr() for t in model.private_state().values() if isinstance(t, nn.Parameter)}
    assert leaves == private
    # Count the layers in the graph by type. A shared layer of the host in the graph would make the count too high.
    if method.startswith("dtl"):
        norms = 2 * (backbone.num_blocks - first + 1) + 1  # of the blocks after M, and the last one
        mergings = len([stage for stage in backbone.stages if stage >= first and stage > 1])
        assert sum("LayerNorm" in node.name() for node in graph) == norms + mergings
    if method == "mist":
        # The last LayerNorm. The backward pass computes the side network's other ones again, outside this graph.
        assert sum("LayerNorm" in node.name() for node in graph) == 1
        assert sum("_Recomputed" in node.name() for node in graph) == model.options["layers"]
    if method == "parasite":
        convolutions = [layer for layer in model.network.side.modules() if isinstance(layer, nn.Conv2d)]
        assert sum("Convolution" in node.name() for node in graph) == len(convolutions)


@pytest.mark.parametrize(("method", "options"), [("mist", {}), ("dtl", {"first_block": 4})])
def test_shared_outputs_are_let_go_on_the_way(method: str, options: dict) -> None:
    backbone = small_transformer("small_vit")
    model = patches.attach(backbone, method, 3, **options)
    given: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def note(_module: nn.Module, inputs: tuple[Tensor]) -> None:
        alive.append(sum(output() is not None for output in given))
        given.append(weakref.ref(inputs[0]))

    for block in range(1, 5):
        model.network.get_submodule(backbone.paths(block, block + 1)[-1]).register_forward_pre_hook(note)
    with torch.no_grad():
        model(images(2, 32))
    # Only MIST holds an earlier output: its sum starts as z0, which is still alive when the next block runs.
    assert alive == [0, 1 if method == "mist" else 0, 0, 0]


@examples
def test_shared_steps_run_without_autograd(name: str, method: str, options: dict, first: int) -> None:
    del first
    x = images(2, SIZE.get(name, 32)).requires_grad_()
    model = randomise_side(patches.attach(fresh(name), method, 3, **options))
    assert not any(output.requires_grad for output in model.shared_part(x).values())
    model(x).sum().backward()
    assert (x.grad is None) == (method != "parasite")  # the parasite reads the images itself


def test_joint_training_is_refused() -> None:
    model = patches.attach(small_transformer("small_vit"), "dtl", 3)
    with pytest.raises(PatchError, match=r"'dtl' stands on a frozen backbone.*train_shared: false"):
        model.set_shared_trainable(True)
    assert not model.shared_trainable
    assert not any(tensor.requires_grad for tensor in model.shared_state().values())


def test_running_part_of_a_side_model() -> None:
    backbone, x = small_transformer("small_vit"), images(2, 32)
    model = randomise_side(patches.attach(backbone, "dtl", 3))
    head, first = len(backbone.steps) - 1, model.first_private_block
    with torch.no_grad():
        assert torch.equal(model.run(x, 0, first), backbone.run(x, 0, first))
        assert torch.equal(model.run(backbone.run(x, 0, 1), 1, first), backbone.run(x, 0, first))
        features = model.run(x, 0, -1)
        assert torch.equal(model.network.heads(features), model(x))
        assert torch.equal(model.run(features, -1), model(x))
        assert torch.equal(model.run(x), model(x))
        for start, stop in ((0, first + 1), (first, None), (1, None), (0, head - 1)):
            with pytest.raises(PatchError, match="its side network reads several outputs"):
                model.run(x, start, stop)


def test_a_side_network_comes_from_its_seed_and_leaves_the_random_state_alone() -> None:
    backbone = small_transformer("small_vit")
    state = torch.get_rng_state()
    states = [bits(patches.attach(backbone, "dtl", 3, seed=seed).private_state()) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert states[0] == states[1] != states[2]
    # A head with the same number of inputs and the same distribution begins with other numbers.
    first = patches.attach(backbone, "mist", 3, seed=1, block="mlp").private_state()
    assert not torch.allclose(first["side.blocks.0.function.down.weight"][0], first["heads.head.weight"][0])


@examples
def test_a_side_network_takes_the_backbones_dtype(name: str, method: str, options: dict, first: int) -> None:
    del first
    backbone = fresh(name).to(torch.float64)
    model = patches.attach(backbone, method, 3, **options)
    assert {t.dtype for t in model.private_state().values() if t.is_floating_point()} == {torch.float64}
    with torch.no_grad():
        assert model(images(2, SIZE.get(name, 32), dtype=torch.float64)).dtype == torch.float64


def test_a_bundle_made_before_its_family_had_an_option_still_loads(tmp_path: Any, monkeypatch: Any) -> None:
    backbone = network("vit_b_16")
    model = patches.attach(backbone, "last_layer", 3)
    older = {"num_classes": 1000, "image_size": 32, "norm_momentum": None}
    now = Backbone.architecture
    with monkeypatch.context() as patched:
        patched.setattr(Backbone, "architecture", lambda self: {"name": self.name, "options": older})
        patches.save_bundle(model, tmp_path / "old.patch", classes=["a", "b", "c"], preprocessing={})
    assert now(backbone)["options"].keys() > older.keys()
    patches.verify_bundle(tmp_path / "old.patch", backbone)
    assert patches.inspect_bundle(tmp_path / "old.patch").backbone["options"] == older
