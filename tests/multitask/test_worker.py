"""A worker's step: accumulated batches, clipped gradients, bfloat16."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import torch
from torch import Tensor

from multitask.data import Batch
from multitask.engines.local import DirectServer
from multitask.job.job import Job
from multitask.server.layout import Role
from multitask.server.messages import Gradients, Push, StepRecord, as_tensor
from multitask.spec.reading import load_spec
from multitask.spec.schema import JobSpec
from multitask.worker import TaskWorker
from tests.conftest import run_engine

MakeSpec = Callable[..., JobSpec]
# BatchNorm stays as the backbone has it, so images of one batch do not see each other; filters and head learn.
NO_BATCH_STATISTICS = {"method": "depthwise+last_layer"}


def worker_of(spec: JobSpec) -> tuple[Job, TaskWorker]:
    job = Job(spec)
    return job, job.make_worker("pets/0", job.make_batches("pets/0"))


def gradients_of(_push: Push, gradients: Gradients, private: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return group -> gradients, then batch statistics, of one step: shape (layout.pushed,)."""
    return {group: as_tensor(gradient.copy()) for group, gradient in gradients.items()} | private


def train(spec: JobSpec) -> tuple[list[StepRecord], dict[str, Tensor], float]:
    """Return the records, the final values of all groups and the last validation top-1."""
    ran = run_engine(Job(spec))
    values = {name: as_tensor(group.values) for name, group in ran.outcome.versions["last"].groups.items()}
    return ran.records, values, ran.evaluations[-1].mean_top1


def test_four_small_batches_equal_one_large_without_batch_statistics(make_spec: MakeSpec) -> None:
    def run(batch_size: int, accumulate: int) -> tuple[list[StepRecord], dict[str, Tensor], float]:
        task = {**NO_BATCH_STATISTICS, "batch_size": batch_size, "accumulate": accumulate}
        sgd = {"name": "sgd", "rate": 0.1, "momentum": 0.9}
        return train(make_spec({"pets": task}, train_shared=False, optimizer=sgd, steps=4))

    large, large_values, _ = run(8, 1)
    small, small_values, _ = run(2, 4)

    assert [record.images for record in small] == [record.images for record in large] == [8] * 4
    assert large[-1].loss != large[0].loss
    assert [record.loss for record in small] == pytest.approx([record.loss for record in large], abs=1e-6)
    for group, values in large_values.items():
        torch.testing.assert_close(small_values[group], values, rtol=0, atol=1e-6)


def test_gradients_and_batch_statistics_of_a_step_are_means_over_its_batches(make_spec: MakeSpec) -> None:
    job, single = worker_of(make_spec({"pets": {"batch_size": 4}}))
    steps = [gradients_of(*single.compute()) for _ in range(3)]
    _, accumulating = worker_of(make_spec({"pets": {"batch_size": 4, "accumulate": 3}}))

    found = gradients_of(*accumulating.compute())

    statistics = job.groups["private:pets"].layout.section(found["private:pets"], Role.STATISTIC)
    assert statistics.numel()
    assert (statistics != 0).any()
    for group, values in found.items():
        expected = torch.stack([step[group] for step in steps]).mean(0)
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("task", "dropout"), [({}, 0.5), ({"mix": "mixup"}, 0.0), ({"mix": "cutmix"}, 0.0)])
def test_a_step_draws_the_same_whoever_makes_it(make_spec: MakeSpec, task: dict[str, str], dropout: float) -> None:
    """So a step that is redone, or made by another process, gives the same gradients."""
    spec = make_spec({"pets": task}, backbone={"options": {"dropout": dropout}})
    job, first = worker_of(spec)
    push, *_ = first.compute()
    expected = gradients_of(*first.compute())

    torch.manual_seed(1)
    before = torch.get_rng_state()
    successor = job.make_worker("pets/0", job.make_batches("pets/0", push.position), start=(1, push.position))
    found = gradients_of(*successor.compute())

    assert all(torch.equal(found[group], values) for group, values in expected.items())
    assert torch.equal(torch.get_rng_state(), before), "random numbers of others are left alone"
    batch = next(job.make_batches("pets/0"))
    masks = [gradients_of(*job.make_worker("pets/0", iter([batch]), start=(step, 0)).compute()) for step in (0, 1)]
    assert not torch.equal(masks[0]["private:pets"], masks[1]["private:pets"]), "each step has its own"


def test_images_skipped_by_the_batches_of_a_step_add_up(make_spec: MakeSpec) -> None:
    job = Job(make_spec({"pets": {"batch_size": 4, "accumulate": 2}}))

    def batches() -> Iterator[Batch]:
        for number, batch in enumerate(job.make_batches("pets/0")):
            yield replace(batch, skipped=number + 1, bad_images=(f"row {number}",))

    push, *_ = job.make_worker("pets/0", batches()).compute()

    assert (push.images, push.skipped, push.bad_images) == (8, 3, ("row 0", "row 1"))


