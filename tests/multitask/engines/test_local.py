"""Engine `local` against training loops written here with torch's own parts."""

import pickle
from collections.abc import Callable
from itertools import count

import pytest
import torch
from torch.nn import functional

import patches
from multitask.data import TrainBatches, open_table
from multitask.engines import local
from multitask.engines.interface import Driver, Outcome
from multitask.engines.local import DirectServer
from multitask.errors import TrainingError
from multitask.job.job import Job
from multitask.server.layout import Role
from multitask.server.messages import Evaluation, StepRecord
from multitask.server.progress import Progress
from multitask.spec.schema import JobSpec
from multitask.worker import TaskWorker
from tests.conftest import run_engine, store_of

MakeSpec = Callable[..., JobSpec]


def run(spec: JobSpec) -> tuple[Job, Outcome, list[StepRecord], list[Evaluation]]:
    ran = run_engine(Job(spec))
    return ran.job, ran.outcome, ran.records, ran.evaluations


def train_batches(spec: JobSpec, index: int) -> TrainBatches:
    task = spec.tasks[index]
    table = open_table(f"{task.data}/train")
    return TrainBatches(
        table, batch_size=8, resolution=8, mean=task.mean, std=task.std, augment=task.augment, seed=spec.seed
    )


def plain_backbone(spec: JobSpec) -> patches.Backbone:
    backbone = spec.backbone
    return patches.load_backbone(backbone.name, None, backbone.num_classes, seed=spec.seed, **backbone.options)


def plain_model(spec: JobSpec) -> torch.nn.Module:
    return plain_backbone(spec).network


