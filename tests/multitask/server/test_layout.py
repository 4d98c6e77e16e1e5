import pytest
import torch
from torch import nn

from multitask.server.layout import Role, bind, flatten, make_layout, named_tensors, tensor_roles


def make_network() -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5, momentum=0.3), nn.Conv2d(5, 2, 1))
    network[2].weight.requires_grad_(False)
    return network


def layout_of(network: nn.Module):
    return make_layout(named_tensors(network), *tensor_roles(network))


def test_roles_follow_gradients_dimensions_and_the_norms_mode() -> None:
    network = make_network()

    roles, momenta = tensor_roles(network)

    assert roles == {
        "0.weight": Role.DECAYED,
        "1.weight": Role.PLAIN,
        "1.bias": Role.PLAIN,
        "1.running_mean": Role.STATISTIC,
        "1.running_var": Role.STATISTIC,
        "1.num_batches_tracked": Role.COUNTER,
        "2.weight": Role.FIXED,
        "2.bias": Role.PLAIN,
    }
    assert momenta == {"1.running_mean": 0.3, "1.running_var": 0.3}
    frozen, _ = tensor_roles(network.eval())
    assert {frozen["1.running_mean"], frozen["1.num_batches_tracked"]} == {Role.FIXED, Role.FIXED_COUNTER}


def test_views_are_aligned_disjoint_and_sections_hold_their_roles() -> None:
    network = make_network()
    layout = layout_of(network)

    floats = [slot for slot in layout.slots if slot.role < Role.COUNTER]
    covered = [index for slot in floats for index in range(slot.offset, slot.offset + slot.size)]

    assert len(covered) == len(set(covered)) == sum(tensor.numel() for tensor in network.state_dict().values()) - 1
    assert all(slot.offset % 16 == 0 for slot in floats)
    starts = (0, *layout.ends)
    assert all(starts[slot.role] <= slot.offset < layout.ends[slot.role] for slot in floats)
    assert layout.pushed == layout.ends[Role.STATISTIC] < layout.size
    assert layout.parameters == sum(parameter.numel() for parameter in network.parameters())


def test_a_bound_network_computes_the_same_and_writes_into_the_buffers() -> None:
    network, bound = make_network(), make_network()
    layout = layout_of(bound)
    values, counters = flatten(named_tensors(bound), layout)
    gradients = torch.zeros(layout.pushed)
    bind(bound, layout, values, counters, gradients)
    images = torch.randn(4, 3, 8, 8)

    outputs = [model(images) for model in (network, bound)]
    for output in outputs:
        output.square().mean().backward()

    assert torch.equal(*outputs)
    slots = {slot.name: slot for slot in layout.slots}
    assert torch.equal(slots["0.weight"].view(gradients), network[0].weight.grad)
    assert torch.equal(slots["1.running_var"].view(values), network[1].running_var)
    assert counters[0] == 1
    assert not torch.equal(network[1].running_var, torch.ones(5))


def test_a_norm_with_a_cumulative_average_is_refused() -> None:
    with pytest.raises(ValueError, match="momentum None"):
        tensor_roles(nn.Sequential(nn.BatchNorm2d(3, momentum=None)))


def test_half_precision_is_refused_with_the_tensors_name() -> None:
    network = make_network().half()
    with pytest.raises(ValueError, match=r"'0\.weight' has dtype torch\.float16"):
        layout_of(network)
