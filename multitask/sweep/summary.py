"""The texts and tables of a sweep's report."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from multitask.progress import duration
from multitask.report.plots import Drawn
from multitask.sweep.figures import Series, method_colours
from multitask.sweep.final import Verdict
from multitask.sweep.outcomes import Choice, TrialOutcome
from multitask.sweep.plan import describe, short_names, show

UNKNOWN = "–"


def section(
    outcomes: Sequence[TrialOutcome],
    found: Series,
    figures: Sequence[Drawn],
    choice: Choice | None,
    verdict: Verdict | None,
) -> dict[str, Any]:
    """Return everything that `multitask.report.pages.write_sweep_report` shows."""
    colours = method_colours(found)
    return {
        "headline": headline(len({outcome.plan.setting for outcome in outcomes}), choice, verdict),
        "facts": facts(outcomes),
        "figures": figures,
        "methods": method_rows(found),
        "colours": list(colours.values()),
        "test": [] if verdict is None else verdict_rows(verdict),
        "tested": "" if verdict is None else f"{verdict.directory}, version {verdict.version}",
        "header": trial_header(outcomes),
        "trials": trial_rows(outcomes),
        "best": None if choice is None else choice.trial.number,
        "failures": [(o.plan.number, o.error) for o in outcomes if o.error is not None],
    }


def headline(settings: int, choice: Choice | None, verdict: Verdict | None) -> str:
    """Return the result in one or two sentences; `settings` is the number of settings."""
    if choice is None:
        return f"None of {settings} settings has finished all its trials."
    mean = f", mean over {choice.trials} seeds" if choice.trials > 1 else ""
    text = (
        f"Best of {settings} settings: {describe(choice.trial.values)}, with {choice.top1:.1f} % validation "
        f"top-1{mean} and {choice.trained_parameters:,} trained parameters."
    )
    if verdict is not None:
        models = "Trained anew on train and validation together" if verdict.version == "last" else "Its trial"
        text += f" {models}, measured once: {verdict.top1:.1f} % top-1 on test images."
    return text


def facts(outcomes: Sequence[TrialOutcome]) -> list[str]:
    """Return the number of trials in each state, and the time that the finished ones took."""
    states = Counter(outcome.state for outcome in outcomes)
    seconds = sum(outcome.seconds or 0.0 for outcome in outcomes)
    counts = [f"{count} {state}" for state, count in states.items()]
    return [f"{len(outcomes)} trials: {', '.join(counts)}", f"{duration(seconds)} of training in finished trials"]


def method_rows(found: Series) -> list[tuple[str, ...]]:
    """Return a line for each method: best rate, accuracy there and at its worst rate, rates, trained parameters."""
    lines: list[tuple[str, ...]] = []
    for method, points in found.items():
        best, lowest = max(points, key=lambda point: point.top1), min(point.top1 for point in points)
        accuracies = f"{best.top1:.1f}", f"{lowest:.1f}"
        lines.append((method, show(best.rate), *accuracies, str(len(points)), f"{best.trained_parameters:,}"))
    return lines


def verdict_rows(verdict: Verdict) -> list[tuple[str, ...]]:
    """Return a line for each task: its accuracy and loss on the test images."""
    return [
        (task, f"{values['top1']:.2f}", f"{values['top5']:.2f}", f"{values['loss']:.4f}")
        for task, values in verdict.tasks.items()
    ]


def trial_header(outcomes: Sequence[TrialOutcome]) -> list[str]:
    """Return the column names of `trial_rows`."""
    names = short_names(list(outcomes[0].plan.values))
    return ["trial", *names.values(), "seed", "state", "validation top-1, %", "rounds", "trained", "seconds"]


def trial_rows(outcomes: Sequence[TrialOutcome]) -> list[tuple[str, ...]]:
    """Return a line for each trial, the best first."""
    ranked = sorted(outcomes, key=lambda outcome: (outcome.state != "finished", -(outcome.top1 or 0.0)))
    return [
        (
            str(outcome.plan.number),
            *(show(value) for value in outcome.plan.values.values()),
            str(outcome.plan.spec.seed),
            outcome.state,
            _known("{:.2f}", outcome.top1),
            str(outcome.rounds),
            _known("{:,}", outcome.trained_parameters),
            _known("{:.1f}", outcome.seconds),
        )
        for outcome in ranked
    ]


def _known(form: str, value: float | None) -> str:
    return UNKNOWN if value is None else form.format(value)
