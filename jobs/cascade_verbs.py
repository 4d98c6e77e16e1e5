"""`multitask cascade`: fit a cascade to predictions, check it on other predictions, run it, and draw it."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from jobs.groups import Group
from jobs.tables import show
from multitask.progress import OnRows, showing_rows

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from multitask.cascade import Cascade, Check, Costs, OperatingPoint
    from multitask.data import ImageTable

app = typer.Typer(
    cls=Group,
    help="Build and use cascades: ordered lists of models, of which the first that is sure enough answers.",
    no_args_is_help=True,
)

PredictionsFolder = Annotated[
    Path, typer.Argument(metavar="PREDICTIONS", help="The folder that `multitask evaluate --save-predictions` wrote.")
]
CascadeFile = Annotated[Path, typer.Argument(metavar="CASCADE", help="The file that `multitask cascade fit` wrote.")]
MaxCost = Annotated[
    float | None,
    typer.Option(help="Use the most accurate operating point whose mean cost of an image is at most this."),
]
MaxLatency = Annotated[
    float | None,
    typer.Option(help="Use the most accurate operating point whose mean latency is at most this, in milliseconds."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")]
CascadeToWrite = Annotated[
    Path,
    typer.Option(help="The file to write: NAME.cascade contains the models' bundles too, NAME.json does not."),
]
ExportFolder = Annotated[
    Path | None,
    typer.Option(
        help="Folder with backbone.safetensors and the models' bundles; needed to measure costs and to write a "
        ".cascade file."
    ),
]
CostKind = Annotated[
    Literal["macs", "latency"],
    typer.Option(help="Cost of a model: multiply-accumulates, counted, or latency, measured on this machine."),
]
CostTable = Annotated[
    Path | None,
    typer.Option(metavar="CSV", help="Read the costs from this file instead; its column 'model' names the models."),
]
CostColumn = Annotated[str | None, typer.Option(help="The column of --cost-table that has the costs.")]
MinRelativeAccuracy = Annotated[
    float, typer.Option(help="Accuracy that the cascade must have, as a share of the reference's (at most 1).")
]
MinAccuracy = Annotated[
    float | None, typer.Option(help="Accuracy that the cascade must have, as a share of all images (0 to 1).")
]
MaxFittedCost = Annotated[
    float | None, typer.Option(help="Fit the most accurate cascade whose mean cost is at most this.")
]
Reference = Annotated[str | None, typer.Option(help="Model to compare with; by default the most accurate one.")]
Slack = Annotated[
    float,
    typer.Option(min=0, help="Share of a stage's answers that must be right in addition to the accuracy target."),
]
Models = Annotated[
    list[str] | None, typer.Option(help="Use only this model; may be given several times. Default: all models.")
]
Points = Annotated[
    int, typer.Option(min=0, help="Number of accuracy targets; the cascade gets an operating point for each.")
]
Latency = Annotated[
    bool,
    typer.Option("--latency", help="Measure latencies on this machine too, so that --max-latency-ms can be used."),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed that decides which half is fitted on.")]


@app.command()
def fit(
    predictions: PredictionsFolder,
    to: CascadeToWrite,
    export: ExportFolder = None,
    cost: CostKind = "macs",
    cost_table: CostTable = None,
    cost_column: CostColumn = None,
    min_relative_accuracy: MinRelativeAccuracy = 1.0,
    min_accuracy: MinAccuracy = None,
    max_cost: MaxFittedCost = None,
    reference: Reference = None,
    slack: Slack = 0.0025,
    model: Models = None,
    points: Points = 9,
    latency: Latency = False,
    seed: Seed = 0,
    json_output: AsJson = False,
) -> None:
    """Fit a cascade on a random half of validation predictions, and check it on the other half."""
    from multitask.cascade import CascadeError, fit_and_check, read_predictions, save_cascade, save_package

    if to.suffix not in (".cascade", ".json"):
        raise CascadeError(f"--to is {to}, expected a name that ends in .cascade (with its bundles) or .json (alone).")
    if to.suffix == ".cascade" and export is None:
        raise CascadeError("A .cascade file holds bundles. Name their folder: --export FOLDER, or write a .json file.")
    pool = read_predictions(predictions, model)
    names = list(pool.logits)
    cascade, checked = fit_and_check(
        pool,
        _costs(names, export, cost, cost_table, cost_column),
        seed=seed,
        min_relative_accuracy=min_relative_accuracy,
        min_accuracy=min_accuracy,
        max_mean_cost=max_cost,
        reference=reference,
        slack=slack,
        operating_points=points,
        latency=_measured("latency", names, export) if latency else None,
    )
    if to.suffix == ".json":
        save_cascade(cascade, to)
    else:
        assert export is not None
        save_package(cascade, to, export)
    _show(cascade, checked, json_output)
    if json_output:
        return
    target = "--min-relative-accuracy" if min_accuracy is None else "--min-accuracy"
    hint = fitting_hint(cascade, checked, target if max_cost is None else "--max-cost")
    if hint:
        print(hint)
    print(to)


@app.command()
def evaluate(
    cascade: CascadeFile,
    predictions: PredictionsFolder,
    max_cost: MaxCost = None,
    max_latency_ms: MaxLatency = None,
    json_output: AsJson = False,
) -> None:
    """Check a cascade on predictions that it was not fitted on, usually those of the test images."""
    from multitask.cascade import check, load_cascade, read_predictions

    loaded = load_cascade(cascade)
    point = loaded.point(max_cost, max_latency_ms)
    _show(loaded, check(loaded, read_predictions(predictions), point), json_output)


@app.command()
def run(
    cascade: CascadeFile,
    table: Annotated[str, typer.Argument(metavar="TABLE", help="The image table: a path or a URI.")],
    to: Annotated[
        Path | None,
        typer.Option(metavar="PARQUET", help="File to write: row, label, answer, stage and cost of every image."),
    ] = None,
    max_cost: MaxCost = None,
    max_latency_ms: MaxLatency = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of images in a batch.")] = 256,
    device: Annotated[str, typer.Option(help="Device that computes: cpu, cuda, ...")] = "cpu",
    json_output: AsJson = False,
) -> None:
    """Answer the images of a table with a .cascade file; an image goes to the next model only if it must."""
    import numpy as np

    from multitask.cascade import CascadeModel, cost_text
    from multitask.data import open_table

    model = CascadeModel.load(cascade, device)
    point = model.cascade.point(max_cost, max_latency_ms)
    opened = open_table(table)
    assert model.classes is not None, "bundles have class names"
    opened = opened.in_classes(model.classes)
    parts, seconds = [], 0.0
    with showing_rows("answering") as on_rows:
        for images in _pictures(opened, batch_size, on_rows):
            start = time.perf_counter()
            parts.append(model(images, max_cost=max_cost, max_latency_ms=max_latency_ms))
            seconds += time.perf_counter() - start
    labels, stages, costs = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("labels", "stages", "costs")
    )
    truth = opened.labels()
    if to is not None:
        columns = {"row": np.arange(len(labels)), "label": truth, "answer": labels, "stage": stages, "cost": costs}
        _write_answers(to, columns, model.classes)
    found: dict[str, Any] = {
        "images": len(labels),
        "accuracy": float((labels == truth).mean()),
        "mean_cost": float(costs.mean()),
        "unit": model.cascade.costs.unit,
        "images_per_s": len(labels) / seconds,
        "shares": [float((stages == number).mean()) for number in range(len(point.stages))],
        "models": [stage.model for stage in point.stages],
    }
    if json_output:
        print(json.dumps(found))
        return
    shares = ", ".join(f"{share:.1%} at {name}" for share, name in zip(found["shares"], found["models"], strict=True))
    print(
        f"{len(labels):,} images: {found['accuracy']:.2%} right, {cost_text(found['mean_cost'], found['unit'])} "
        f"{found['unit']} an image on average, {found['images_per_s']:,.0f} images/s (resize included, decoding not)\n"
        f"answered: {shares}"
    )


def _write_answers(path: Path, columns: "Mapping[str, np.ndarray]", classes: Sequence[str]) -> None:
    """Write the answers of a cascade as Parquet, with the class list in the metadata of the schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from multitask.data.format import CLASSES_KEY
    from patches.files import atomic_file

    with atomic_file(path) as file:
        pq.write_table(pa.table(dict(columns), metadata={CLASSES_KEY: json.dumps(list(classes))}), file)


