"""The report of a run: one HTML file that stands alone, plots beside it, and the same table for the terminal."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from rich.table import Table
from rich.text import Text

from multitask.report import plots

Results = Mapping[str, Any]
"""What a run writes to results.json; the keys read here are named where they are read."""

OURS, BASELINE, FAIR, SEPARATE = (
    "private_scale_bias",
    "private_last_layer",
    "private_last_layer_reestimated",
    "independent",
)
UNKNOWN = "–"
EXPLANATIONS = {
    OURS: "All tasks train one set of convolutions. Each task owns the scale γ, the bias β and the running statistics "
    "of every normalisation layer, and its own last layer: that is its patch.",
    BASELINE: "All tasks share everything but the last layer. This is the baseline of the paper. The one set of "
    "BatchNorm running statistics then averages over images of all tasks, and at test time fits none of them.",
    FAIR: "Exactly the weights of the baseline above. Nothing is trained; only the running mean and variance of each "
    "BatchNorm layer are measured anew for each task, on that task's training images. It takes the mixed statistics "
    "out of the comparison, which makes it the fair baseline: what private scale-and-bias gains over this row is what "
    "private γ and β are worth, and the step from the baseline to this row is the cost of mixed statistics alone.",
    SEPARATE: "One whole model for each task, trained on its own with the same number of steps. Nothing is shared.",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One mode's line of the main table."""

    key: str
    title: str
    top1: dict[str, float | None]
    """Task -> percent on the test images; None if it was not measured."""
    mean: float | None
    """Percent; None unless every task was measured."""
    parameters: int
    """Of all tasks together, what is shared counted once."""
    bytes: int

    def cells(self) -> list[str]:
        """The line as people read it, in the order of `header`."""
        accuracies = [UNKNOWN if value is None else f"{value:.1f}" for value in [*self.top1.values(), self.mean]]
        return [self.title, *accuracies, f"{self.parameters:,}", plots.human_bytes(self.bytes)]


def header(results: Results) -> list[str]:
    """Column names of the main table."""
    return ["mode", *results["tasks"], "mean", "parameters", "size"]


def table_rows(results: Results) -> list[Row]:
    """The main table, one row per mode in the order of the results: the HTML and the terminal both show these."""
    rows = []
    for key, mode in results["modes"].items():
        top1 = {task: mode["tasks"].get(task, {}).get("top1") for task in results["tasks"]}
        known = [value for value in top1.values() if value is not None]
        mean = sum(known) / len(known) if known and len(known) == len(top1) else None
        title = mode.get("title", key.replace("_", " "))
        rows.append(Row(key=key, title=title, top1=top1, mean=mean, parameters=mode["parameters"], bytes=mode["bytes"]))
    return rows


def accuracy_table(results: Results) -> Table:
    """The main table for the terminal."""
    table = Table(title=f"Top-1 accuracy on test images, % ({Text(results['title']).plain})", title_justify="left")
    for index, name in enumerate(header(results)):
        table.add_column(Text(name), justify="left" if index == 0 else "right")
    for row in table_rows(results):
        table.add_row(*(Text(cell) for cell in row.cells()), style="bold" if row.key == OURS else None)
    return table


def headline(results: Results) -> str:
    """The result in one sentence, computed from the numbers."""
    rows = {row.key: row for row in table_rows(results) if row.mean is not None}
    count = len(results["tasks"])
    tasks = f"{count} task{'s' if count != 1 else ''}"
    if not rows:
        return f"No mode was measured on all of {tasks}."
    if OURS not in rows:
        best = max(rows.values(), key=lambda row: row.mean or 0.0)
        return f"{best.title}: {best.mean:.1f} % mean top-1 on {tasks} with {best.parameters:,} parameters."
    ours = rows[OURS]
    text = f"Private scale-and-bias patches reach {ours.mean:.1f} % mean top-1 on {tasks} "
    text += f"with {ours.parameters:,} parameters"
    if SEPARATE in rows:
        share = 100 * ours.parameters / rows[SEPARATE].parameters
        text += f", {share:.0f} % of what separate models take: {_against(ours, rows[SEPARATE], 'those')}"
    if FAIR in rows:
        text += f"{';' if SEPARATE in rows else ':'} {_against(ours, rows[FAIR], 'the fair baseline')}"
    return text + "."


