"""The process that runs trials: a Ray Tune trainable that runs one training job after the other."""

import os
import queue
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune
from rich.console import Console

from multitask.job import LoadedInputs
from multitask.run.directory import Run, write_spec
from multitask.run.live import POLL_S, SILENT_S, STATUS, read_status
from multitask.run.trainer import Stopped, Trial, resume, train
from multitask.server.messages import Evaluation, mean_top1
from multitask.sweep.outcomes import failure_file, read_outcome
from multitask.sweep.plan import TrialPlan
from patches.files import write_atomic

METRIC, ROUND = "validation_top1", "round"


class TrialActor(tune.Trainable):
    """Trains the trial that its config names, and then the next one that Tune hands to it.

    The process imports torch and reads data and backbone once, and uses them for many trials.
    """

    def setup(  # type: ignore[override] # `tune.with_parameters` passes `loaded` and `parent_run_id`
        self, config: Mapping[str, Any], loaded: LoadedInputs, parent_run_id: str | None
    ) -> None:
        """Prepare the first trial.

        Args:
            config: its value `plan` is the TrialPlan of the trial.
            loaded: tables and backbones that the trials of the sweep share.
            parent_run_id: the MLflow run of the sweep.
        """
        self._loaded, self._parent_run_id = loaded, parent_run_id
        self._begin(config)

    def reset_config(self, new_config: Mapping[str, Any]) -> bool:
        """End the trial before, and prepare the next one."""
        self._run.stop()  # if the scheduler has stopped the trial, its training still waits for its next turn
        self._begin(new_config)
        return True

    def _begin(self, config: Mapping[str, Any]) -> None:
        # Tune changes the working directory, but relative data paths refer to the directory where the sweep started.
        os.chdir(os.environ.get("TUNE_ORIG_WORKING_DIR", "."))
        self._run = TrialRun(config["plan"], self._loaded, self._parent_run_id)

    def step(self) -> dict[str, Any]:
        """Train up to the next evaluation, and return its metrics."""
        return self._run.next()

    def cleanup(self) -> None:
        """End the training before Tune ends this process."""
        self._run.stop()


class TrialRun:
    """A training in a thread of its own, which pauses after each evaluation until it is told to continue.

    The run directory records what a trial has done. A trial that is started again therefore first reports its recorded
    evaluations, as if it made them now, and then continues from its last checkpoint. In this way a scheduler that was
    started again learns everything that it knew before.
    """

    def __init__(self, plan: TrialPlan, loaded: LoadedInputs | None, parent_run_id: str | None) -> None:
        self._plan = plan
        values = {"setting": dict(plan.values)}
        self._trial = Trial(
            parent_run_id=parent_run_id,
            params=values,
            loaded=loaded,
            on_evaluation=lambda evaluation: self._tell(evaluation_metrics(evaluation)),
            wants_stop=lambda: self._stopped,
        )
        self._news: queue.Queue[dict[str, Any] | BaseException] = queue.Queue()
        self._may_go_on = threading.Semaphore(0)
        self._stopped = False
        self._thread = threading.Thread(target=self._train, name=plan.spec.name, daemon=True)

    def next(self) -> dict[str, Any]:
        """Train up to the next evaluation or to the end, and return the metrics; at the end they have `done: True`.

        Raises:
            BaseException: whatever the training raised.
        """
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._may_go_on.release()
        news = self._news.get()
        if isinstance(news, BaseException):
            raise news
        return news

    def stop(self) -> None:
        """End the training after its current step, with a checkpoint. Do nothing if it has ended already."""
        self._stopped = True
        self._may_go_on.release()
        if self._thread.ident is not None:
            self._thread.join()

    def _train(self) -> None:
        failure = failure_file(self._plan)
        failure.unlink(missing_ok=True)
        last: dict[str, Any] = {}
        try:
            for round_, top1 in read_outcome(self._plan).curve:
                last = {ROUND: round_, METRIC: top1}
                self._tell(last)
            run = self._run()
            self._news.put({**_end_metrics(run), "done": True})
        except Stopped:
            self._news.put({**last, "done": True})
        except BaseException as error:
            # The error is written beside the run directory, because the training may have failed before it made one.
            failure.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(failure, (str(error) or repr(error)).encode())
            self._news.put(error)

    def _run(self) -> Run:
        if self._stopped:
            raise Stopped("The scheduler stopped this trial in an earlier start of the sweep.")
        directory, console = self._plan.directory, Console(quiet=True)
        if (directory / "result.json").is_file():
            return Run(directory)
        if (directory / "spec.yaml").is_file():
            _await_end(directory)
            # The spec in the directory may come from a cluster of another size, with another share of CPUs.
            write_spec(directory / "spec.yaml", self._plan.spec)
            return resume(directory, console=console, trial=self._trial)
        return train(self._plan.spec, console=console, trial=self._trial)

    def _tell(self, metrics: dict[str, Any]) -> None:
        if self._stopped:
            return
        self._news.put(metrics)
        self._may_go_on.acquire()


def _await_end(directory: Path) -> None:
    """Wait until the earlier process of a trial counts as gone, which takes a minute if it was on another machine."""
    deadline = time.monotonic() + 2 * SILENT_S
    while (directory / STATUS).is_file() and time.monotonic() < deadline:
        if read_status(directory)["state"] != "running":
            return
        time.sleep(POLL_S)


def evaluation_metrics(evaluation: Evaluation) -> dict[str, Any]:
    """Return what a trial reports to Tune about an evaluation."""
    return {ROUND: evaluation.round, METRIC: evaluation.mean_top1}


def _end_metrics(run: Run) -> dict[str, Any]:
    """Return what a trial reports to Tune at its end: its last evaluation."""
    last = run.result["last"]
    return {ROUND: last["round"], METRIC: mean_top1(last["tasks"].values())}