@app.command()
def plot(
    cascade: CascadeFile,
    predictions: PredictionsFolder,
    to: Annotated[Path, typer.Option(help="Folder to write the figures and cascade.html to.")],
    table: Annotated[
        str | None,
        typer.Option(help="Image table that the predictions were made on; adds example images of each stage."),
    ] = None,
    max_cost: MaxCost = None,
    max_latency_ms: MaxLatency = None,
) -> None:
    """Draw accuracy against cost and the share of images of each stage, and write a page with both figures."""
    from multitask.cascade import check, load_cascade, read_predictions
    from multitask.cascade.figures import section, stage_sheet
    from multitask.data import open_table
    from multitask.report.pages import write_cascade_report

    loaded, pool = load_cascade(cascade), read_predictions(predictions)
    point = loaded.point(max_cost, max_latency_ms)
    checked = check(loaded, pool, point)
    sheet = None
    if table is not None:
        sheet = stage_sheet(open_table(table, verify=False), pool, point)
    print(write_cascade_report(f"Cascade {cascade.stem}", section(checked, sheet), to))


def _costs(models: list[str], export: Path | None, cost: str, table: Path | None, column: str | None) -> "Costs":
    from multitask.cascade import CascadeError, read_costs

    if (table is None) != (column is None):
        raise CascadeError(
            "Only one of --cost-table and --cost-column was given. Name both: a CSV file and one of its columns."
        )
    if table is not None and column is not None:
        return read_costs(table, column)
    return _measured(cost, models, export)


