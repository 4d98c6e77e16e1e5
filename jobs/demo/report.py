"""The demo's report: its words and colours, one HTML page that needs no other file, and the table for the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from multitask.report import comparison, plots
from multitask.report.comparison import UNKNOWN, Mode
from multitask.report.pages import environment, inline, write_cascade_pictures
from patches.files import write_atomic

Results = Mapping[str, Any]
"""Content of results.json; the functions below name the keys that they read."""

OURS, BASELINE, FAIR, SEPARATE = (
    "private_scale_bias",
    "private_last_layer",
    "private_last_layer_reestimated",
    "independent",
)
COLOURS = {OURS: plots.BLUE, BASELINE: plots.AMBER, FAIR: plots.TEAL, SEPARATE: plots.GREY}
EXPLANATIONS = {
    OURS: "All tasks train one set of convolutions. Each task owns the scale γ, the bias β and the running statistics "
    "of every normalisation layer, and its own last layer: that is its patch.",
    BASELINE: "All tasks share everything but the last layer. This is the baseline of the paper. There is then one set "
    "of BatchNorm running statistics, an average over the images of all tasks, which fits none of them at test time.",
    FAIR: "Exactly the weights of the baseline above. Nothing is trained; only the running mean and variance of each "
    "BatchNorm layer are measured anew for each task, on the training images of that task. This takes the mixed "
    "statistics out of the comparison and makes it fair: the step from the baseline to this row is the cost of mixed "
    "statistics alone, and the step from this row to private scale-and-bias is what a private γ and β are worth.",
    SEPARATE: "One whole model for each task, trained on its own with the same number of steps. Nothing is shared.",
}


def modes(results: Results) -> list[Mode]:
    """Return one mode for each row of the table, in the order of the results."""
    return [
        Mode(
            key=key,
            title=mode["title"],
            colour=COLOURS[key],
            top1={task: mode["tasks"].get(task, {}).get("top1") for task in results["tasks"]},
            parameters=mode["parameters"],
            bytes=mode["bytes"],
            curves={
                task: [(point["step"], point["top1"]) for point in measured.get("curve") or ()]
                for task, measured in mode["tasks"].items()
            },
        )
        for key, mode in results["modes"].items()
    ]


def accuracy_table(results: Results) -> Table:
    """Return the table of all modes for the terminal."""
    return comparison.terminal_table(modes(results), list(results["tasks"]), results["title"], highlighted=OURS)


def headline(results: Results) -> str:
    """Return the result in one sentence, computed from the numbers."""
    measured = {mode.key: mode for mode in modes(results) if mode.mean is not None}
    count = len(results["tasks"])
    tasks = f"{count} task{'s' if count != 1 else ''}"
    if not measured:
        return f"No mode was measured on all of {tasks}."
    if OURS not in measured:
        best = max(measured.values(), key=lambda mode: mode.mean or 0.0)
        return f"{best.title}: {best.mean:.1f} % mean top-1 on {tasks} with {best.parameters:,} parameters."
    ours = measured[OURS]
    text = f"Private scale-and-bias patches reach {ours.mean:.1f} % mean top-1 on {tasks} "
    text += f"with {ours.parameters:,} parameters"
    if SEPARATE in measured:
        share = 100 * ours.parameters / measured[SEPARATE].parameters
        text += f", {share:.0f} % of what separate models take: {_difference(ours, measured[SEPARATE], 'those')}"
    if FAIR in measured:
        text += f"{';' if SEPARATE in measured else ':'} {_difference(ours, measured[FAIR], 'the fair baseline')}"
    return text + "."


def write_report(results: Results, directory: Path) -> Path:
    """Write the figures and `report.html`, which contains them and needs no other file.

    Args:
        results: what the demo measured. These keys may be missing: `curve`, `engine`, `process_id`, `pushes` and
            `mean_staleness` of a mode's task; `licence` and `examples` of a task (a list of
            {"png": bytes or a path relative to `directory`, "label": text}); `backbone`; `bundles`; and `cascade`
            (the result of `multitask.cascade.figures.section`).
        directory: created if it is missing.
    Returns:
        The path of `report.html`.
    Raises:
        ValueError: the results contain no task or no mode.
    """
    for part in ("tasks", "modes"):
        if not results[part]:
            raise ValueError(
                f"The results of '{results['title']}' hold no {part}, so there is nothing to report. Train first."
            )
    directory.mkdir(parents=True, exist_ok=True)
    rows = modes(results)
    figures = _figures(results, [mode for mode in rows if mode.mean is not None])
    for figure in figures:
        write_atomic(directory / f"{figure.name}.png", figure.light)
    cascade = results.get("cascade")
    if cascade is not None:
        write_cascade_pictures(cascade, directory)
    template = environment("jobs.demo").get_template("report.html")
    html = template.render(
        results=results,
        headline=headline(results),
        header=comparison.header(list(results["tasks"])),
        rows=rows,
        ours=OURS,
        colours=[mode.colour for mode in rows],
        figures=figures,
        explanations=[(index, mode.title, EXPLANATIONS[mode.key]) for index, mode in enumerate(rows)],
        pushes=_pushes(results),
        examples=_examples(results, directory),
        snippet=_snippet(results),
        cascade=cascade,
    )
    path = directory / "report.html"
    write_atomic(path, html.encode())
    return path


def _difference(ours: Mode, other: Mode, name: str) -> str:
    assert ours.mean is not None
    assert other.mean is not None
    points = round(ours.mean, 1) - round(other.mean, 1)  # the difference of the printed values, which readers can check
    if abs(points) < 0.05:
        return f"as good as {name}"
    return f"{abs(points):.1f} points {'above' if points > 0 else 'below'} {name}"


def _figures(results: Results, measured: Sequence[Mode]) -> list[plots.Drawn]:
    """Return each figure for which there are numbers; `measured` are the modes that were measured on every task."""
    tasks = list(results["tasks"])
    figures = []
    if measured:
        heading, words = _plot_heading(measured, len(tasks)), f"Accuracy against parameters. {headline(results)}"
        figures.append(
            plots.drawn(
                "accuracy_parameters",
                words,
                lambda theme: comparison.accuracy_parameters(measured, tasks, heading, theme),
            )
        )
    if any(mode.curves.get(task) for mode in measured for task in tasks):
        words = "Validation accuracy over rounds, one panel per task."
        figures.append(
            plots.drawn("learning_curves", words, lambda theme: comparison.learning_curves(measured, tasks, theme))
        )
    bundles, separate = results.get("bundles"), results["modes"].get(SEPARATE)
    if bundles and separate and results.get("backbone"):
        patches = {task: bundle["bytes"] for task, bundle in bundles.items()}
        whole, colours = results["backbone"]["bytes"], (COLOURS[OURS], COLOURS[SEPARATE])
        words = "Bytes of one backbone and its patches against separate models."
        figures.append(
            plots.drawn(
                "sizes", words, lambda theme: comparison.sizes(whole, patches, separate["bytes"], colours, theme)
            )
        )
    return figures


def _plot_heading(measured: Sequence[Mode], tasks: int) -> str:
    parameters = {mode.key: mode.parameters for mode in measured}
    if OURS in parameters and SEPARATE in parameters:
        share = 100 * parameters[OURS] / parameters[SEPARATE]
        return f"{tasks} tasks on one backbone: {share:.0f} % of the parameters of {tasks} models"
    return f"{tasks} tasks on one backbone: accuracy against parameters"


def _pushes(results: Results) -> list[list[str]]:
    """Return the lines of the table of workers: one for each task of each mode that was trained."""
    lines = []
    for mode in results["modes"].values():
        for task, measured in mode["tasks"].items():
            if measured.get("pushes") is None:
                continue
            staleness = measured.get("mean_staleness")
            lines.append(
                [
                    mode["title"],
                    task,
                    str(measured.get("engine", UNKNOWN)),
                    str(measured.get("process_id", UNKNOWN)),
                    f"{measured['pushes']:,}",
                    UNKNOWN if staleness is None else f"{staleness:.2f}",
                ]
            )
    return lines


def _examples(results: Results, directory: Path) -> dict[str, list[tuple[str, str]]]:
    """Return a few images of each task, as pairs of `data:` URI and label."""
    sheets = {}
    for task, about in results["tasks"].items():
        images = []
        for example in about.get("examples") or ():
            png = example["png"]
            content = png if isinstance(png, bytes) else (directory / png).read_bytes()
            images.append((inline(content), example["label"]))
        if images:
            sheets[task] = images
    return sheets


def _snippet(results: Results) -> str | None:
    """Return Python code that loads the first bundle, or None if nothing was exported."""
    backbone, bundles = results.get("backbone"), results.get("bundles")
    if not backbone or not bundles:
        return None
    bundle = str(next(iter(bundles.values()))["path"])
    return (
        "import patches\n\n"
        f"bundle = {bundle!r}\n"
        "fits = patches.inspect_bundle(bundle).backbone\n"
        f"backbone = patches.load_backbone(fits['name'], {str(backbone['path'])!r}, **fits['options'])\n"
        "model = patches.load_bundle(bundle, backbone)"
    )
