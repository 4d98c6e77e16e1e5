"""The live table of a sweep: the running trials, the best trials so far, and the time that is left."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from ray import tune
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from multitask.sweep.actor import METRIC, ROUND
from multitask.sweep.outcomes import TrialOutcome
from multitask.sweep.plan import TrialPlan, describe

BEST_SHOWN = 10
"""Number of trials in a table of the best ones."""
ENDED = ("finished", "stopped", "failed")
"""States of a trial that has come to its end."""


@dataclass
class Line:
    """What the table shows of a trial."""

    plan: TrialPlan
    state: str = "waiting"
    round: int = 0
    top1: float | None = None

    @property
    def steps_left(self) -> int:
        """Number of steps that the trial has still to make."""
        return 0 if self.state in ENDED else max(0, self.plan.spec.steps - self.round)


@dataclass
class Standing:
    """All trials of a sweep, with the clock that says how fast they are."""

    keys: Sequence[str]
    """Keys of the space."""
    trials: int
    """Number of trials, with those that the searcher has yet to suggest."""
    lines: dict[int, Line]
    """Number of a trial -> its line."""
    began: float = field(default_factory=time.monotonic)
    steps_made: int = 0
    """Number of steps since `began`; steps of an earlier start, which may have been slower or faster, do not count."""

    def note(self, number: int, round_: int, top1: float) -> None:
        """Record an evaluation of a trial. An evaluation that is reported a second time counts as no new steps."""
        line = self.lines[number]
        self.steps_made += max(0, round_ - line.round)
        line.round = max(line.round, round_)
        line.top1 = top1 if line.top1 is None else max(line.top1, top1)

    def seconds_left(self, now: float) -> float | None:
        """Return the time left at the speed so far, or None if no step has been made."""
        if not self.steps_made:
            return None
        left = sum(line.steps_left for line in self.lines.values())
        unknown = self._unknown * mean(line.plan.spec.steps for line in self.lines.values())
        return (left + unknown) * (now - self.began) / self.steps_made

    def title(self, name: str, now: float) -> str:
        """Return the table's title: the number of trials in each state, and the time left."""
        counts = Counter(line.state for line in self.lines.values()) + Counter(waiting=self._unknown)
        states = ", ".join(f"{counts[state]} {state}" for state in (*ENDED, "running", "waiting") if counts[state])
        left = self.seconds_left(now)
        ahead = "" if left is None else f"; about {duration(left)} left" if left else "; done"
        return f"{name}: {self.trials} trials, {states}{ahead}"

    def table(self, name: str, now: float) -> Group:
        """Return the title and the table: the running trials, then the best of the others."""
        lines = list(self.lines.values())
        running = [line for line in lines if line.state == "running"]
        known = [line for line in lines if line.state != "running" and line.top1 is not None]
        best = sorted(known, key=lambda line: -(line.top1 or 0.0))[:BEST_SHOWN]
        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("trial", "state", "rounds", "top-1 %"):
            table.add_column(column, justify="right", no_wrap=True)
        # The only column that a narrow terminal breaks, if possible between two keys.
        table.add_column("setting", overflow="fold")
        for line in (*running, *best):
            accuracy = "" if line.top1 is None else f"{line.top1:.2f}"
            rounds = f"{line.round}/{line.plan.spec.steps}"
            setting = Text(describe({key: line.plan.values[key] for key in self.keys}))
            table.add_row(str(line.plan.number), line.state, rounds, accuracy, setting)
        return Group(Text(self.title(name, now), style="bold"), table)

    @property
    def _unknown(self) -> int:
        """Number of trials that the searcher has yet to suggest."""
        return self.trials - len(self.lines)


class Board(tune.Callback):
    """A Tune callback that keeps the table up to date, and a context manager that shows it."""

    def __init__(
        self, name: str, keys: Sequence[str], trials: int, outcomes: Sequence[TrialOutcome], console: Console
    ) -> None:
        """Prepare the table.

        Args:
            name: name of the sweep.
            keys: keys of the space.
            trials: number of all trials, also of those that the searcher has yet to suggest.
            outcomes: outcomes of the known trials before this start.
            console: where the table is shown.
        """
        self._name = name
        lines = {o.plan.number: Line(o.plan, _shown(o.state), o.rounds, o.top1) for o in outcomes}
        self.standing = Standing(keys, trials, lines)
        self.ended: set[int] = set()
        """Numbers of the trials that came to their end in this start."""
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=2)

    def __enter__(self) -> "Board":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle nothing. Tune pickles its callbacks, but they are never read: sweeps resume from run directories."""
        return {}

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:  # noqa: ARG002
        self._line(trial).state = "running"

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Mapping[str, Any], **_: Any) -> None:  # noqa: ARG002
        if result.get(METRIC) is not None:
            self.standing.note(trial.config["plan"].number, result[ROUND], result[METRIC])

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:  # noqa: ARG002
        line = self._line(trial)
        line.state = "finished" if line.round >= line.plan.spec.steps else "stopped"
        self.ended.add(line.plan.number)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:  # noqa: ARG002
        self._line(trial).state = "failed"
        self.ended.add(trial.config["plan"].number)

    def _line(self, trial: Any) -> Line:
        plan = trial.config["plan"]
        return self.standing.lines.setdefault(plan.number, Line(plan))

    def _render(self) -> Group:
        return self.standing.table(self._name, time.monotonic())


def duration(seconds: float) -> str:
    """Format a duration for people: `45 s`, `12 min`, `3 h 20 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _shown(state: str) -> str:
    """Return the state that the table shows before Tune starts a trial."""
    return state if state in ENDED else "waiting"
