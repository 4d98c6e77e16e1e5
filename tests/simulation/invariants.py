"""What has to hold after every simulated run. Each function yields sentences that say what does not."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import numpy as np
from torch import Tensor

from multitask.job.checkpoint import Checkpoint
from multitask.server.messages import Evaluation, mean_top1
from tests.simulation import formulas
from tests.simulation.behaviour import worker_and_step
from tests.simulation.faults import Kind
from tests.simulation.reference import reference_of
from tests.simulation.run import UNWRITTEN, News, Story
from tests.simulation.schedule import STEPS
from tests.simulation.toy import ToyJob
from tests.simulation.views import View, expected_private, view_of_checkpoint, view_of_evaluation

Complaints = Iterator[str]


def complaints(story: Story) -> list[str]:
    """Return everything that does not hold, in words."""
    return list(chain.from_iterable(check(story) for check in CHECKS))


# Facts about a schedule.


def together(story: Story) -> bool:
    """Return whether all pushes of a round make one update."""
    engine = story.schedule.job.engine
    return engine["name"] in ("sync", "allreduce") or engine.get("schedule") == "rounds" or engine.get("staleness") == 0


def is_undisturbed(story: Story) -> bool:
    """Return whether nothing happened that could cost a step, an answer or time."""
    return story.schedule.disturbances == 0 and story.lives == ["finished"]


def rejected_steps(story: Story, job: ToyJob, worker: str) -> set[int]:
    """Return the steps of a worker whose gradients are not finite."""
    task = job.task(job.workers[worker])
    found = set()
    for key, fault in story.schedule.behaviour.faults.items():
        name, step = worker_and_step(key)
        shared = fault.kind == "nan-shared" and job.spec.train_shared
        private = fault.kind == "nan-private" and task.options["private"]
        if name == worker and (shared or private):
            found.add(step)
    return found


def may_lose_steps(story: Story) -> bool:
    """Return whether the server may have gone back to a version before the latest one while workers went on."""
    return not together(story) and bool(story.schedule.faults)


def evaluations(story: Story) -> Iterator[tuple[News, Evaluation]]:
    return ((news, evaluation) for news in story.news for evaluation in news.evaluations)


# How the run ended.


def it_ends_as_the_documents_promise(story: Story) -> Complaints:
    if story.stuck is not None:
        yield f"The run does not end: {story.stuck}"
        return
    if story.raised is not None:
        yield f"The driver raised an error that no user should see: {story.raised}"
        return
    schedule = story.schedule
    raises = [worker_and_step(at) for at, fault in schedule.step_faults.items() if fault.kind == "raise"]
    kills = [fault for fault in schedule.faults if fault.kind not in (Kind.ADD_NODE, Kind.DELAY_CALL)]
    for life, end in enumerate(story.lives):
        if end in ("finished", "stopped"):
            continue
        if end == "killed":
            if not schedule.store_faults and not any(fault.target == "driver" for fault in schedule.faults):
                yield "The driver ended without a reason."
        elif end.startswith("CheckpointError"):
            if story.saved and story.saved[0][0] < story.lives.index(end):
                yield f"A complete checkpoint was not found: {end}"
        elif UNWRITTEN in end:
            if not any(fault.kind == "fails" for fault in schedule.store_faults):
                yield f"A file could not be written: {end}"
        elif "without a step made" in end:
            if len(kills) <= 3 or not _was_lost_again_and_again(story, life, end):
                yield f"The run ended although steps were made between its losses: {end}"
        elif not any(_explains(story, end, at, len(kills)) for at in [None, *raises]):
            yield f"The run ended with an error that nothing explains: {end}"
    if raises and story.lives[-1] == "finished" and _all_present(story, raises):
        yield f"A worker raised an exception in {raises}, and the run finished."


def _explains(story: Story, end: str, raised: tuple[str, int] | None, kills: int) -> bool:
    """Return whether an error of a driver is one that the documents promise in this schedule."""
    if raised is not None:
        return f"'{raised[0]}'" in end and "cannot be learned from" in end
    attached = any(request.kind == "attach" for request in story.schedule.requests)
    return (kills > 0 or attached) and "did not start within" in end


def _was_lost_again_and_again(story: Story, life: int, end: str) -> bool:
    """Return whether the driver noted three losses, before the last one, since it last heard of a step.

    Args:
        end: the driver's error. If it is about one worker, the steps of this worker count.
    """
    heard_s = max(
        (
            news.at_s
            for news in story.news
            for record in news.records
            if news.life == life and (f"'{record.worker}'" in end or "Worker '" not in end)
        ),
        default=0.0,
    )
    return sum(at_s >= heard_s for at_s in story.losses) >= 3


def _all_present(story: Story, at: Iterable[tuple[str, int]]) -> bool:
    """Return whether the workers are still part of the job at its end."""
    assert story.job is not None
    names = {task.name for task in story.job.spec.tasks}
    return all(worker.partition("/")[0] in names for worker, _ in at)


def nothing_is_left_behind(story: Story) -> Complaints:
    if story.stuck is None:
        yield from (f"Left behind: {left}." for left in story.leftovers)
        if "killed" not in story.lives:
            yield from (f"An incomplete file is left behind: {name}." for name in story.partial_files)


# What the values say.


def every_version_is_consistent(story: Story) -> Complaints:
    for view, _ in all_views(story):
        yield from (f"{view.what}: {wrong}" for wrong in chain(_counts_fit(story, view), _private_fits(story, view)))


def all_views(story: Story) -> Iterator[tuple[View, int]]:
    """Return all versions that were evaluated or saved, each with the number of the driver that heard of it."""
    for news, evaluation in evaluations(story):
        yield view_of_evaluation(news.job, evaluation), news.life
    for life, job, checkpoint in story.saved:
        yield view_of_checkpoint(job, checkpoint), life


def _counts_fit(story: Story, view: View) -> Complaints:
    """Every push is in all shared parts that its worker uses, once, and in no other part."""
    job = view.job
    if not job.spec.train_shared:
        return
    optimizer = job.spec.optimizer
    for worker, task in job.workers.items():
        row = view.rows[worker]
        rejected = rejected_steps(story, job, worker)
        for part, counts in view.counts.items():
            found = {int(step) for step in np.flatnonzero(counts[row])}
            if part not in view.parts_of(task):
                if found:
                    yield f"part '{part}' learned from steps {sorted(found)} of {worker}, which does not use it."
                continue
            if found != view.applied[worker]:
                extra = sorted(found - view.applied[worker])
                yield f"steps {extra} of {worker} are in part '{part}' and not in all its parts."
            if found & rejected:
                yield f"steps {sorted(found & rejected)} of {worker} are in part '{part}', though they were rejected."
            times = formulas.times_applied(counts[row], optimizer.rate, optimizer.momentum)
            wrong = [] if together(story) else [step for step in found if times[step] != 1]
            if wrong:
                yield f"steps {wrong} of {worker} were applied {times[wrong]} times to part '{part}'."


def _private_fits(story: Story, view: View) -> Complaints:
    """The private tensors of a task with one worker have learned from its first steps, each of them once."""
    if story.schedule.job.schedule["name"] != "constant":
        return  # The formulas ask for one rate; all bits are compared with those of an undisturbed run.
    for worker, task in view.job.workers.items():
        if not view.job.holds_private(worker):
            continue
        rejected = rejected_steps(story, view.job, worker)
        count = int(view.private(task, "norm.num_batches_tracked"))
        made = [step for step in range(STEPS) if step not in rejected][:count]
        wanted = expected_private(view.job, task, made)
        found = [view.private(task, name) for name in ("learned", "total", "norm.running_mean", "norm.running_var")]
        for one, other in zip(found, (wanted.learned, wanted.total, wanted.mean, wanted.variance), strict=True):
            if not np.array_equal(one, other):
                yield f"the private tensors of '{task}' are not what {count} steps make of them."
                break


def private_tensors_are_as_of_the_last_push(story: Story) -> Complaints:
    """A version's private tensors have learned from no step that the version has yet to learn from, nor less."""
    final = final_view(story)
    for view, life in all_views(story):
        if not view.job.spec.train_shared:
            continue
        # A driver or a server that went on from a checkpoint may make steps again that were lost. So the end of the run
        # says only of versions of its last driver and server which steps came later.
        lasted = final is not None and life == len(story.lives) - 1 and view.server in (None, final.server)
        ends = final.applied if final is not None and lasted else {}
        for worker in view.job.workers:
            if not view.job.holds_private(worker):
                continue
            learned, applied = view.learned(worker), view.applied[worker]
            later = (learned - applied) & ends.get(worker, frozenset())
            if later:
                yield f"{view.what}: the private tensors of {worker} have learned from later steps {sorted(later)}."
            if learned - applied and not may_lose_steps(story):
                yield f"{view.what}: {worker} has learned from {sorted(learned - applied)}, and the server has not."
            if applied - learned and not (story.schedule.disturbances and not together(story)):
                yield f"{view.what}: {worker} has not learned from {sorted(applied - learned)}, and the server has."


