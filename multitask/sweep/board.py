"""The live table of a sweep: what runs, what is best so far, and how long it will still take."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from ray import tune
from rich.console import Console
from rich.live import Live
from rich.table import Table

from multitask.sweep.actor import METRIC, ROUND
from multitask.sweep.outcomes import TrialOutcome
from multitask.sweep.plan import TrialPlan, short_names, show

BEST_SHOWN = 10
ENDED = ("finished", "stopped", "failed")


@dataclass
class Line:
    """How a trial stands, as the table shows it."""

    plan: TrialPlan
    state: str = "waiting"
    round: int = 0
    top1: float | None = None

    @property
    def steps_left(self) -> int:
        return 0 if self.state in ENDED else max(0, self.plan.spec.steps - self.round)


@dataclass
class Standing:
    """All trials of a sweep, and the clock."""

    keys: Sequence[str]
    """Of the space."""
    trials: int
    """With those that nobody has suggested yet."""
    lines: dict[int, Line]
    began: float = field(default_factory=time.monotonic)
    steps_made: int = 0
    """Since `began`: what an earlier start made says nothing of today's speed."""

    def note(self, number: int, round_: int, top1: float) -> None:
        """An evaluation of a trial; those that a trial tells again are no work."""
        line = self.lines[number]
        self.steps_made += max(0, round_ - line.round)
        line.round = max(line.round, round_)
        line.top1 = top1 if line.top1 is None else max(line.top1, top1)

    def seconds_left(self, now: float) -> float | None:
        """By the speed so far; None while there is none."""
        if not self.steps_made:
            return None
        left = sum(line.steps_left for line in self.lines.values())
        unknown = self._unknown * mean(line.plan.spec.steps for line in self.lines.values())
        return (left + unknown) * (now - self.began) / self.steps_made

    def title(self, name: str, now: float) -> str:
        counts = Counter(line.state for line in self.lines.values()) + Counter(waiting=self._unknown)
        states = ", ".join(f"{counts[state]} {state}" for state in (*ENDED, "running", "waiting") if counts[state])
        left = self.seconds_left(now)
        ahead = "" if left is None else f"; about {duration(left)} left" if left else "; done"
        return f"{name}: {self.trials} trials, {states}{ahead}"

    def table(self, name: str, now: float) -> Table:
        """Running trials, then the best of the others."""
        lines = list(self.lines.values())
        running = [line for line in lines if line.state == "running"]
        known = [line for line in lines if line.state != "running" and line.top1 is not None]
        best = sorted(known, key=lambda line: -(line.top1 or 0.0))[:BEST_SHOWN]
        names = short_names(self.keys)
        table = Table(title=self.title(name, now), title_justify="left")
        for column in ("trial", *names.values(), "state", "rounds", "validation top-1 %"):
            table.add_column(column, justify="left" if column in names.values() else "right")
        for line in (*running, *best):
            values = [show(line.plan.values[key]) for key in names]
            accuracy = "" if line.top1 is None else f"{line.top1:.2f}"
            rounds = f"{line.round}/{line.plan.spec.steps}"
            table.add_row(str(line.plan.number), *values, line.state, rounds, accuracy)
        return table

    @property
    def _unknown(self) -> int:
        return self.trials - len(self.lines)


class Board(tune.Callback):
    """Keeps the table up to date while Tune works; a context that shows it."""

    def __init__(
        self, name: str, keys: Sequence[str], trials: int, outcomes: Sequence[TrialOutcome], console: Console
    ) -> None:
        """Args:
        keys: of the space.
        trials: how many there will be.
        outcomes: how the trials that are known stand before this start.
        """
        self._name = name
        lines = {o.plan.number: Line(o.plan, _shown(o.state), o.rounds, o.top1) for o in outcomes}
        self.standing = Standing(keys, trials, lines)
        self.ended: set[int] = set()
        """Trials that came to their end in this start."""
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=2)

    def __enter__(self) -> "Board":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its settings; nobody unpickles this one, as sweeps resume from their run directories."""
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

    def _render(self) -> Table:
        return self.standing.table(self._name, time.monotonic())


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _shown(state: str) -> str:
    return state if state in ENDED else "waiting"