def test_clipping_shortens_shared_and_private_gradients_together(make_spec: MakeSpec) -> None:
    def step(clip_norm: float | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradients and statistics of the first step, by group."""
        job, worker = worker_of(make_spec({"pets": {"accumulate": 2}}, clip_norm=clip_norm))
        found = gradients_of(*worker.compute())
        ends = {group: job.groups[group].layout.ends[Role.PLAIN] for group in found}
        return (
            {group: values[: ends[group]] for group, values in found.items()},
            {group: values[ends[group] :] for group, values in found.items()},
        )

    gradients, statistics = step(None)
    norm = torch.cat(list(gradients.values())).norm()
    clipped, clipped_statistics = step(norm.item() / 4)
    untouched, _ = step(norm.item() * 2)

    assert len(gradients) == 2
    for group, gradient in gradients.items():
        assert gradient.norm() > 0
        torch.testing.assert_close(clipped[group], gradient / 4, rtol=1e-4, atol=1e-9)
        assert torch.equal(clipped_statistics[group], statistics[group])
        assert torch.equal(untouched[group], gradient)


def test_a_gradient_too_long_to_clip_makes_a_push_that_is_refused(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multitask.job.job.task_loss", lambda outputs, _labels, **_: 1e30 * outputs.sum())
    _, worker = worker_of(make_spec({"pets": {}}, clip_norm=1.0))

    push, _, _ = worker.compute()

    assert push.problem == "its gradient's norm is inf, which cannot be clipped"


@pytest.mark.parametrize("problem", [None, "it holds a gradient that is not finite in group 'private:pets'"])
def test_private_tensors_never_learn_from_a_push_with_a_problem(make_spec: MakeSpec, problem: str | None) -> None:
    """Also if the reply does not mention the problem, because the step was redone or its first answer was lost."""
    job, worker = worker_of(make_spec({"pets": {}}))
    reply, values = DirectServer(job.make_server()).pull("pets/0")
    push, _, private = worker.compute()
    before = worker.private["private:pets"].values.clone()

    worker.absorb(replace(push, problem=problem), private, replace(reply, rate=0.1), values)

    assert torch.equal(worker.private["private:pets"].values, before) == (problem is not None)


def test_what_was_put_aside_on_a_lost_server_is_not_taken_for_the_restored_ones_same_version(
    make_spec: MakeSpec,
) -> None:
    job, worker = worker_of(make_spec({"pets": {}}, evaluate_every=1))
    push, gradients, private = worker.compute()
    lost, restored = job.make_server(), job.make_server()
    for server in (lost, restored):
        server.push(push, gradients)
        server.snapshot_for_checkpoint()
    (held,) = worker.absorb(push, private, *DirectServer(lost).pull("pets/0"))
    assert (held.request.version, held.request.evaluate, held.request.save) == (1, True, True)

    worker.report(DirectServer(restored), held)

    assert restored.workers_with_requests() == ["pets/0"]
    worker.answer_requests(DirectServer(restored))
    assert restored.workers_with_requests() == []
    assert restored.drain()[1].keys() == {1}


def test_bfloat16_learns_with_float32_weights_and_gradients(make_spec: MakeSpec) -> None:
    changes = {"steps": 40, "evaluate_every": 40}
    _, worker = worker_of(make_spec({"pets": {"precision": "bfloat16"}}, **changes))
    outputs = []
    worker.learner.model.register_forward_hook(lambda _model, _inputs, logits: outputs.append(logits.dtype))
    found = gradients_of(*worker.compute())

    assert outputs == [torch.bfloat16]
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert {tensor.dtype for tensor in worker.learner.model.parameters()} == {torch.float32}

    reduced, _, _ = train(make_spec({"pets": {"precision": "bfloat16"}}, **changes))
    full, _, _ = train(make_spec({"pets": {}}, **changes))
    assert reduced[0].loss != full[0].loss
    assert reduced[0].loss == pytest.approx(full[0].loss, rel=0.02)
    assert mean(record.loss for record in reduced[-5:]) < 0.8 * mean(record.loss for record in reduced[:5])


@pytest.mark.slow
def test_bfloat16_reaches_the_accuracy_of_float32_on_digits() -> None:
    """One seed of a network smaller than the demo's; two seeds of it in float32 reach 95.0 and 95.6 %.

    The demo's own network misses it after 100 steps: 94.2 against 96.4 % (batch 128, seed 0). Whether seeds differ as
    much there is not measured: a bfloat16 step of it takes 1.3 s on a CPU without bfloat16.
    """
    demo = load_spec(Path(__file__).parents[2] / "jobs" / "specs" / "demo.yaml")
    digits = next(task for task in demo.tasks if task.name == "digits")
    blocks = {"inverted_residual_setting": [[1, 16, 1, 1], [3, 24, 1, 2], [3, 32, 1, 2]], "last_channel": 64}

    def top1(precision: str) -> float:
        spec = replace(
            demo,
            backbone=replace(demo.backbone, options={**demo.backbone.options, **blocks}),
            tasks=(replace(digits, precision=precision, batch_size=64, validation_images=None),),
            steps=200,
            evaluate_every=200,
            optimizer={"name": "adamw", "rate": 0.01, "weight_decay": 0.0},
            private_rate_factor=1.0,
            schedule={"name": "cosine", "warm_up_rounds": 20},
            engine={"name": "local"},
        )
        return train(spec)[2]

    full = top1("float32")
    assert full > 90
    assert top1("bfloat16") == pytest.approx(full, abs=1.0)
