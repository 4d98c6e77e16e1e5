"""Simulated runs with one loss each, for rules that no invariant of all runs can state."""

import itertools
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from multitask.engines import ENGINES, Driver
from multitask.job.checkpoint import CheckpointStore
from multitask.spec.engines import LocalSpec
from tests.simulation.behaviour import Behaviour
from tests.simulation.check import check
from tests.simulation.faults import Fault, Kind
from tests.simulation.nodes import Timing
from tests.simulation.run import Story, simulate
from tests.simulation.schedule import Request, Schedule, StoreFault
from tests.simulation.toy import ToyConfig, ToyJob, ToyTask, ToyWorld
from tests.simulation.views import view_of_evaluation

LOCAL_ROUNDS = {"name": "local", "schedule": "rounds"}
TASKS = (ToyTask(name="a"), ToyTask(name="b", workers=2))


def schedule(name: str, *faults: Fault, nodes: tuple[float, ...] = (8.0,), **job: object) -> Schedule:
    """Return a run whose steps take a fifth of a second, with these faults."""
    config = ToyConfig(
        tasks=TASKS,
        engine={"name": name},
        checkpoints={"every_rounds": 3, "keep": 2},
        resources={"start_timeout_s": 60.0, "step_timeout_s": 10.0, "cpus_per_worker": 1.0},
        evaluate_every=10,
    )
    return Schedule(0, name, replace(config, **job), Behaviour(), nodes, Timing(start_s=0.1), faults)  # type: ignore[arg-type]


def run(chosen: Schedule) -> Story:
    """Run a schedule in which every invariant holds, and which finishes."""
    story, wrong = check(chosen)
    assert not wrong
    assert story is not None
    assert story.lives[-1] == "finished"
    return story


def test_a_worker_is_replaced_while_the_others_go_on() -> None:
    chosen = schedule("async", Fault(kind=Kind.KILL, target="worker a/0", at_s=2.5))
    story = run(replace(chosen, timing=Timing(start_s=8.0, detect_s=0.01)))

    told = [record for news in story.news for record in news.records]
    mine = [number for number, record in enumerate(told) if record.worker == "a/0"]
    longest = max(later - earlier for earlier, later in itertools.pairwise(mine))
    assert longest > 4, "the others made steps while it was away"
    assert len({record.pid for record in told if record.worker == "b/0"}) == 1


@pytest.mark.parametrize("target", ["server", "shard 1"])
def test_a_lost_server_or_shard_costs_no_worker_its_process(target: str) -> None:
    story = run(
        schedule("async", Fault(kind=Kind.KILL, target=target, at_s=2.0), engine={"name": "async", "shards": 2})
    )

    pids = {(record.worker, record.pid) for news in story.news for record in news.records}
    assert len(pids) == 3
    assert any(counters.lost for counters in story.news[-1].progress.workers.values())


def test_a_worker_that_hangs_is_named_and_replaced(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "multitask"):
        story = run(schedule("async", Fault(kind=Kind.HANG, target="worker a/0", at_s=2.0)))

    assert "Worker 'a/0' of task 'a' made no step for 10 s; its process is ended." in caplog.text
    assert len({record.pid for news in story.news for record in news.records if record.worker == "a/0"}) == 2


def test_a_guest_gives_its_process_up_for_one_that_is_needed() -> None:
    """The node that is lost holds one of three processes, two of which are needed."""
    tasks = (ToyTask(name="a"), ToyTask(name="b", workers=2, min_workers=1))
    made_room = 0
    for seed in range(12):
        chosen = schedule(
            "async", Fault(kind=Kind.KILL_NODE, target="node 1", at_s=4.0), nodes=(2.0, 1.0), tasks=tasks, steps=20
        )
        chosen = replace(chosen, seed=seed, behaviour=Behaviour(fastest_s=0.3, slowest_s=0.5))
        story = run(chosen)
        lost = {line[2].name for line in story.trace if line[1] == "death" and "node" in str(line[3])}
        made_room += bool(lost & {"worker a/0", "worker b/0"})
    assert made_room, "in some runs the lost process was a needed one"


def test_after_a_task_has_joined_allreduce_goes_on_with_the_bits_of_local(tmp_path: Path) -> None:
    chosen = schedule("allreduce", later=(ToyTask(name="late"),))
    story = run(replace(chosen, requests=(Request(4.0, "attach", "late"),)))
    job = story.news[-1].job
    assert "late/0" in job.workers
    paused = [checkpoint for _, before, checkpoint in story.saved if "late/0" not in before.workers][-1]
    assert 0 < paused.progress.version < job.spec.steps

    local = ToyJob(replace(job.spec, engine=LocalSpec(name="local", schedule="rounds")), ToyWorld(), paused)
    outcome = ENGINES["local"](local, Driver(lambda *_: None, CheckpointStore(str(tmp_path), keep=1)))

    last = [found for news in story.news for found in news.evaluations][-1]
    found, wanted = (view_of_evaluation(*one).tensors for one in ((job, last), (local, outcome.versions["last"])))
    assert found.keys() == wanted.keys()
    assert all(tensor.equal(wanted[name]) for name, tensor in found.items())