def final_view(story: Story) -> View | None:
    """Return the last version of a run that has finished."""
    if story.lives[-1:] != ["finished"]:
        return None
    news, evaluation = last_evaluation(story)
    return view_of_evaluation(news.job, evaluation)


def last_evaluation(story: Story) -> tuple[News, Evaluation]:
    """Return the evaluation of the newest version of the last server. It need not be told last."""
    told = list(evaluations(story))
    server = told[-1][1].server
    return max((one for one in told if one[1].server == server), key=lambda one: one[1].version)


def counters_add_up(story: Story) -> Complaints:
    for _, job, checkpoint in story.saved:
        view = view_of_checkpoint(job, checkpoint)
        yield from (f"{view.what}: {wrong}" for wrong in _counters_fit(story, view, checkpoint))
    final = final_view(story)
    if final is None:
        return
    progress = story.news[-1].progress
    for worker, counters in progress.workers.items():
        if counters.step != STEPS:
            yield f"{worker} ended at step {counters.step}."
        yield from _unapplied_steps_are_counted(story, final, worker, counters.step, counters.lost, counters.rejected)
        if counters.lost and not may_lose_steps(story):
            yield f"{worker} lost {counters.lost} steps, and the server has not gone back."
        if counters.redone and (together(story) or not story.schedule.disturbances):
            yield f"{worker} made {counters.redone} steps again, and was not lost."
    if progress.version != _version_of(final) and _counts_tell_versions(story, final):
        yield f"The last version is {progress.version}, and {_version_of(final)} pushes are in its values."