@pytest.mark.parametrize("method", ["full", "last_layer"])
def test_one_task_equals_a_plain_torch_loop(make_spec: MakeSpec, method: str) -> None:
    """The head is the backbone's in both; running statistics are compared too."""
    # SGD, since Adam blows rounding noise up where a gradient is zero in exact arithmetic (a bias before a BatchNorm).
    optimizer_spec = {"name": "sgd", "rate": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    spec = make_spec(
        {"pets": {"method": method, "num_classes": None}},
        steps=5,
        schedule={"name": "cosine"},
        optimizer=optimizer_spec,
    )
    job, outcome, records, _ = run(spec)
    backbone, private = job.state(outcome.versions["last"].groups)
    trained = backbone | private["pets"]

    model = plain_model(spec).train()
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    plain = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
    losses = []
    batches = train_batches(spec, 0)
    for _ in range(5):
        batch = next(batches)
        loss = functional.cross_entropy(
            model(batch.images().contiguous(memory_format=torch.channels_last)), batch.labels
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())

    assert [record.loss for record in records] == pytest.approx(losses, rel=1e-5)
    assert losses[0] != losses[-1]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(
            trained[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_shared_statistics_are_those_of_one_process_taking_tasks_in_turn(make_spec: MakeSpec) -> None:
    """At a rate near 0 only running statistics move, as in one torch model that reads the tasks' batches in turn."""
    spec = make_spec(
        {"pets": {"method": "last_layer"}, "cars": {"method": "last_layer"}},
        optimizer={"name": "sgd", "rate": 1e-12, "momentum": 0.0},
        steps=3,
    )
    job, outcome, _, _ = run(spec)
    backbone, _ = job.state(outcome.versions["last"].groups)

    model = plain_model(spec).train()
    batches = [train_batches(spec, index) for index in range(2)]
    with torch.no_grad():
        for _ in range(3):
            for task_batches in batches:
                model(next(task_batches).images())

    expected = {name: tensor for name, tensor in model.state_dict().items() if "running" in name or "tracked" in name}
    assert expected["features.0.1.num_batches_tracked"] == 6
    for name, tensor in expected.items():
        torch.testing.assert_close(backbone[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_step_of_one_task_leaves_the_other_tasks_private_state_alone(make_spec: MakeSpec) -> None:
    job = Job(make_spec())
    direct = DirectServer(job.make_server())
    pets, cars = (job.make_worker(name, job.make_batches(name)) for name in ("pets/0", "cars/0"))

    def step(worker: TaskWorker) -> None:
        push, gradients, private = worker.compute()
        worker.absorb(push, private, *direct.wait(direct.push(push, gradients)))

    def shared() -> bytes:
        return direct.pull("cars/0")[1]["shared:pets+cars"][0].values.tobytes()

    step(pets)
    step(cars)
    group = cars.private["private:cars"]
    tensors = {name: tensor.clone() for name, tensor in cars.learner.private_state().items()}
    state, shared_before = pickle.dumps(group.state(slots=True)), shared()

    step(pets)
    step(pets)

    assert shared() != shared_before
    assert pickle.dumps(group.state(slots=True)) == state
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in cars.learner.private_state().items())
    # The server never holds what is private to a task with one worker.
    assert set(direct.pull("pets/0")[1]) == {"shared:pets+cars"}


def test_private_tensors_learn_at_their_multiple_of_the_rate(make_spec: MakeSpec) -> None:
    def moved(factor: float) -> dict[str, torch.Tensor]:
        sgd = {"name": "sgd", "rate": 0.01, "momentum": 0.0}
        job, outcome, _, _ = run(make_spec(optimizer=sgd, private_rate_factor=factor, steps=1))
        values = {name: torch.from_numpy(group.values) for name, group in outcome.versions["last"].groups.items()}
        trained = {name: job.groups[name].layout.ends[Role.PLAIN] for name in values}
        return {
            name: (values[name] - job.groups[name].values[: len(values[name])])[:end] for name, end in trained.items()
        }

    plain, tripled = moved(1.0), moved(3.0)
    assert torch.equal(tripled["shared:pets+cars"], plain["shared:pets+cars"])
    assert plain["private:pets"].abs().max() > 0
    torch.testing.assert_close(tripled["private:pets"], 3 * plain["private:pets"], rtol=1e-4, atol=1e-6)


def test_private_statistics_never_reach_the_shared_group(make_spec: MakeSpec) -> None:
    job = Job(make_spec())

    shared = [slot.name for slot in job.groups["shared:pets+cars"].layout.slots]
    private = [slot.name for slot in job.groups["private:pets"].layout.slots]

    assert not any("running" in name for name in shared)
    assert sum("running_mean" in name for name in private) == len(plain_backbone(make_spec()).batch_norms())
    assert not set(shared) & set(private)


def test_groups_follow_the_sets_of_tasks_that_share_tensors(make_spec: MakeSpec) -> None:
    """Two resolutions share the backbone's head, which the third task replaces."""
    spec = make_spec(
        {
            "pets": {"method": "scale_bias", "num_classes": None},
            "pets_large": {"method": "scale_bias", "num_classes": None, "resolution": 12},
            "cars": {},
        }
    )
    job = Job(spec)

    names = {group.name: {slot.name for slot in group.layout.slots} for group in job.groups.values()}

    assert names["shared:pets+pets_large"] == {"classifier.1.weight", "classifier.1.bias"}
    assert "features.0.0.weight" in names["shared:pets+pets_large+cars"]
    assert "classifier.1.weight" in names["private:cars"]
    assert len(names) == 5
    all_names = set(job.backbone.network.state_dict())
    for task in ("pets", "pets_large", "cars"):
        held = [name for group in job.groups_of(task) for name in names[group]]
        assert sorted(held) == sorted(all_names)


@pytest.mark.parametrize("schedule", ["turns", "rounds"])
def test_a_task_with_its_own_head_leaves_the_head_of_others_alone(make_spec: MakeSpec, schedule: str) -> None:
    """Resolutions a and b share the backbone's head, which c replaces: c's pushes change neither values nor slots."""
    shares_head = {"method": "scale_bias", "num_classes": None}
    tasks = {"pets": shares_head, "pets_large": {**shares_head, "resolution": 12}, "cars": {}}
    job = Job(make_spec(tasks, engine={"name": "local", "schedule": schedule}))
    server = job.make_server()
    direct = DirectServer(server)
    workers = {name: job.make_worker(name, job.make_batches(name)) for name in job.workers}

    def step(*names: str) -> None:
        sent = [(workers[name], *workers[name].compute()) for name in names]
        handles = [direct.push(push, gradients) for _, push, gradients, _ in sent]
        for (worker, push, _, private), handle in zip(sent, handles, strict=True):
            worker.absorb(push, private, *direct.wait(handle))

    def state(group: str) -> bytes:
        return pickle.dumps(server.shard.groups[group].state(slots=True))

    step(*workers)
    for name in ("pets/0", "pets_large/0"):
        server.finish(name, 0)  # from here on c pushes alone
    head, everything = state("shared:pets+pets_large"), state("shared:pets+pets_large+cars")
    step("cars/0")
    assert state("shared:pets+pets_large") == head
    assert state("shared:pets+pets_large+cars") != everything


def test_a_frozen_backbone_is_never_pushed_and_stays_bit_identical(make_spec: MakeSpec) -> None:
    job, outcome, records, _ = run(make_spec(train_shared=False))

    backbone, private = job.state(outcome.versions["last"].groups)

    start = plain_model(job.spec).state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in backbone.items())
    assert not torch.equal(private["pets"]["features.0.1.weight"], start["features.0.1.weight"])
    assert len(records) == 8


def test_rates_of_two_tasks_coincide_step_by_step(make_spec: MakeSpec) -> None:
    _, _, records, _ = run(make_spec({"pets": {"batch_size": 4}, "cars": {}}, schedule={"name": "cosine"}, steps=6))

    traces = {task: [record.rate for record in records if record.task == task] for task in ("pets", "cars")}

    assert traces["pets"] == traces["cars"]
    assert len(set(traces["pets"])) == 6


def test_delay_keeps_values_one_update_behind(make_spec: MakeSpec) -> None:
    _, _, prompt, _ = run(make_spec({"pets": {}}, steps=4))
    _, _, late, _ = run(make_spec({"pets": {}}, steps=4, engine={"name": "local", "delay": 1}))

    assert [record.staleness for record in prompt] == [0, 0, 0, 0]
    assert [record.staleness for record in late] == [0, 1, 1, 1]
    # The second gradient is computed on the starting values again.
    assert late[0].loss == prompt[0].loss
    assert late[1].loss != prompt[1].loss


def test_evaluations_belong_to_one_version_whoever_made_the_last_push(make_spec: MakeSpec) -> None:
    """A version put aside by the first worker's push holds the second worker's private tensors from before its own."""
    job = Job(make_spec(evaluate_every=1, steps=2))
    server = job.make_server()
    pets, cars = (job.make_worker(name, job.make_batches(name)) for name in ("pets/0", "cars/0"))
    direct = DirectServer(server)
    due = {}
    history = {}
    for _ in range(2):
        for worker in (cars, pets):
            push, gradients, private = worker.compute()
            reply, values = direct.wait(direct.push(push, gradients))
            for held in worker.absorb(push, private, reply, values):
                due[held.request.version, worker.task] = held.private[f"private:{worker.task}"].values
            history[reply.version, worker.task] = worker.private[f"private:{worker.task}"].values.numpy().copy()

    # Versions 2 and 4 were made by pushes of pets; cars had pushed last at versions 1 and 3.
    pushed = job.groups["private:pets"].layout.pushed
    assert (due[2, "pets"] == history[2, "pets"][:pushed]).all()
    assert (due[2, "cars"] == history[1, "cars"][:pushed]).all()
    assert (due[2, "cars"] != history[3, "cars"][:pushed]).any()


@pytest.mark.parametrize("schedule", ["turns", "rounds"])
def test_versions_are_complete_soon_though_some_have_made_their_last_step(make_spec: MakeSpec, schedule: str) -> None:
    """A task that joins a run has more steps to make than the others."""
    engine = {"name": "local", "schedule": schedule}
    changes = {"engine": engine, "steps": 6, "evaluate_every": 1, "checkpoints": {"every_rounds": 1}}
    polls = count()
    before = Job(make_spec({"pets": {}}, **changes))
    run_engine(before, wants_pause=lambda: next(polls) == 3)
    store = store_of(before)
    late: list[int] = []

    def note(_: object, evaluations: list[Evaluation], progress: Progress) -> None:
        late.extend(progress.version - evaluation.version for evaluation in evaluations)

    local.run(Job(make_spec({"pets": {}, "cars": {}}, **changes), store.latest()), Driver(note, store))

    assert len(late) >= 6
    assert max(late) <= 2
    checkpoint = store.latest()
    assert checkpoint is not None
    assert checkpoint.progress.workers["cars/0"].step >= 5


def test_best_and_last_are_complete_and_evaluated(make_spec: MakeSpec) -> None:
    job, outcome, _, evaluations = run(make_spec(steps=6))

    means = {evaluation.version: evaluation.mean_top1 for evaluation in evaluations}

    assert set(outcome.versions["last"].groups) == set(job.groups)
    assert outcome.versions["last"].version == 12
    assert sorted(means) == [4, 8, 12]
    assert means[outcome.versions["best"].version] == max(means.values())


def test_a_loss_that_is_not_finite_names_worker_task_and_step(make_spec: MakeSpec) -> None:
    with pytest.raises(TrainingError, match=r"^Worker 'pets/0' of task 'pets' failed after 0 steps: the loss is nan"):
        run(make_spec({"pets": {"std": [1e-38, 1e-38, 1e-38]}}))
