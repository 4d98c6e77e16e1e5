"""Start a training job, or go on with one; watch it, change its tasks, and leave a run directory behind."""

import contextlib
import logging
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from multitask.cluster.logs import LOG, log_to
from multitask.cluster.places import check_places
from multitask.engines import ENGINES, Driver, Outcome
from multitask.errors import TrainingError
from multitask.job.caches import describe
from multitask.job.checkpoint import CheckpointStore
from multitask.job import Job, LoadedInputs
from multitask.run.directory import Run, RunError, read_about, write_json, write_spec, write_version
from multitask.run.live import STATUS, Request, read_status, requests
from multitask.run.tracking import Tracker
from multitask.run.watch import Watch
from multitask.server.messages import Evaluation, mean_top1
from multitask.spec.errors import SpecError
from multitask.spec.reading import dump_spec, dump_yaml, load_spec
from multitask.spec.schema import JobSpec

log = logging.getLogger(__name__)


class Stopped(KeyboardInterrupt):
    """Training stopped on Ctrl-C, with a checkpoint; the message says how to go on."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a training is given by the sweep whose trial it is."""

    parent_run_id: str | None = None
    """MLflow's run of the sweep."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """MLflow params of the trial beside its spec."""
    loaded: LoadedInputs | None = None
    """What trials share."""
    on_evaluation: Callable[[Evaluation], None] = lambda _: None
    """Told of each evaluation; training waits for its return."""
    wants_stop: Callable[[], bool] = lambda: False
    """Asked now and then: stop, with a checkpoint."""


ALONE = Trial()


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
        overwrite: replace a run that is in the run directory already.
        console: where the progress bars go; standard error by default.
        trial: what a sweep gives its trials.
    Returns:
        The run directory's content: `result`, `models()`, `export()`.
    Raises:
        SpecError and the errors of patches and data: before anything starts.
        TrainingError: a worker failed, or found no place on the cluster.
        Stopped: Ctrl-C, or the sweep has asked; a second Ctrl-C does not wait for the checkpoint.
    """
    spec = load_spec(spec)
    directory = spec.run_directory.resolve()
    _check_directory(directory, overwrite)
    store = CheckpointStore(spec.checkpoint_folder, spec.checkpoints.keep)
    if store.where() is not None and not overwrite:
        raise SpecError(
            f"'{spec.checkpoint_folder}' holds checkpoints of a run. Name another folder with `checkpoints.uri`, go on "
            f"with that run (multitask train --resume {directory}), or use --overwrite."
        )
    job = Job(spec, loaded=trial.loaded)
    if directory.exists():
        shutil.rmtree(directory)
    store.clear()
    directory.mkdir(parents=True)
    write_spec(directory / "spec.yaml", job.spec)
    return _Training(directory, job, store, console, status=None, trial=trial).run()


def resume(directory: Path, *, console: Console | None = None, trial: Trial = ALONE) -> Run:
    """Go on with a run that stopped, or whose driver was lost, from its latest checkpoint.

    Raises:
        RunError: there is no run, or it has ended.
        CheckpointError: the checkpoint is damaged.
        Otherwise as `train`.
    """
    directory = directory.resolve()
    if not (directory / "spec.yaml").is_file():
        raise RunError(f"'{directory}' holds no run (no spec.yaml). Name a directory that `multitask train` uses.")
    if (directory / "result.json").is_file():
        raise RunError(f"The run in '{directory}' has ended; there is nothing to go on with. Next: multitask export.")
    # A run whose driver was lost before it could write anything has no status.
    status = read_status(directory) if (directory / STATUS).is_file() else None
    if status is not None and status["state"] == "running":
        raise RunError(
            f"The run in '{directory}' is running, in process {status['process']} on '{status['host']}'. "
            "Stop that one first (Ctrl-C)."
        )
    # The directory may have moved, or be named from elsewhere.
    spec = replace(load_spec(directory / "spec.yaml"), directory=str(directory))
    store = CheckpointStore(spec.checkpoint_folder, spec.checkpoints.keep)
    job = Job(spec, store.latest(), trial.loaded)
    return _Training(directory, job, store, console, status, trial).run()