def _counters_fit(story: Story, view: View, checkpoint: Checkpoint) -> Complaints:
    progress, job = checkpoint.progress, view.job
    for worker, counters in progress.workers.items():
        task = job.task(job.workers[worker])
        where = formulas.batch_start(counters.step, task.batch_size, task.undecodable == "skip")
        if counters.position != where:
            yield f"{worker} made {counters.step} steps, and its position is {counters.position} instead of {where}."
        if job.holds_private(worker):
            learned = int(view.private(task.name, "norm.num_batches_tracked"))
            made = counters.private_step - len(
                [step for step in rejected_steps(story, job, worker) if step < counters.private_step]
            )
            if learned != made:
                yield f"the private tensors of {worker} learned from {learned} steps, and {made} are counted."
            if counters.private_step != counters.step and not story.schedule.disturbances:
                yield f"{worker} made {counters.step} steps, and its private tensors {counters.private_step}."
        if job.spec.train_shared:
            yield from _unapplied_steps_are_counted(
                story, view, worker, counters.step, counters.lost, counters.rejected
            )
    if job.spec.train_shared and _counts_tell_versions(story, view) and progress.version != _version_of(view):
        yield f"{_version_of(view)} pushes are in its values."
    made = {counters.step for counters in progress.workers.values()}
    if together(story) and not story.schedule.requests and made != {progress.rounds}:
        yield f"{progress.rounds} rounds are counted, and the workers made {made} steps."