def _measured(cost: str, models: list[str], export: Path | None) -> "Costs":
    """Return the costs of exported models: their multiply-accumulates, or their latency on this machine."""
    import patches
    from multitask.cascade import CascadeError, count_macs, measure_latency

    if export is None:
        raise CascadeError(
            "Costs are counted or measured on the models themselves. Name their folder (--export FOLDER), or read the "
            "costs from a file (--cost-table)."
        )
    bank = patches.open_export(export)
    for name in models:
        if name not in bank.tasks:
            raise CascadeError(patches.unknown_name_message(f"bundle in '{export}'", name, bank.tasks))
    measure = count_macs if cost == "macs" else measure_latency
    return measure({name: bank.models[name] for name in models}, {name: bank.preprocessing(name) for name in models})


def fitting_hint(cascade: "Cascade", checked: "Check", target: str) -> str | None:
    """Return what to try if a fitted cascade saves nothing, or None if it does.

    Args:
        cascade: the cascade.
        checked: its check on the images that were left aside.
        target: the option that the fit was asked for: --min-relative-accuracy, --min-accuracy or --max-cost.
    """
    point, reference = cascade.point(), cascade.reference
    if [stage.model for stage in point.stages] != [reference]:
        if checked.saving.mean >= 0:
            return None
        return (
            f"On these images, the cascade takes more than model '{reference}' alone. Use that model, or fit the "
            f"cascade on more images than {point.images:,}."
        )
    if len(checked.singles) == 1:
        return "A cascade needs two models or more, and there is one. Add the predictions of a cheaper model."
    if checked.singles[0].model == reference:
        return (
            f"Model '{reference}' is the cheapest one and the reference, so nothing can be saved. Name a more accurate "
            "model (--reference), or add a cheaper one."
        )
    if target == "--max-cost":
        return "Within this budget, the reference alone is the most accurate. Ask for a smaller --max-cost."
    slack = f"--slack (it was {cascade.slack:g}) or " if cascade.slack else ""
    return (
        f"No model is accurate enough on the {point.images:,} fitting images to answer before the reference. Try a "
        f"smaller {slack}{target}, or more images."
    )


def _show(cascade: "Cascade", checked: "Check", json_output: bool) -> None:
    from multitask.cascade import cost_text
    from multitask.cascade.figures import headline, model_rows, stage_rows

    if json_output:
        print(json.dumps(asdict(checked)))
        return
    stages = Table("stage", "model", "answers where", "images", "right of those", title="Stages", title_justify="left")
    for line in stage_rows(checked):
        stages.add_row(*line)
    models = Table("model", "top-1", f"{checked.unit} of an image", title="Against single models", title_justify="left")
    for line in model_rows(checked):
        models.add_row(*line)
    points = Table(f"mean {checked.unit}", "top-1", "stages", title="Operating points", title_justify="left")
    for (cost, accuracy), point in zip(checked.curve, cascade.points, strict=True):
        points.add_row(cost_text(cost, checked.unit), f"{accuracy:.2%}", _path(point))
    show(stages, models, points)
    print(headline(checked))


def _path(point: "OperatingPoint") -> str:
    return " > ".join(stage.model for stage in point.stages)


def _pictures(table: "ImageTable", batch_size: int, on_rows: OnRows) -> "Iterator[list[Tensor]]":
    """Yield the decoded images of a table in their order, in batches.

    Args:
        on_rows: called when a batch is done, with the number of rows done and that of all rows.
    """
    from multitask.data import DataError
    from patches.images.decoding import decode

    batch: list[Tensor] = []
    for number, group in enumerate(table.groups()):
        for place in range(len(group)):
            try:
                batch.append(decode(group.encoded(place)))
            except RuntimeError as error:
                source = table.source(table.first_row(number) + place)
                raise DataError(
                    f"{source}: found an image that cannot be decoded ({str(error).splitlines()[0]}), expected a whole "
                    "PNG or JPEG. Replace it in the table."
                ) from error
            if len(batch) == batch_size:
                yield batch
                on_rows(table.first_row(number) + place + 1, table.num_rows)
                batch = []
    if batch:
        yield batch
        on_rows(table.num_rows, table.num_rows)