class _Training:
    """One driver's work on a run, from its start or its latest checkpoint to its end."""

    def __init__(
        self,
        directory: Path,
        job: Job,
        store: CheckpointStore,
        console: Console | None,
        status: Mapping[str, Any] | None,
        trial: Trial,
    ) -> None:
        """Args:
        status: how a run stood that goes on now.
        """
        self._directory, self._job, self._store, self._trial = directory, job, store, trial
        spec = job.spec
        self._tracker = Tracker(
            spec.tracking.uri or f"sqlite:///{directory.parent}/mlflow.db",
            spec.tracking.experiment,
            spec.name,
            params={key: value for key, value in dump_spec(spec).items() if key != "tasks"} | dict(trial.params),
            tasks=_task_params(spec),
            spec_text=dump_yaml(spec),
            parent_run_id=trial.parent_run_id,
            resume_run_id=None if status is None else status["mlflow_run_id"],
        )
        self._watch = Watch(directory, self._tracker, console, status)
        self._interrupted = False
        self._request: tuple[Request, Job] | None = None

    def run(self) -> Run:
        start = time.perf_counter()
        with (
            self._tracker,
            _first_interrupt(self._interrupt),
            self._watch.showing(self._job),
            log_to(self._directory / LOG, self._job.spec.name),
        ):
            where = self._store.where() or "the start"
            log.info("Starts from %s, engine %s.", where, self._job.spec.engine.name)
            for line in describe(self._job.caches):
                self._watch.say(line)
            try:
                outcome = self._run_engine()
            except TrainingError as error:
                log.error("%s", error, extra=error.about)
                self._watch.end("failed", str(error))
                raise self._explained(error) from error
            except BaseException as error:
                log.error("%r", error)
                self._watch.end("failed", repr(error))
                raise
            if outcome.paused:
                log.info("Stopped, with a checkpoint.")
                self._watch.end("stopped")
                raise Stopped(
                    f"Stopped; the checkpoint is {self._store.where()}. "
                    f"Go on with: multitask train --resume {self._directory}"
                )
            self._finish(outcome, time.perf_counter() - start)
            log.info("Finished.")
        return Run(self._directory)

    def _explained(self, error: TrainingError) -> TrainingError:
        """An engine's error with the run's name, and how to go on where that is possible."""
        where = self._store.where()
        hint = f"The last checkpoint is {where}; `multitask train --resume {self._directory}` goes on from it."
        message = f"Run '{self._job.spec.name}': {error}" + (f"\n{hint}" if where is not None else "")
        return type(error)(message, error.about)

    def _run_engine(self) -> Outcome:
        """Run the engine until the job ends or is interrupted; in between, its tasks may change."""
        recoveries: list[float] = []
        while True:
            outcome = ENGINES[self._job.spec.engine.name](self._job, Driver(self._take, self._store, self._wants_pause))
            recoveries += outcome.recoveries
            outcome.recoveries = recoveries
            if self._request is not None and not outcome.paused:
                self._request[0].answer("it has ended.")
            if self._request is None or not outcome.paused:
                return outcome
            self._change_tasks(*self._request)
            self._request = None

    def _take(self, records: Any, evaluations: list[Evaluation], progress: Any) -> None:
        for evaluation in evaluations:
            if self._is_best(evaluation):
                self._write_version("best", evaluation)
        self._watch(records, evaluations, progress)
        for evaluation in evaluations:
            self._trial.on_evaluation(evaluation)

    def _is_best(self, evaluation: Evaluation) -> bool:
        """Whether it is better than the file that the run has of the same tasks.

        After going back to a checkpoint the server does not know what was evaluated since.
        """
        best = self._directory / "best.safetensors"
        tasks = read_about(best)["tasks"] if best.is_file() else {}
        return tasks.keys() != evaluation.metrics.keys() or evaluation.mean_top1 > mean_top1(tasks.values())

    def _write_version(self, name: str, version: Evaluation) -> None:
        about = {"version": version.version, "round": version.round, "tasks": version.metrics}
        write_version(self._directory / f"{name}.safetensors", *self._job.state(version.groups), about)

    def _interrupt(self) -> None:
        self._interrupted = True
        self._watch.say("Stopping after this step, with a checkpoint. Ctrl-C again does not wait.")

    def _wants_pause(self) -> bool:
        """On Ctrl-C, when its sweep asks, or when the job is asked for a change of its tasks that can be made."""
        if self._interrupted or self._trial.wants_stop() or self._request is not None:
            return True
        for request in requests(self._directory):
            try:
                # What does not fit is said before anybody has to stop, and what is new is read and checked here alone.
                job = Job(_changed(self._job.spec, request), loaded=self._job.inputs())
                check_places(job.spec)
            except Exception as error:  # also a filesystem's: whatever is wrong with a request, the run goes on
                request.answer(str(error) or repr(error))
            else:
                self._request = request, job
                return True
        return False

    def _change_tasks(self, request: Request, changed: Job) -> None:
        checkpoint = self._store.latest()
        assert checkpoint is not None, "a pause ends with a checkpoint"
        if request.remove is not None:
            before = self._job.restored(checkpoint)
            backbone, private = before.state({name: group.state() for name, group in before.groups.items()})
            path = self._directory / "removed" / f"{request.remove}.safetensors"
            path.parent.mkdir(exist_ok=True)
            write_version(path, backbone, {request.remove: private[request.remove]}, {})
        spec = changed.spec
        self._job = Job(spec, checkpoint, changed.inputs())
        write_spec(self._directory / "spec.yaml", spec)
        # A task that comes back under its old name is another one.
        (self._directory / "best.safetensors").unlink(missing_ok=True)
        self._tracker.add_tasks(_task_params(spec))
        self._watch.change_tasks(self._job)
        log.info("Its tasks are now %s.", ", ".join(task.name for task in spec.tasks))
        request.answer()

    def _finish(self, outcome: Outcome, seconds: float) -> None:
        self._write_version("last", outcome.versions["last"])
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
            "rejected_calls": self._watch.rejected_calls,
            "tasks": self._watch.summary(),
        }
        self._watch.end("finished")
        write_json(self._directory / "result.json", result)
        self._tracker.log_artifact(self._directory / "result.json")