def write_report(results: Results, directory: Path) -> Path:
    """Write the plots and `report.html`, which holds them too and needs no other file.

    Args:
        results: what the run measured; `curve`, `engine`, `process_id`, `pushes` and `mean_staleness` of a task,
            `licence` and `examples` (a list of {"png": bytes or a path relative to `directory`, "label": text}) of its
            data, `backbone`, `bundles` and `cascade` (what
            `multitask.cascade.figures.section` makes) may be missing.
        directory: made if it is missing.
    Returns:
        The path of `report.html`.
    Raises:
        ValueError: the results hold no task or no mode.
    """
    for part in ("tasks", "modes"):
        if not results[part]:
            raise ValueError(
                f"The results of '{results['title']}' hold no {part}, so there is nothing to report. Train first."
            )
    directory.mkdir(parents=True, exist_ok=True)
    figures: dict[str, dict[str, str]] = {}
    for name, alternative, light, dark in _figures(results):
        (directory / f"{name}.png").write_bytes(light)
        figures[name] = {"light": _inline(light), "dark": _inline(dark), "alternative": alternative}
    cascade = results.get("cascade")
    if cascade is not None:
        _write_pictures(cascade, directory)
    rows = table_rows(results)
    colours = plots.mode_colours([row.key for row in rows])
    html = (
        _environment()
        .get_template("report.html")
        .render(
            results=results,
            headline=headline(results),
            header=header(results),
            rows=rows,
            ours=OURS,
            colours=list(colours.values()),
            figures=figures,
            explanations=[
                (index, row.title, EXPLANATIONS[row.key]) for index, row in enumerate(rows) if row.key in EXPLANATIONS
            ],
            pushes=_pushes(results),
            examples=_examples(results, directory),
            snippet=_snippet(results),
            cascade=cascade,
        )
    )
    path = directory / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def write_cascade_report(title: str, section: Mapping[str, Any], directory: Path) -> Path:
    """Write the figures about one cascade and `cascade.html`, which holds them too and needs no other file.

    Args:
        section: what `multitask.cascade.figures.section` makes.
        directory: made if it is missing.
    Returns:
        The path of `cascade.html`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _write_pictures(section, directory)
    html = _environment().get_template("cascade.html").render(title=title, cascade=section, colours=[])
    path = directory / "cascade.html"
    path.write_text(html, encoding="utf-8")
    return path


def _write_pictures(section: Mapping[str, Any], directory: Path) -> None:
    """The pictures of a section about a cascade, as files."""
    for drawn in section["figures"]:
        (directory / f"{drawn['name']}.png").write_bytes(drawn["light"])
    if section["sheet"] is not None:
        (directory / "stages.png").write_bytes(section["sheet"])


def write_sweep_report(title: str, section: Mapping[str, Any], directory: Path) -> Path:
    """Write `report.html` about a sweep, which holds its figures and needs no other file.

    Args:
        section: what `multitask.sweep.summary.section` makes.
    Returns:
        The path of `report.html`.
    """
    html = _environment().get_template("sweep.html").render(title=title, sweep=section)
    path = directory / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("multitask.report", "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"bytes": plots.human_bytes, "inline": _inline}
    return environment


def _against(ours: Row, other: Row, name: str) -> str:
    assert ours.mean is not None
    assert other.mean is not None
    points = round(ours.mean, 1) - round(other.mean, 1)  # of the printed values, so that the reader can check it
    return f"as good as {name}" if abs(points) < 0.05 else f"{abs(points):.1f} points {_side(points)} {name}"


def _side(points: float) -> str:
    return "above" if points > 0 else "below"


def _figures(results: Results) -> list[tuple[str, str, bytes, bytes]]:
    """(file name, text for readers who cannot see it, light PNG, dark PNG) of each figure there are numbers for."""
    tasks = list(results["tasks"])
    modes = [
        plots.Mode(
            key=row.key,
            title=row.title,
            parameters=row.parameters,
            top1={task: value for task, value in row.top1.items() if value is not None},
            mean=row.mean,
            curves={
                task: [(point["step"], point["top1"]) for point in found.get("curve") or ()]
                for task, found in results["modes"][row.key]["tasks"].items()
            },
        )
        for row in table_rows(results)
        if row.mean is not None
    ]
    drawn: list[tuple[str, str, bytes | None, bytes | None]] = []
    if modes:
        words = headline(results)
        short = _plot_heading(results)
        pair = [plots.accuracy_parameters(modes, tasks, short, theme) for theme in (plots.LIGHT, plots.DARK)]
        drawn.append(("accuracy_parameters", f"Accuracy against parameters. {words}", pair[0], pair[1]))
        curves = [plots.learning_curves(modes, tasks, theme) for theme in (plots.LIGHT, plots.DARK)]
        drawn.append(("learning_curves", "Validation accuracy over rounds, one panel per task.", curves[0], curves[1]))
    bundles, separate = results.get("bundles"), results["modes"].get(SEPARATE)
    if bundles and separate and results.get("backbone"):
        patches = {task: bundle["bytes"] for task, bundle in bundles.items()}
        whole = results["backbone"]["bytes"]
        bars = [plots.sizes(whole, patches, separate["bytes"], theme) for theme in (plots.LIGHT, plots.DARK)]
        drawn.append(("sizes", "Bytes of one backbone and its patches against separate models.", bars[0], bars[1]))
    return [(name, words, light, dark) for name, words, light, dark in drawn if light is not None and dark is not None]


def _plot_heading(results: Results) -> str:
    rows = {row.key: row for row in table_rows(results)}
    count = len(results["tasks"])
    if OURS in rows and SEPARATE in rows:
        share = 100 * rows[OURS].parameters / rows[SEPARATE].parameters
        return f"{count} tasks on one backbone: {share:.0f} % of the parameters of {count} models"
    return f"{count} tasks on one backbone: accuracy against parameters"


def _pushes(results: Results) -> list[list[str]]:
    """Lines of the table of workers: what each task's worker did in each mode that had any."""
    lines = []
    for key, mode in results["modes"].items():
        for task, found in mode["tasks"].items():
            if found.get("pushes") is None:
                continue
            staleness = found.get("mean_staleness")
            lines.append(
                [
                    mode.get("title", key),
                    task,
                    str(found.get("engine", UNKNOWN)),
                    str(found.get("process_id", UNKNOWN)),
                    f"{found['pushes']:,}",
                    UNKNOWN if staleness is None else f"{staleness:.2f}",
                ]
            )
    return lines


def _examples(results: Results, directory: Path) -> dict[str, list[tuple[str, str]]]:
    """Task -> (inlined image, label) of a few of its images."""
    sheets = {}
    for task, about in results["tasks"].items():
        images = []
        for example in about.get("examples") or ():
            png = example["png"]
            images.append(
                (_inline(png if isinstance(png, bytes) else (directory / png).read_bytes()), example["label"])
            )
        if images:
            sheets[task] = images
    return sheets


def _snippet(results: Results) -> str | None:
    """How to load the first bundle in Python."""
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


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