def _unapplied_steps_are_counted(
    story: Story, view: View, worker: str, step: int, lost: int, rejected: int
) -> Complaints:
    """Every step up to a version is in its values, or counts as lost or as rejected."""
    if not view.job.spec.train_shared:
        return
    applied = view.applied[worker]
    if any(found >= step for found in applied):
        yield f"{worker} made {step} steps, and later ones are in the values."
    missing = set(range(step)) - applied
    if len(missing) != lost + rejected:
        yield (
            f"{worker}: steps {sorted(missing)} are not in the values, and {lost} count as lost and {rejected} as "
            "rejected."
        )
    unexpected = missing - rejected_steps(story, view.job, worker)
    if len(unexpected) > lost:
        yield f"{worker}: steps {sorted(unexpected)} are not in the values, and only {lost} count as lost."


def _counts_tell_versions(story: Story, view: View) -> bool:
    """Return whether the number of pushes in the values is the number of the version."""
    return view.job.spec.train_shared and not together(story) and not story.schedule.requests


def _version_of(view: View) -> int:
    return sum(map(len, view.applied.values()))


def every_applied_step_was_told(story: Story) -> Complaints:
    """The driver heard of every step that is in the values, of the rejected ones, and in order."""
    told: Counter[tuple[str, int]] = Counter()
    steps: dict[str, list[int]] = {}
    for news in story.news:
        for record in news.records:
            steps.setdefault(record.worker, []).append(record.step)
            if record.rejected is None and not record.redone:
                told[record.worker, record.step] += 1
            spoiled = record.step in rejected_steps(story, news.job, record.worker)
            if spoiled and record.rejected is None and not record.redone:
                yield f"Step {record.step} of {record.worker} was not rejected, though its gradient is not finite."
            if record.rejected and not spoiled:
                yield f"Step {record.step} of {record.worker} was rejected: {record.rejected}"
    final = final_view(story)
    if final is not None and final.job.spec.train_shared:
        for worker, applied in final.applied.items():
            silent = [step for step in sorted(applied) if not told[worker, step]]
            if silent:
                yield f"The driver never heard of steps {silent} of {worker}."
    if is_undisturbed(story):
        for worker, made in steps.items():
            if made != list(range(STEPS)):
                yield f"{worker} is told to have made steps {made}."


def no_worker_runs_ahead_of_the_bound(story: Story) -> Complaints:
    """Under `bounded` with staleness b, a worker makes a step when the slowest one is less than b steps behind it."""
    schedule = story.schedule
    bound = schedule.job.engine.get("staleness", 0)
    if not bound or schedule.faults or schedule.requests or story.lives != ["finished"]:
        return
    made = dict.fromkeys(story.news[0].job.workers, 0)
    for record in (record for news in story.news for record in news.records):
        behind = record.step - min(made.values())
        if behind >= bound:
            yield f"{record.worker} makes step {record.step} while the slowest worker has made {min(made.values())}."
        made[record.worker] = record.step + 1


# Evaluations.


def metrics_are_those_of_the_values(story: Story) -> Complaints:
    for news, evaluation in evaluations(story):
        if evaluation.metrics.keys() != {task.name for task in news.job.spec.tasks}:
            yield f"The evaluation of version {evaluation.version} has metrics of {list(evaluation.metrics)} only."
        for task, found in evaluation.metrics.items():
            names = sorted(name for name, group in news.job.groups_of(task).items() if group.layout.pushed)
            if not evaluation.groups.keys() >= set(names):
                yield f"The evaluation of version {evaluation.version} lacks groups of '{task}'."
                continue
            held = [evaluation.groups[name] for name in names]
            wanted = formulas.metrics_of_bytes([(group.values, group.counters) for group in held])
            if found != wanted:
                yield f"The metrics of '{task}' at version {evaluation.version} are not those of its values."


