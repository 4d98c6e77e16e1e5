"""Buckets, and the sums of four gloo processes against a mean that one process computes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from multitask.cluster.collectives import TorchMembers
from multitask.engines.reduction import Bucket, Reduction, plan_buckets
from multitask.server.layout import Layout, Role, bind, flatten, make_layout, named_tensors, tensor_roles
from multitask.server.shard import mean, shares

STEPS, RATE = 200, 0.05
WEIGHTS = (1.0, 2.0, 1.0, 3.0)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 20), nn.BatchNorm1d(20), nn.Linear(20, 3)).train()


def layout_of(net: nn.Module) -> Layout:
    return make_layout(named_tensors(net), *tensor_roles(net))


class Part:
    """One worker's network in float64 with its own data; the network's tensors are views of flat buffers."""

    def __init__(self, number: int) -> None:
        self.layout = layout_of(network())
        flat, self.counters = flatten(named_tensors(network()), self.layout)
        self.values = flat.double()
        self.gradients = torch.zeros(self.layout.pushed, dtype=torch.float64)
        self.net = network().double()
        bind(self.net, self.layout, self.values, self.counters, self.gradients)
        self._random = torch.Generator().manual_seed(number)

    def backward(self) -> None:
        self.gradients.zero_()
        x = torch.randn(16, 6, generator=self._random, dtype=torch.float64)
        nn.functional.cross_entropy(self.net(x), x[:, :3].argmax(1)).backward()

    def step(self, gradient: Tensor) -> None:
        self.values[: self.layout.trained] -= RATE * gradient[: self.layout.trained]


def rank(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=4)
    part = Part(number)
    world = dist.group.WORLD
    assert world is not None
    plan = plan_buckets({"all": part.layout}, size_mb=0.0001)
    assert len(plan) > 3
    reduction = Reduction(plan, {"all": part.gradients}, {"all": TorchMembers(world)})
    reduction.watch(named_tensors(part.net))
    factors, divisor = shares(WEIGHTS)
    for _ in range(STEPS):
        reduction.arm({"all": factors[number]})
        part.backward()
        part.step(reduction.finish()["all"] / divisor)
    # A gradient that is not finite is left out of a second sum, and changes no bit of the others'.
    part.gradients.fill_(float("nan") if number == 3 else 1.0 + number)
    part.gradients[0] = -0.0
    reduction.arm({"all": 1.0})
    assert bool(reduction.finish()["all"][1:].isnan().all())
    second = reduction.again("all", None if number == 3 else 1.0)
    assert bool((second[1:] == 6.0).all())
    assert bool(second[0].signbit())
    torch.save(part.values, f"{folder}/{number}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_four_processes_drift_from_the_mean_of_sync_by_less_than_a_millionth(tmp_path: Path) -> None:
    """In float64, by SGD, with four weights: sums in another order differ only in the last bits.

    The trainer's own buffers are float32, where these differences grow with every step. This test is about the sums.
    """
    parts = [Part(number) for number in range(4)]
    start = parts[0].values.clone()
    for _ in range(STEPS):
        for part in parts:
            part.backward()
        gradient = mean([part.gradients.clone() for part in parts], WEIGHTS)
        for part in parts:
            part.step(gradient)

    mp.start_processes(rank, (str(tmp_path),), nprocs=4, start_method="spawn")

    trained = slice(0, parts[0].layout.trained)
    found = [torch.load(tmp_path / f"{number}.pt", weights_only=True)[trained] for number in range(4)]
    expected = parts[0].values[trained]
    assert all(torch.equal(values, found[0]) for values in found)
    assert float((found[0] - expected).norm() / expected.norm()) < 1e-6
    assert float((found[0] - start[trained]).norm() / expected.norm()) > 0.1


def test_buckets_cover_a_group_from_its_end_and_statistics_come_last() -> None:
    layout = layout_of(network())
    plan = plan_buckets({"all": layout}, size_mb=0.0001)
    weights, last = plan[:-1], plan[-1]

    assert [bucket.start for bucket in weights] == sorted((b.start for b in weights), reverse=True)
    assert [name for bucket in weights for name in bucket.tensors] == ["4.weight", "2.weight", "0.weight"]
    assert last == Bucket("all", layout.ends[Role.DECAYED], layout.pushed, last.tensors, last=True)
    assert set(last.tensors) == {"0.bias", "2.bias", "3.weight", "3.bias", "4.bias"}
    assert sum(bucket.stop - bucket.start for bucket in plan) == layout.pushed


def test_groups_take_turns_by_how_far_they_are() -> None:
    layouts = {"a": layout_of(network()), "b": layout_of(network())}
    plan = plan_buckets(layouts, size_mb=0.0001)
    assert [bucket.group for bucket in plan] == ["a", "b"] * (len(plan) // 2)


def test_large_buckets_hold_everything() -> None:
    assert [bucket.last for bucket in plan_buckets({"all": layout_of(network())}, size_mb=64)] == [False, True]


@pytest.mark.parametrize(("weights", "expected"), [((2.0, 2.0), ((1.0, 1.0), 2.0)), ((2.0, 1.0), ((2.0, 1.0), 3.0))])
def test_equal_weights_cancel(weights: tuple, expected: tuple) -> None:
    assert shares(weights) == expected
    gradients = [torch.tensor([1.0]), torch.tensor([4.0])]
    factors, divisor = expected
    total = sum((g * f for g, f in zip(gradients, factors, strict=True)), torch.zeros(1))
    assert torch.equal(mean(gradients, weights), total / divisor)
