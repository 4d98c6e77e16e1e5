"""Training from start to end: start or resume a job, follow it, change its tasks, and write its run directory."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from rich.console import Console

from multitask.cluster.interface import Cluster
from multitask.cluster.logs import LOG, log_to
from multitask.cluster.places import check_places
from multitask.cluster.ray_cluster import RayCluster
from multitask.engines import ENGINES, Driver, Outcome
from multitask.errors import TrainingError
from multitask.job import Job
from multitask.job.caches import describe
from multitask.job.checkpoint import CheckpointError, CheckpointStore
from multitask.job.room import check_room
from multitask.job.writing import keep_trying
from multitask.run.claim import check_new, check_stopped, claiming, empty
from multitask.run.directory import Run, RunError, read_about, read_spec, write_json, write_spec, write_version
from multitask.run.files import STATUS_REMEDY, read_json
from multitask.run.finite import check_finite
from multitask.run.live import STATUS, Request, Requests, changed_spec, read_status
from multitask.run.monitor import RunMonitor
from multitask.run.paths import absolute, check_data, moved
from multitask.run.stopping import Stopped, first_interrupt, sigterm_as_ctrl_c
from multitask.run.tasks import TASKS, TaskRecord, kept_classes, read_tasks, warn_of_other_tables, write_tasks
from multitask.run.tracking import Tracker
from multitask.run.trial import ALONE, Trial, make_tracker, task_params
from multitask.server.messages import Evaluation, mean_top1
from multitask.spec.errors import SpecError
from multitask.spec.reading import load_spec
from multitask.spec.schema import JobSpec

log = logging.getLogger(__name__)


def train(
    spec: str | Path | Mapping[str, Any] | JobSpec,
    *,
    overwrite: bool = False,
    console: Console | None = None,
    trial: Trial = ALONE,
) -> Run:
    """Run one training job from its spec to its end.

    Args:
        spec: a YAML file, a mapping, or a JobSpec.
        overwrite: whether to replace a run that is already in the run directory.
        console: console of the progress bars; standard error by default.
        trial: the settings of a sweep's trial.
    Returns:
        The finished run, with `result`, `models()` and `export()`.
    Raises:
        SpecError and the errors of patches and data: the job cannot run. They are raised before anything starts.
        TrainingError: a worker failed, the cluster has no place for it, or a file could not be written for a minute.
        Stopped: the user pressed Ctrl-C, or the sweep asked for a stop. A second Ctrl-C does not wait for the
            checkpoint.
    """
    spec = absolute(load_spec(spec))
    directory = spec.run_directory
    check_new(directory, overwrite)
    store = CheckpointStore(spec.checkpoint_folder, spec.checkpoints.keep)
    if store.where() is not None and not overwrite:
        raise SpecError(
            f"'{spec.checkpoint_folder}' holds checkpoints of a run. Name another folder with `checkpoints.uri`, go on "
            f"with that run (multitask resume {quote(str(directory))}), or replace it (--overwrite; "
            "in Python overwrite=True)."
        )
    job = Job(spec, loaded=trial.loaded)
    check_room(job)
    training = _training(directory, job, store, console, None, trial)
    with claiming(directory):
        check_new(directory, overwrite)  # again, because another process may have claimed it meanwhile
        empty(directory)
        store.clear()
        write_tasks(directory, job, {})
        write_spec(directory / "spec.yaml", job.spec)
        training.claim()
    return training.run()


def resume(directory: Path, *, console: Console | None = None, trial: Trial = ALONE) -> Run:
    """Resume a run that stopped or whose driver was lost, from its latest checkpoint.

    Args:
        directory: the run directory.
        console, trial: as for `train`.
    Raises:
        RunError: there is no run, or it has ended, or it is running, or one of its files is damaged, or its data is
            gone, or a head of a run of version 0.1 has more outputs than classes.
        CheckpointError: all its checkpoints are damaged.
        The errors of `train`.
    """
    directory = directory.resolve()
    check_stopped(directory)
    spec = moved(read_spec(directory / "spec.yaml"), directory)
    store = CheckpointStore(spec.checkpoint_folder, spec.checkpoints.keep)
    records = read_tasks(directory)
    check_data(spec, spec.tasks)
    job = Job(spec, store.latest(), trial.loaded, kept_classes(spec, records))
    warn_of_other_tables(job, records)
    with claiming(directory):
        status = check_stopped(directory)  # again, because another process may have claimed it meanwhile
        write_spec(directory / "spec.yaml", job.spec)
        write_tasks(directory, job, records)
        training = _training(directory, job, store, console, status, trial)
        training.claim()
    return training.run()


def track(directory: Path) -> tuple[int, str | None]:
    """Send MLflow the records that it could not take while a run was trained.

    The MLflow run of a killed driver, which nobody has ended, is marked as failed.

    Args:
        directory: the run directory.
    Returns:
        The number of records that were sent, and the id of the MLflow run.
    Raises:
        RunError: there is no run, or its spec is damaged, or it is running and sends its records itself.
        TrackingError: MLflow still does not take the records.
    """
    directory = directory.resolve()
    read_status(directory)  # so that a directory without a run stays as it is
    with claiming(directory):
        status = read_status(directory)
        if status["state"] == "running":
            raise RunError(f"The run in '{directory}' is running, and sends its records as soon as MLflow takes them.")
        tracker = make_tracker(directory, moved(read_spec(directory / "spec.yaml"), directory), status, ALONE)
        try:
            sent = tracker.send_waiting(lost=status["state"] == "lost")
        finally:  # a part may have been sent, and the rest belongs to the same MLflow run
            if tracker.run_id != status["mlflow_run_id"]:
                content = read_json(directory / STATUS, STATUS_REMEDY)
                write_json(directory / STATUS, {**content, "mlflow_run_id": tracker.run_id})
    return sent, tracker.run_id


def _training(
    directory: Path,
    job: Job,
    store: CheckpointStore,
    console: Console | None,
    status: Mapping[str, Any] | None,
    trial: Trial,
) -> "Training":
    """Return the training of a job, which MLflow, progress bars and the status file follow.

    Args:
        status: content of the status file, if the run goes on from an earlier start.
    """
    tracker = make_tracker(directory, job.spec, status, trial)
    return Training(directory, job, store, tracker, RunMonitor(directory, job, tracker, console, status), trial)


class Training:
    """The driver's work on a run, from its start or its latest checkpoint to its end."""

    def __init__(
        self,
        directory: Path,
        job: Job,
        store: CheckpointStore,
        tracker: Tracker,
        monitor: RunMonitor,
        trial: Trial = ALONE,
        cluster: Cluster | None = None,
    ) -> None:
        """Args:
        directory: the run directory.
        store: the run's checkpoints.
        cluster: the cluster that the run uses; by default the Ray cluster that `multitask.cluster.session` finds.
        """
        self._directory, self._job, self._store, self._trial = directory, job, store, trial
        self._tracker, self._monitor = tracker, monitor
        self._cluster = RayCluster() if cluster is None else cluster
        self._interrupted = False
        self._requests = Requests(directory)
        self._request: tuple[Request, Job] | None = None
        self._records: dict[str, TaskRecord] = {}

    def claim(self) -> None:
        """Write that this process runs the training now."""
        self._monitor.begin()

    def run(self) -> Run:
        """Train until the end, and return the finished run. Whatever ends it earlier ends the claim too."""
        try:
            with (
                sigterm_as_ctrl_c(),
                first_interrupt(self.interrupt),
                self._monitor.showing(self._job),
                log_to(self._directory / LOG, self._job.spec.name),
            ):
                self._train_logged()
        except Stopped:
            self._monitor.end("stopped")
            raise
        except TrainingError as error:
            self._monitor.end("failed", str(error))
            raise self._explained(error) from error
        except BaseException as error:
            self._monitor.end("failed", repr(error))
            raise
        self._monitor.end("finished")
        return Run(self._directory)

    def _train_logged(self) -> None:
        """Train, tracked by MLflow, and log how it ends."""
        try:
            with self._tracker:
                self._train()
        except Stopped:
            log.info("Stopped, with a checkpoint.")
            raise
        except TrainingError as error:
            log.error("%s", error, extra=error.about)
            raise
        except BaseException as error:
            log.error("%r", error)
            raise
        log.info("Finished.")

    def _train(self) -> None:
        """Let the engine train, and write the result.

        Raises:
            Stopped: the user or the sweep asked for a stop.
        """
        start = time.perf_counter()
        self._records = read_tasks(self._directory)
        self._monitor.change_tasks(self._job)  # with the id of the MLflow run, which is known now
        log.info("Starts from %s, engine %s.", self._store.where() or "the start", self._job.spec.engine.name)
        for line in describe(self._job.caches):
            self._monitor.say(line)
        outcome = self._run_engine()
        if outcome.paused:
            raise Stopped(
                f"Stopped; the checkpoint is {self._store.where()}. "
                f"Go on with: multitask resume {quote(str(self._directory))}"
            )
        self._finish(outcome, time.perf_counter() - start)

    def _explained(self, error: TrainingError) -> TrainingError:
        """Add the run's name to an engine's error, and how to go on if there is a checkpoint."""
        go_on = f"`multitask resume {quote(str(self._directory))}`"
        try:
            where = self._store.where()
        except CheckpointError as problem:
            hint = f"\nThe checkpoints cannot be read ({problem}) Then {go_on} goes on."
        else:
            hint = "" if where is None else f"\nThe last checkpoint is {where}; {go_on} goes on from it."
        return type(error)(f"Run '{self._job.spec.name}': {error}{hint}", error.about)

    def _run_engine(self) -> Outcome:
        """Run the engine until the job ends or is interrupted. Each change of its tasks starts the engine again."""
        recoveries: list[float] = []
        while True:
            driver = Driver(self._take, self._store, self._wants_pause, self._cluster)
            outcome = ENGINES[self._job.spec.engine.name](self._job, driver)
            recoveries += outcome.recoveries
            outcome.recoveries = recoveries
            if self._request is not None and not outcome.paused:
                self._requests.answer(self._request[0], "the run has ended.")
            if self._request is None or not outcome.paused:
                return outcome
            self._change_tasks(*self._request)
            self._request = None

    def _take(self, records: Any, evaluations: list[Evaluation], progress: Any) -> None:
        """Record what an engine reports: new steps, new evaluations and the counters.

        Raises:
            TrainingError: an evaluated version holds NaN or infinity.
        """
        for evaluation in evaluations:
            check_finite(self._job, evaluation)
            if self._is_best(evaluation):
                self._write_version("best", evaluation)
        self._monitor.update(records, evaluations, progress)
        for evaluation in evaluations:
            self._trial.on_evaluation(evaluation)

    def _is_best(self, evaluation: Evaluation) -> bool:
        """Return whether an evaluation is better than the best version on disk.

        The first evaluation counts as the best, and so does the first one after the job's tasks changed. The file
        decides, and not the server, because a server that went back to a checkpoint does not know the evaluations after
        that checkpoint.
        """
        tasks = self._best_tasks() or {}
        return tasks.keys() != evaluation.metrics.keys() or evaluation.mean_top1 > mean_top1(tasks.values())

    def _best_tasks(self) -> dict[str, dict[str, float]] | None:
        """Return the metrics of the best version on disk, or None if there is none that can be read."""
        best = self._directory / "best.safetensors"
        if not best.exists():
            return None
        try:
            tasks: dict[str, dict[str, float]] = read_about(best)["tasks"]
        except RunError as error:
            log.warning("The best version is chosen anew, because the one before cannot be read: %s", error)
            return None
        return tasks

    def _write_version(self, name: str, version: Evaluation) -> None:
        about = {"version": version.version, "round": version.round, "tasks": version.metrics}
        path, tensors = self._directory / f"{name}.safetensors", self._job.state(version.groups)
        keep_trying(f"'{path}'", lambda: write_version(path, *tensors, about))

    def _keep_directory(self) -> None:
        """Make the run directory, or what the run keeps in it, anew if somebody has removed it."""
        if (self._directory / "spec.yaml").exists() and (self._directory / TASKS).exists():
            return
        self._keep_spec()
        log.warning(
            "Files in '%s' were removed while the run goes on, and were made anew. If the whole folder was removed, "
            "the next checkpoint is written when it is due, and the best version is chosen from now on.",
            self._directory,
        )

    def _keep_spec(self) -> None:
        """Write the spec, and what each task began with."""
        # A task without a record gets the class list of its table. So a task that is removed leaves the spec first, and
        # one that is added has learned nothing yet.
        keep_trying("The spec", lambda: write_spec(self._directory / "spec.yaml", self._job.spec))
        # The records are those in memory, because somebody may have damaged the file.
        self._records = keep_trying(
            "The record of the tasks", lambda: write_tasks(self._directory, self._job, self._records)
        )

    def interrupt(self) -> None:
        """Let all workers stop after their step, with a checkpoint; then `run` raises Stopped."""
        self._interrupted = True
        self._monitor.say("Stopping after this step, with a checkpoint. Ctrl-C again does not wait.")

    def _wants_pause(self) -> bool:
        """Return whether to pause: after Ctrl-C, if the sweep asks, or to change the job's tasks on a valid request."""
        self._keep_directory()
        if self._interrupted or self._trial.wants_stop() or self._request is not None:
            return True
        for request in self._requests.waiting():
            try:
                # The changed job is built before the pause: an error is answered while training goes on, and only this
                # process reads and checks a new task's data.
                job = self._job.changed(changed_spec(self._job.spec, request))
                check_places(self._cluster, job.spec)
            except Exception as error:  # of any kind, also from a filesystem: a bad request must not end the run
                self._requests.answer(request, str(error) or repr(error))
            else:
                self._request = request, job
                return True
        return False

    def _change_tasks(self, request: Request, changed: Job) -> None:
        """Add or remove a task at the checkpoint of the pause; a removed task's last version is kept in removed/."""
        checkpoint = self._store.latest()
        assert checkpoint is not None, "a pause ends with a checkpoint"
        if request.remove is not None:
            before = self._job.restored(checkpoint)
            backbone, private = before.state({name: group.state() for name, group in before.groups.items()})
            path = self._directory / "removed" / f"{request.remove}.safetensors"
            tensors = {request.remove: private[request.remove]}
            keep_trying(f"'{path}'", lambda: write_version(path, backbone, tensors, {}))
        spec = changed.spec
        self._job = changed.changed(spec, checkpoint)
        self._keep_spec()
        # A task that is added later under the name of a removed one is a different task.
        (self._directory / "best.safetensors").unlink(missing_ok=True)
        self._tracker.track_tasks(task_params(spec))
        self._monitor.change_tasks(self._job)
        log.info("The tasks are now %s.", ", ".join(task.name for task in spec.tasks))
        self._requests.answer(request)

    def _finish(self, outcome: Outcome, seconds: float) -> None:
        """Write the last version and the run's result."""
        self._keep_directory()
        self._keep_spec()  # whatever somebody has done to it
        self._write_version("last", outcome.versions["last"])
        if self._best_tasks() is None:  # it was removed or damaged while the run went on
            self._write_version("best", outcome.versions.get("best", outcome.versions["last"]))
        result: dict[str, Any] = {
            version: read_about(self._directory / f"{version}.safetensors") for version in ("last", "best")
        }
        result |= {
            "engine": self._job.spec.engine.name,
            "parameters": self._job.parameters(),
            "trained_parameters": self._job.trained_parameters(),
            "seconds": seconds,
            "recovery_seconds": outcome.recoveries,
            "mlflow_run_id": self._tracker.run_id,
            "rejected_calls": self._monitor.rejected_calls,
            "tasks": self._monitor.summary(),
        }
        path = self._directory / "result.json"
        keep_trying(f"'{path}'", lambda: write_json(path, result))
        self._tracker.log_artifact(path)