def evaluations_come_when_they_are_due(story: Story) -> Complaints:
    if not is_undisturbed(story) or any(f.kind.startswith("nan") for f in story.schedule.behaviour.faults.values()):
        return
    rounds = [evaluation.round for _, evaluation in evaluations(story)]
    last = story.news[-1].progress.rounds
    every = story.schedule.job.evaluate_every
    wanted = sorted({*range(every, math.floor(last) + 1, every), math.floor(last)})
    if sorted(set(rounds)) != wanted:
        yield f"Rounds {rounds} were evaluated instead of {wanted}."


def the_best_version_is_kept(story: Story) -> Complaints:
    """`best` is the best version since the tasks last changed, also where the server went back in the meantime."""
    if story.best is None or "killed" in story.lives:
        return
    tasks = story.best["tasks"]
    told: list[float] = []
    for news, evaluation in evaluations(story):
        if news.changed:
            told.clear()
        if evaluation.metrics.keys() == tasks.keys():
            told.append(evaluation.mean_top1)
    if mean_top1(tasks.values()) != max(told):
        yield f"The best version has {mean_top1(tasks.values())} %, and {max(told)} % were told."


def the_last_version_is_kept(story: Story) -> Complaints:
    final = final_view(story)
    if final is None:
        return
    assert story.last is not None
    if different(story.last, final.tensors):
        yield f"last.safetensors differs from the {final.what} in {different(story.last, final.tensors)}."
    _, evaluation = last_evaluation(story)
    if evaluation.version != story.news[-1].progress.version:
        yield f"The last evaluation is of version {evaluation.version}, not {story.news[-1].progress.version}."


def different(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """Return the names of tensors that are missing, additional, or not equal bit for bit."""
    names = found.keys() ^ wanted.keys()
    return sorted(names | {name for name in found.keys() & wanted.keys() if not found[name].equal(wanted[name])})


# Stops.


def a_pause_loses_no_step(story: Story) -> Complaints:
    """The checkpoint of a stop has every step that was made, except steps that a lost server has lost.

    These are in no values. A checkpoint may have been taken before all workers had told the restored server of them.
    """
    paused = iter(story.paused)
    for life, end in enumerate(story.lives):
        if end != "stopped":
            continue
        checkpoint = next(paused)
        told = [news for news in story.news if news.life == life]
        if checkpoint is None or not told:
            yield f"Driver {life} stopped without a checkpoint."
            continue
        made, saved = (
            {name: counters.step - counters.lost for name, counters in progress.workers.items()}
            for progress in (told[-1].progress, checkpoint.progress)
        )
        if made != saved:
            yield f"Driver {life} stopped with steps {made}, and its checkpoint has {saved}."


# Bits.


def rounds_end_with_the_bits_of_an_undisturbed_run(story: Story) -> Complaints:
    """Where the pushes of a round are one update, all versions are those of engine `local`, bit for bit."""
    if not together(story):
        return
    reference = reference_of(story.schedule)
    tasks = {task.name for task in story.schedule.job.tasks}
    changed = next((number for number, news in enumerate(story.news) if news.changed), len(story.news))
    for news in story.news[:changed]:
        for evaluation in news.evaluations:
            view = view_of_evaluation(news.job, evaluation)
            wrong = different(dict(view.tensors), reference.values[evaluation.version])
            if wrong:
                yield f"{view.what}: {wrong} differ from the undisturbed run."
    for _, job, checkpoint in story.saved:
        if {task.name for task in job.spec.tasks} != tasks or changed < len(story.news):
            continue
        wrong = different(checkpoint.tensors, reference.saved[checkpoint.progress.version])
        if wrong:
            yield f"checkpoint of version {checkpoint.progress.version}: {wrong} differ from the undisturbed run."


CHECKS: tuple[Callable[[Story], Complaints], ...] = (
    it_ends_as_the_documents_promise,
    nothing_is_left_behind,
    every_version_is_consistent,
    private_tensors_are_as_of_the_last_push,
    counters_add_up,
    every_applied_step_was_told,
    no_worker_runs_ahead_of_the_bound,
    metrics_are_those_of_the_values,
    evaluations_come_when_they_are_due,
    the_best_version_is_kept,
    the_last_version_is_kept,
    a_pause_loses_no_step,
    rounds_end_with_the_bits_of_an_undisturbed_run,
)