def _changed(spec: JobSpec, request: Request) -> JobSpec:
    """The job with one task more or less.

    Raises:
        SpecError: the change cannot be made.
    """
    content = dump_spec(spec)
    names = [task.name for task in spec.tasks]
    if request.attach is not None:
        content["tasks"] = [*content["tasks"], request.attach]
    if request.remove is not None:
        if request.remove not in names:
            raise SpecError(f"it has no task '{request.remove}', only {names}.")
        content["tasks"] = [task for task in content["tasks"] if task["name"] != request.remove]
    return load_spec(content)


def _task_params(spec: JobSpec) -> dict[str, dict[str, Any]]:
    return {task["name"]: task for task in dump_spec(spec)["tasks"]}


@contextlib.contextmanager
def _first_interrupt(call: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C calls; the next one does what it did before."""

    def handle(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        call()

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not the main thread, which alone may handle signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _check_directory(directory: Path, overwrite: bool) -> None:
    """A run is replaced on request only, and what is no run never."""
    if not directory.exists() or not any(directory.iterdir()):
        return
    if not (directory / "spec.yaml").is_file():
        raise SpecError(f"Run directory '{directory}' holds other files and no run. Name another with `directory`.")
    ended = (directory / "result.json").is_file()
    if not overwrite and (ended or (directory / STATUS).is_file()):
        go_on = "" if ended else f" go on with it (multitask train --resume {directory}),"
        raise SpecError(
            f"Run directory '{directory}' holds a run. Name another with `directory`,{go_on} or use --overwrite."
        )
