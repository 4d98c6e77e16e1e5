"""The exponential moving average of a group's trained values, against its formula in float64."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multitask.server.group import ParameterGroup
from multitask.server.layout import Layout, Role, make_layout
from multitask.server.messages import AVERAGE, GroupValues, evaluated, whole
from multitask.server.optimizers import make_optimizer

ROLES = {
    "weight": Role.DECAYED,
    "bias": Role.PLAIN,
    "running_mean": Role.STATISTIC,
    "frozen": Role.FIXED,
    "num_batches_tracked": Role.COUNTER,
}


def layout_and_start() -> tuple[Layout, GroupValues]:
    random = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=random) for name, shape in zip(ROLES, ((5, 7), 9, 4, 3), strict=False)
    }
    tensors["num_batches_tracked"] = torch.tensor(3)
    layout = make_layout(tensors, ROLES, {"running_mean": 0.1})
    values = np.zeros(layout.pushed, np.float32)
    for slot in layout.slots[:3]:
        values[slot.offset : slot.offset + slot.size] = tensors[slot.name].numpy().ravel()
    return layout, GroupValues(values, np.array([3]))


def group_of(
    state: GroupValues, layout: Layout, ema: float | None, part: tuple[int, int] | None = None
) -> ParameterGroup:
    make = partial(make_optimizer, "sgd", weight_decay=0.01, momentum=0.9)
    return ParameterGroup(layout, state, make, 1.0, part, ema)


def pushes(layout: Layout, number: int, seed: int = 1) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(layout.pushed, generator=random) for _ in range(number)]


@pytest.mark.parametrize("ema", [0.5, 0.9, 0.999])
def test_the_average_follows_its_formula_and_training_follows_none_of_it(ema: float) -> None:
    layout, start = layout_and_start()
    group, without = group_of(start, layout, ema), group_of(start, layout, None)
    expected = start.values[: layout.trained].astype(np.float64)

    for push in pushes(layout, 30):
        group.apply(push, 0.1)
        without.apply(push, 0.1)
        expected = ema * expected + (1 - ema) * without.view().values[: layout.trained].astype(np.float64)

    state = group.state()
    np.testing.assert_allclose(state.slots[AVERAGE], expected, rtol=1e-5, atol=1e-6)
    assert np.array_equal(state.values, without.view().values)
    assert np.array_equal(group.view().values, without.view().values)
    shown = evaluated(state)
    assert np.array_equal(shown.values[: layout.trained], state.slots[AVERAGE])
    assert not np.array_equal(shown.values[: layout.trained], state.values[: layout.trained])
    # The running mean and the counter are those of the training.
    assert np.array_equal(shown.values[layout.trained :], state.values[layout.trained :])
    assert (shown.counters.tolist(), shown.slots) == ([33], {})


def test_a_group_without_an_average_is_evaluated_as_it_is() -> None:
    layout, start = layout_and_start()
    group = group_of(start, layout, None)
    group.apply(pushes(layout, 1)[0], 0.1)

    shown = evaluated(group.state(slots=True))

    assert shown.slots == {}
    assert np.array_equal(shown.values, group.view().values)


@given(st.integers(1, 3), st.integers(0, 4), st.integers(1, 4))
def test_shards_and_restored_groups_have_the_bits_of_one_that_is_whole(shards: int, before: int, after: int) -> None:
    layout, start = layout_and_start()
    given_pushes = pushes(layout, before + after)
    one = group_of(start, layout, 0.9)
    for push in given_pushes:
        one.apply(push, 0.1)

    def advanced(state: GroupValues, taken: list[torch.Tensor]) -> GroupValues:
        """Return the state after some pushes, of shards that begin with a state."""
        parts = []
        for begin, end in layout.ranges(shards):
            part = group_of(state, layout, 0.9, (begin, end))
            for push in taken:
                part.apply(push[begin:end], 0.1)
            parts.append(part.state(slots=True))
        return whole(parts)

    found = advanced(advanced(start, given_pushes[:before]), given_pushes[before:])

    wanted = one.state(slots=True)
    assert found.slots.keys() == wanted.slots.keys() == {AVERAGE, "momentum_buffer"}
    assert all(np.array_equal(found.slots[name], wanted.slots[name]) for name in wanted.slots)
    assert np.array_equal(found.values, wanted.values)
    assert np.array_equal(evaluated(found).values, evaluated(wanted).values)


def test_a_group_whose_average_is_new_begins_it_with_its_values_and_one_that_is_dropped_is_forgotten() -> None:
    layout, start = layout_and_start()
    group = group_of(start, layout, None)
    group.apply(pushes(layout, 1)[0], 0.1)
    state = group.state(slots=True)

    begun = group_of(state, layout, 0.9).state(slots=True)
    assert np.array_equal(begun.slots[AVERAGE], state.values[: layout.trained])
    assert group_of(begun, layout, None).state(slots=True).slots.keys() == {"momentum_buffer"}
