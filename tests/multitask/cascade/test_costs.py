from pathlib import Path

import pytest
import torch
from torchvision.models import MobileNet_V2_Weights, ViT_B_16_Weights

import patches
from multitask.cascade import CascadeError, Costs, count_macs, measure_latency, read_costs
from multitask.cascade.costs import cost_text
from patches import Preprocessing
from tests.patches.helpers import small_backbone, small_transformer

PLAIN = {"mean": [0.5] * 3, "std": [0.5] * 3}
SMALL = Preprocessing.from_json({"resolution": 16, **PLAIN})
LARGE = Preprocessing.from_json({"resolution": 32, **PLAIN})


@pytest.mark.parametrize(
    ("name", "weights"),
    [("mobilenet_v2", MobileNet_V2_Weights.IMAGENET1K_V1), ("vit_b_16", ViT_B_16_Weights.IMAGENET1K_V1)],
)
def test_macs_are_those_that_torchvision_states(name: str, weights: MobileNet_V2_Weights) -> None:
    model = patches.attach(patches.load_backbone(name), "last_layer", 1000)
    counted = count_macs({"model": model}, {"model": Preprocessing.from_json({"resolution": 224, **PLAIN})})

    assert counted.unit == "MACs"
    assert counted.alone["model"] / 1e9 == pytest.approx(weights.value.meta["_ops"], abs=5e-4)


def test_macs_of_a_small_transformer_are_those_of_its_formula() -> None:
    model = patches.attach(small_transformer("small_vit"), "last_layer", 5)
    blocks, tokens, width, hidden = 4, 17, 16, 24
    per_block = tokens * (4 * width * width + 2 * width * hidden) + 2 * tokens * tokens * width
    patch_embedding = 16 * (3 * 8 * 8) * width

    assert count_macs({"vit": model}, {"vit": LARGE}).alone["vit"] == patch_embedding + blocks * per_block + width * 5
    assert torch.backends.mha.get_fastpath_enabled()


def test_steps_that_two_models_share_on_equal_pixels_are_paid_once() -> None:
    backbone = small_backbone()
    models = {
        "one": patches.attach(backbone, "last_layer", 3),
        "other": patches.attach(backbone, "last_layer", 4),
        "far": patches.attach(backbone, "last_layer", 4),
        "norms": patches.attach(backbone, "scale_bias", 4),
    }
    views = {"one": SMALL, "other": SMALL, "far": LARGE, "norms": SMALL}
    costs = count_macs(models, views)

    head_of_other = 32 * 4
    assert costs.after("other", ["one"]) == head_of_other
    assert costs.after("one", ["other"]) == 32 * 3
    assert costs.after("far", ["one"]) == costs.alone["far"]  # other pixels
    assert costs.after("norms", ["one"]) == costs.alone["norms"]  # its first step is its own already
    assert costs.after("one", ["one"]) == 0
    assert costs.after("other", []) == costs.alone["other"] == costs.alone["norms"]


def test_latency_is_a_positive_time_and_a_prefix_no_longer_than_the_whole() -> None:
    backbone = small_backbone()
    models = {"one": patches.attach(backbone, "last_layer", 3), "other": patches.attach(backbone, "last_layer", 4)}
    found = measure_latency(models, dict.fromkeys(models, SMALL), batch_size=2, repeats=2)

    assert found.unit == "ms"
    assert all(cost > 0 for cost in found.alone.values())
    assert found.after("other", ["one"]) >= 0


def test_a_column_of_the_users_is_read(tmp_path: Path) -> None:
    file = tmp_path / "costs.csv"
    file.write_text("model,energy_mj,price\na,1.5,3\nb,4,5\n")

    assert read_costs(file, "energy_mj") == Costs("energy_mj", {"a": 1.5, "b": 4.0})
    with pytest.raises(CascadeError, match="Did you mean 'price'"):
        read_costs(file, "prize")
    file.write_text("model,price\na,cheap\n")
    with pytest.raises(CascadeError, match="model 'a': found 'cheap' as price"):
        read_costs(file, "price")
    file.write_text("model,price\na,0\n")
    with pytest.raises(CascadeError, match="found a cost of 0"):
        read_costs(file, "price")


@pytest.mark.parametrize(
    ("cost", "unit", "text"),
    [
        (300_774_272.0, "MACs", "300.8M"),
        (4.09e9, "MACs", "4.09G"),
        (56_000.0, "MACs", "56k"),
        (90.0, "MACs", "90"),
        (0.123456, "ms", "0.1235"),
        (123_456.7, "energy", "123,457"),
    ],
)
def test_a_cost_is_readable(cost: float, unit: str, text: str) -> None:
    assert cost_text(cost, unit) == text
