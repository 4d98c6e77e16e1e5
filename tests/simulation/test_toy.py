"""The toy job on engine `local`, against the formulas: only then can its values prove anything about other engines."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from multitask.errors import TrainingError
from multitask.server.messages import Evaluation, GroupValues
from multitask.spec.reading import dump_spec, load_spec
from tests.conftest import EngineRun, run_engine, store_of
from tests.simulation import formulas
from tests.simulation.behaviour import Behaviour, StepFault, StillClock, step_of
from tests.simulation.formulas import PrivateTensors, ToyPush, ToyUpdate
from tests.simulation.toy import ToyConfig, ToyJob, ToyTask, ToyWorld

STEPS = 20
TASKS = (
    ToyTask(name="a", shares=("body", "pair")),
    ToyTask(name="b", shares=("body", "pair"), rows=3, weight=2.0),
    ToyTask(name="c", workers=2, rows=2, skips=True),
)
ROW = {"a": 0, "b": 3, "c": 6}
ROUNDS = {"name": "local", "schedule": "rounds"}
SLOTS = {"name": "sgd", "rate": 1.0, "momentum": 0.5}


@pytest.fixture
def config(tmp_path: Path) -> ToyConfig:
    return ToyConfig(tasks=TASKS, directory=str(tmp_path), checkpoints={"every_rounds": 4, "every_minutes": None})


def run(config: ToyConfig, behaviour: Behaviour | None = None) -> EngineRun:
    return run_engine(ToyJob(config.spec(), ToyWorld(behaviour)))


def tensors(job: ToyJob, evaluation: Evaluation, group: str) -> dict[str, np.ndarray]:
    """Return the tensors of a group by name."""
    return {name: tensor.numpy() for name, tensor in job.groups[group].tensors(evaluation.groups[group]).items()}


def assert_private(found: dict[str, np.ndarray], expected: PrivateTensors) -> None:
    np.testing.assert_array_equal(found["patch.learned"], expected.learned)
    np.testing.assert_array_equal(found["patch.total"], expected.total)
    np.testing.assert_array_equal(found["patch.norm.running_mean"], expected.mean)
    np.testing.assert_array_equal(found["patch.norm.running_var"], expected.variance)
    assert found["patch.norm.num_batches_tracked"] == expected.updates


def rows_that_train(*tasks: str) -> list[int]:
    return [ROW[task.name] + rank for task in TASKS if task.name in tasks for rank in range(task.workers)]


def test_each_push_counts_once_in_the_groups_of_its_task(config: ToyConfig) -> None:
    ran = run(config)

    last = ran.outcome.versions["last"]
    for group, part, tasks in (("shared:a+b+c", "body", "abc"), ("shared:a+b", "pair", "ab")):
        counts = tensors(ran.job, last, group)[f"{part}.counts"]
        expected = np.zeros((9, STEPS))
        expected[rows_that_train(*tasks)] = 1
        np.testing.assert_array_equal(formulas.times_applied(counts, rate=1.0), expected)
    assert last.version == len(ran.records) == 4 * STEPS


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_private_tensors_and_slots_are_those_of_the_formulas(config: ToyConfig, momentum: float) -> None:
    ran = run(replace(config, optimizer={**SLOTS, "momentum": momentum}))

    alone = formulas.steps_of_one(range(STEPS), rate=0.5)
    in_turn = [ToyUpdate((ToyPush(rank, step),), 0.5) for step in range(STEPS) for rank in range(2)]
    checkpoint = store_of(ran.job).latest()
    assert checkpoint is not None
    for task, updates in (("a", alone), ("b", alone), ("c", in_turn)):
        expected = formulas.private_after(task, updates, STEPS, momentum)
        assert_private(tensors(ran.job, ran.outcome.versions["last"], f"private:{task}"), expected)
        if momentum:
            slots = checkpoint.tensors[f"slots/momentum_buffer/tasks/{task}/patch.learned"].numpy()
            np.testing.assert_array_equal(slots, expected.slots[0])
            assert (slots != 0).any()


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_rounds_average_what_turns_apply_one_by_one(config: ToyConfig, momentum: float) -> None:
    changed = replace(config, optimizer={**SLOTS, "momentum": momentum})
    weights = {0: 1.0, 3: 2.0, 6: 1.0, 7: 1.0}
    pushes = [[ToyPush(row, step, weight) for row, weight in weights.items()] for step in range(STEPS)]
    rounds = [ToyUpdate(tuple(row), 1.0) for row in pushes]
    turns = [ToyUpdate((push,), 1.0) for row in pushes for push in row]

    for engine, updates in ((ROUNDS, rounds), ({"name": "local"}, turns)):
        ran = run(replace(changed, engine=engine))
        last = ran.outcome.versions["last"]
        counts = tensors(ran.job, last, "shared:a+b+c")["body.counts"]
        np.testing.assert_array_equal(counts, formulas.counts_after(updates, (9, STEPS), momentum))
        assert last.version == len(updates)
        if engine != ROUNDS:
            np.testing.assert_array_equal(formulas.times_applied(counts, 1.0, momentum) > 0, counts > 0)
            assert formulas.times_applied(counts, 1.0, momentum).max() == 1


def test_metrics_and_losses_can_be_recomputed(config: ToyConfig) -> None:
    ran = run(config)

    assert [evaluation.round for evaluation in ran.evaluations] == [5, 10, 15, 20]
    for evaluation in ran.evaluations:
        for task in TASKS:
            groups = {name: evaluation.groups[name] for name in ran.job.groups_of(task.name)}
            assert evaluation.metrics[task.name] == formulas.metrics_of(groups)
    assert len({evaluation.metrics["a"]["top1"] for evaluation in ran.evaluations}) == 4
    assert all(record.loss == formulas.loss_of(record.worker, record.step) for record in ran.records)
    assert {record.images for record in ran.records if record.task == "b"} == {3}


def test_two_runs_are_equal_bit_for_bit(config: ToyConfig) -> None:
    first, second = run(config), run(config)

    assert first.records[0].seconds == pytest.approx(Behaviour().step_s("a/0", 0, 0))
    for one, other in zip(first.evaluations, second.evaluations, strict=True):
        assert {name: group.values.tobytes() for name, group in one.groups.items()} == {
            name: group.values.tobytes() for name, group in other.groups.items()
        }
    assert [replace(record, pid=0) for record in first.records] == [replace(record, pid=0) for record in second.records]


def test_answers_depend_on_every_bit_that_the_worker_holds(config: ToyConfig) -> None:
    job = ToyJob(config.spec(), ToyWorld())

    def answers(changed: float) -> np.ndarray:
        worker = job.make_worker("a/0", job.make_batches("a/0"))
        held = job.groups["private:a"].state()
        values = held.values.copy()
        values[0] += changed
        worker.learner.load({"private:a": [replace(held, values=values)]})
        _, gradients, _ = worker.compute()
        slot = next(slot for slot in job.groups["shared:a+b"].layout.slots if slot.name == "pair.answers")
        return gradients["shared:a+b"][slot.offset : slot.offset + slot.size]

    np.testing.assert_array_equal(answers(0.0), answers(0.0))
    assert (answers(0.0) != answers(1e-6)).any()
    assert set(answers(0.0)) <= {-1, 0, 1, 2}


@pytest.mark.parametrize("engine", [{"name": "local"}, ROUNDS], ids=["turns", "rounds"])
def test_a_run_that_pauses_goes_on_with_the_bits_of_one_that_does_not(config: ToyConfig, engine: Any) -> None:
    config = replace(config, engine=engine, optimizer=SLOTS)
    whole = run(config).outcome.versions["last"]
    world = ToyWorld()
    looks = iter(range(100))
    first = run_engine(ToyJob(config.spec(), world), wants_pause=lambda: next(looks) == 7)
    assert first.outcome.paused
    checkpoint = store_of(first.job).latest()
    assert checkpoint is not None
    reached = checkpoint.progress.workers["c/1"]
    assert 7 < reached.step < 10
    assert reached.position == formulas.batch_start(reached.step, rows=2, skips=True)

    second = run_engine(ToyJob(config.spec(), world, checkpoint)).outcome.versions["last"]

    for name, group in whole.groups.items():
        assert second.groups[name].values.tobytes() == group.values.tobytes()
        assert second.groups[name].counters.tobytes() == group.counters.tobytes()
    assert world.processes["a/0"] == 2


def test_a_task_that_is_attached_finds_the_shared_values_and_leaves_the_others_alone(config: ToyConfig) -> None:
    config = replace(config, tasks=TASKS[:2], later=TASKS[2:])
    looks = iter(range(100))
    first = run_engine(ToyJob(config.spec(), ToyWorld()), wants_pause=lambda: next(looks) == 7)
    checkpoint = store_of(first.job).latest()
    content = dump_spec(first.job.spec)
    content["tasks"].append(config.later_content("c"))

    ran = run_engine(first.job.changed(load_spec(content), checkpoint))

    last = ran.outcome.versions["last"]
    assert ran.job.groups.keys() == {"shared:a+b+c", "shared:a+b", "private:a", "private:b", "private:c"}
    counts = tensors(ran.job, last, "shared:a+b+c")["body.counts"]
    assert formulas.times_applied(counts, 1.0)[rows_that_train("a", "b", "c")].min() == 1
    for task in "ab":
        expected = formulas.private_after(task, formulas.steps_of_one(range(STEPS), 0.5), STEPS, 0.0)
        assert_private(tensors(ran.job, last, f"private:{task}"), expected)


@pytest.mark.parametrize("kind", ["nan-shared", "nan-private"])
def test_a_step_with_a_gradient_that_is_not_finite_is_left_out(config: ToyConfig, kind: Any) -> None:
    steps = {("a/0", 3), ("a/0", 4), ("c/1", 0)}
    faults = {step_of(*at): StepFault(kind) for at in steps}
    ran = run(replace(config, optimizer=SLOTS), Behaviour(faults=faults))

    assert {(record.worker, record.step) for record in ran.records if record.rejected is not None} == steps
    last = ran.outcome.versions["last"]
    made = [step for step in range(STEPS) if step not in (3, 4)]
    expected = formulas.private_after("a", formulas.steps_of_one(made, 0.5), STEPS, 0.5)
    assert_private(tensors(ran.job, last, "private:a"), expected)
    times = formulas.times_applied(tensors(ran.job, last, "shared:a+b+c")["body.counts"], 1.0, 0.5)
    assert {(row, step) for row, step in np.argwhere(times[rows_that_train("a", "b", "c")] == 0)} == {
        (0, 3),
        (0, 4),
        (3, 0),
    }


def test_a_worker_that_raises_ends_the_run(config: ToyConfig) -> None:
    with pytest.raises(TrainingError, match=r"Worker 'b/0' of task 'b' failed after 5 steps: batch 5"):
        run(config, Behaviour(faults={step_of("b/0", 5): StepFault("raise")}))


def test_steps_take_virtual_time_and_only_the_first_process_hangs(config: ToyConfig) -> None:
    behaviour = Behaviour(
        speeds={"b/0": 3.0},
        faults={step_of("a/0", 0): StepFault("slow", 7.0), step_of("b/0", 0): StepFault("hang")},
        hang_s=1000.0,
    )
    clock = StillClock()
    job = ToyJob(config.spec(), ToyWorld(behaviour, clock))

    def seconds(name: str) -> float:
        push, _, _ = job.make_worker(name, job.make_batches(name), process=9).compute()
        assert push.pid == 9
        return push.seconds

    assert seconds("a/0") == pytest.approx(7.0 + behaviour.step_s("a/0", 0, process=0))
    assert seconds("b/0") == 1000.0
    assert seconds("b/0") == pytest.approx(behaviour.step_s("b/0", 0, process=1))
    assert 0.15 <= behaviour.step_s("b/0", 0, process=1) <= 0.9
    assert clock.monotonic() > 1007


def test_workers_that_read_the_same_rows_share_a_stream(config: ToyConfig) -> None:
    tasks = (ToyTask(name="a", data="rows"), ToyTask(name="b", data="rows"), ToyTask(name="c", data="rows", rows=2))
    job = ToyJob(replace(config, tasks=tasks).spec(), ToyWorld())
    assert job.sharing(job.workers) == [["a/0", "b/0"], ["c/0"]]

    stream = job.make_stream(["a/0", "b/0"])
    assert [stream.next(name).position for name in ("a/0", "a/0", "b/0", "b/0", "b/0")] == [1, 2, 1, 2, 3]
    assert stream.decoded == 3
    stream.seek("a/0", 1)
    assert stream.next("a/0").position == 2


def test_positions_name_batches(config: ToyConfig) -> None:
    job = ToyJob(config.spec(), ToyWorld())
    batches = list(islice(job.make_batches("c/0"), 7))

    assert [batch.position for batch in batches] == [2, 4, 7, 9, 11, 14, 16]
    assert [batch.skipped for batch in batches] == [0, 0, 1, 0, 0, 1, 0]
    assert batches[2].bad_images == ("row 6",)
    for number, batch in enumerate(batches):
        assert formulas.batch_at(batch.position, rows=2, skips=True) == number + 1
    for position in (1, 3, 5, 6, 8):
        with pytest.raises(ValueError, match="No batch"):
            formulas.batch_at(position, rows=2, skips=True)


def test_the_hooks_of_gradients_are_called_from_the_last_to_the_first_after_all_is_armed(config: ToyConfig) -> None:
    job = ToyJob(config.spec(), ToyWorld())
    worker = job.make_worker("a/0", job.make_batches("a/0"))
    called: list[str] = []
    for name, tensor in worker.learner.tensors().items():
        tensor.register_post_accumulate_grad_hook(lambda _, name=name: called.append(name))
    worker.before_last_backward = lambda: called.append("armed")

    worker.compute()

    parts = [("patch.total", "patch.learned"), ("pair.answers", "pair.counts"), ("body.answers", "body.counts")]
    assert called == ["armed", *(name for names in parts for name in names)]


def test_a_frozen_backbone_and_a_task_without_private_tensors(config: ToyConfig) -> None:
    frozen = run(replace(config, train_shared=False))
    assert {group.name for group in frozen.job.served()} == {"private:c"}
    expected = formulas.private_after("b", formulas.steps_of_one(range(STEPS), 0.5), STEPS, 0.0)
    assert_private(tensors(frozen.job, frozen.outcome.versions["last"], "private:b"), expected)

    bare = run(replace(config, tasks=(TASKS[0], replace(TASKS[1], private=False))))
    assert not bare.job.holds_private("b/0")
    assert "private:b" not in bare.job.groups
    backbone, private = bare.job.state(bare.outcome.versions["last"].groups)
    assert private["b"] == {}
    assert backbone["body.counts"].sum() == 2 * STEPS
    assert backbone["body.fixed"].tolist() == [0, 1, 2]


def test_the_worker_gets_its_own_values_back_after_an_evaluation(config: ToyConfig) -> None:
    job = ToyJob(config.spec(), ToyWorld())
    worker = job.make_worker("a/0", job.make_batches("a/0"))
    alive: list[int] = []
    own = {name: [group.state()] for name, group in job.groups_of("a").items()}
    other = {name: [GroupValues(np.ones_like(part.values), part.counters)] for name, [part] in own.items()}
    worker.learner.load(own)

    found = worker.learner.evaluate(other, {}, lambda: alive.append(1))

    assert found == formulas.metrics_of({name: part for name, [part] in other.items()})
    assert worker.learner.evaluate({}, {}, lambda: None) == formulas.metrics_of({n: part for n, [part] in own.items()})
    assert len(alive) == 2
    assert job.make_worker("c/0", iter(())).learner.evaluates
    assert not job.make_worker("c/1", iter(())).learner.evaluates