def stopping(engine: str, *faults: Fault, **settings: object) -> Schedule:
    """Return a run of a job whose metrics are a hash, so that it soon stops getting better."""
    named = {"name": engine, **settings}
    checkpoints = {"every_rounds": 2, "keep": 2}
    return schedule(engine, *faults, engine=named, evaluate_every=2, checkpoints=checkpoints, stop_after=2, steps=20)


DRIVER, SERVER = Fault(kind=Kind.KILL, target="driver", at_s=3.0), Fault(kind=Kind.KILL, target="server", at_s=3.0)


@pytest.mark.parametrize(
    ("engine", "faults"),
    [("sync", ()), ("sync", (SERVER,)), ("sync", (DRIVER,)), ("allreduce", ()), ("allreduce", (DRIVER,))],
)
def test_an_early_stop_is_that_of_local_and_ends_with_its_bits(engine: str, faults: tuple[Fault, ...]) -> None:
    local, story = simulate(stopping("local", schedule="rounds")), simulate(stopping(engine, *faults))

    assert len(story.lives) == 1 + (DRIVER in faults)
    assert local.stopped_early is not None
    assert local.stopped_early["round"] < 20
    assert story.stopped_early == local.stopped_early
    assert story.last is not None
    assert local.last is not None
    assert story.last.keys() == local.last.keys()
    assert all(tensor.equal(local.last[name]) for name, tensor in story.last.items())
    assert story.best == local.best


@pytest.mark.parametrize("engine", ["local", "sync"])
def test_a_driver_that_is_killed_before_it_writes_the_result_changes_no_early_stop(engine: str) -> None:
    """Each driver is killed when it has written one of the checkpoints, up to that of the last evaluation."""
    chosen = stopping(engine, **({"schedule": "rounds"} if engine == "local" else {}))
    whole = simulate(chosen)
    assert whole.stopped_early is not None
    for number in range(whole.stopped_early["round"] // 2):
        story = simulate(replace(chosen, store_faults=(StoreFault(number, "killed after"),)))
        assert story.stopped_early == whole.stopped_early
        assert story.best == whole.best
    assert story.lives == ["finished"]  # the checkpoint of the last evaluation is not written


@pytest.mark.parametrize("engine", ["async", "bounded"])
def test_an_early_stop_of_an_engine_without_rounds_is_where_the_evaluations_say(engine: str) -> None:
    story = simulate(stopping(engine, **({"staleness": 2} if engine == "bounded" else {})))

    assert story.lives == ["finished"]
    told = {found.round: found.mean_top1 for news in story.news for found in news.evaluations}
    assert story.stopped_early is not None
    best, end = story.stopped_early["best_round"], story.stopped_early["round"]
    assert (max(told), end - best) == (end, 4)
    assert told[best] == max(told.values())


@pytest.mark.parametrize(
    ("engine", "settings", "faults"),
    [
        ("sync", {"shards": 2}, (SERVER,)),
        ("sync", {}, (DRIVER,)),
        ("bounded", {"staleness": 0}, ()),
        ("allreduce", {}, (DRIVER,)),
    ],
)
def test_averages_are_those_of_local(engine: str, settings: dict[str, object], faults: tuple[Fault, ...]) -> None:
    """The private tensors of task a are its worker's, and those of b lie on the server or in the ranks."""
    tasks = (ToyTask(name="a", ema=0.9), ToyTask(name="b", workers=2, ema=0.5))
    chosen = schedule(engine, *faults, tasks=tasks, evaluate_every=3, engine={"name": engine, **settings})
    plain = replace(chosen, engine="local", faults=(), job=replace(chosen.job, engine=LOCAL_ROUNDS))
    story, local = simulate(chosen), simulate(plain)
    without = simulate(replace(plain, job=replace(plain.job, tasks=TASKS)))

    assert len(story.lives) == 1 + (DRIVER in faults)
    assert story.last is not None
    assert local.last is not None
    assert without.last is not None
    assert story.last.keys() == local.last.keys()
    assert all(tensor.equal(local.last[name]) for name, tensor in story.last.items())
    differing = {name for name, tensor in story.last.items() if not tensor.equal(without.last[name])}
    assert differing == {f"tasks/{task}/patch.{name}" for task in "ab" for name in ("learned", "total")}


@pytest.mark.parametrize("engine", ["async", "bounded", "sync", "allreduce", "local"])
def test_ctrl_c_stops_a_run_long_before_its_end(engine: str) -> None:
    settings = {"bounded": {"staleness": 2}, "local": {"schedule": "rounds"}}.get(engine, {})
    chosen = schedule(engine, engine={"name": engine, **settings})
    story = run(replace(chosen, requests=(Request(1.5, "interrupt"),)))

    assert story.lives == ["stopped", "finished"]
    checkpoint = story.paused[0]
    assert checkpoint is not None
    assert max(counters.step for counters in checkpoint.progress.workers.values()) < chosen.job.steps
