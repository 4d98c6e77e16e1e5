"""`multitask data`: import image data sets into tables, and look at what is in a table."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

app = typer.Typer(help="Import image data sets into tables, and look at what is in a table.", no_args_is_help=True)
import_app = typer.Typer(
    help="Copy a data set's images into the shards of a table. Started again after a break, an import goes on.",
    no_args_is_help=True,
)
app.add_typer(import_app, name="import")

Target = Annotated[str, typer.Argument(metavar="TABLE", help="Where the table goes: a path or a URI (s3://, gs://).")]
Folder = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="The data set's folder.")]
Splits = Annotated[
    list[str] | None,
    typer.Option("--split", metavar="NAME=SHARE", help="Several times: a table each, with this share of every class."),
]
Seed = Annotated[int, typer.Option(min=0, help="Of splits and order.")]
KeepOrder = Annotated[bool, typer.Option("--keep-order", help="Keep the source's order instead of shuffling the rows.")]
MaxSide = Annotated[
    int | None, typer.Option(min=8, help="Scale larger images down to this longer side, in pixels, and encode anew.")
]
RowsPerShard = Annotated[int, typer.Option(min=1, help="Images of each file.")]
Classes = Annotated[
    Path | None, typer.Option(exists=True, dir_okay=False, help="Class names, one a line, in the order of the labels.")
]
TableUri = Annotated[str, typer.Argument(metavar="TABLE", help="A table, or a folder of tables: a path or a URI.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")]
DEFAULT_ROWS = 4096


@import_app.command("imagefolder")
def image_folder(
    source: Folder,
    table: Target,
    classes: Classes = None,
    split: Splits = None,
    seed: Seed = 0,
    keep_order: KeepOrder = False,
    max_side: MaxSide = None,
    rows_per_shard: RowsPerShard = DEFAULT_ROWS,
) -> None:
    """A folder with one folder of images per class, as ImageNet is laid out."""
    from multitask.data import sources

    _import(sources.image_folder(source, _lines(classes)), table, split, seed, keep_order, max_side, rows_per_shard)


@import_app.command()
def places365(
    images: Annotated[str, typer.Argument(help="The folder that the list's paths start at, for example data_256.")],
    file_list: Annotated[
        Path, typer.Argument(exists=True, help="places365_train_standard.txt, places365_val.txt, ...")
    ],
    categories: Annotated[Path, typer.Argument(exists=True, help="categories_places365.txt")],
    table: Target,
    split: Splits = None,
    seed: Seed = 0,
    keep_order: KeepOrder = False,
    max_side: MaxSide = None,
    rows_per_shard: RowsPerShard = DEFAULT_ROWS,
) -> None:
    """Places-365 by its own list files."""
    from multitask.data import sources

    source = sources.places365(images, file_list, categories)
    _import(source, table, split, seed, keep_order, max_side, rows_per_shard)


@import_app.command("torchvision")
def torchvision_dataset(
    name: Annotated[str, typer.Argument(help="A class of torchvision.datasets, for example CIFAR10.")],
    root: Folder,
    table: Target,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Options of that class, for example split=test or train=false."),
    ] = None,
    split: Splits = None,
    seed: Seed = 0,
    keep_order: KeepOrder = False,
    max_side: MaxSide = None,
    rows_per_shard: RowsPerShard = DEFAULT_ROWS,
) -> None:
    """A data set that torchvision reads; nothing is downloaded."""
    from multitask.data import sources

    options = {key: _value(text) for key, text in _pairs(option, "--option").items()}
    source = sources.torchvision_dataset(name, root, **options)
    _import(source, table, split, seed, keep_order, max_side, rows_per_shard)


@import_app.command()
def webdataset(
    tars: Annotated[str, typer.Argument(help='A folder of tars, or a pattern such as "train-{000000..000146}.tar".')],
    table: Target,
    classes: Classes = None,
    split: Splits = None,
    seed: Seed = 0,
    keep_order: KeepOrder = False,
    max_side: MaxSide = None,
    rows_per_shard: RowsPerShard = DEFAULT_ROWS,
) -> None:
    """WebDataset tars with an image and a .cls (or a .json with "label") for each key."""
    from multitask.data import sources

    _import(sources.webdataset(tars, _lines(classes)), table, split, seed, keep_order, max_side, rows_per_shard)


@import_app.command()
def paths(
    file: Annotated[str, typer.Argument(help="A Parquet file, or a folder of them, with a path and a label per row.")],
    table: Target,
    path_column: Annotated[str, typer.Option(help="Column of the paths.")] = "path",
    label_column: Annotated[str, typer.Option(help="Column of the labels, numbers or names.")] = "label",
    root: Annotated[
        str | None, typer.Option(help="Where relative paths start; the Parquet's folder by default.")
    ] = None,
    classes: Classes = None,
    split: Splits = None,
    seed: Seed = 0,
    keep_order: KeepOrder = False,
    max_side: MaxSide = None,
    rows_per_shard: RowsPerShard = DEFAULT_ROWS,
) -> None:
    """A Parquet of paths to image files."""
    from multitask.data import sources

    source = sources.paths_parquet(file, path_column, label_column, root, _lines(classes))
    _import(source, table, split, seed, keep_order, max_side, rows_per_shard)


@import_app.command()
def huggingface(
    files: Annotated[str, typer.Argument(help="A Parquet file, a folder or a pattern of them.")],
    table: Target,
    image_column: Annotated[str, typer.Option(help="Column of the images: bytes and path.")] = "image",
    label_column: Annotated[str, typer.Option(help="Column of the labels.")] = "label",
    classes: Classes = None,
    split: Splits = None,
    seed: Seed = 0,
    keep_order: KeepOrder = False,
    max_side: MaxSide = None,
    rows_per_shard: RowsPerShard = DEFAULT_ROWS,
) -> None:
    """Parquet files as the Hugging Face hub has them, images inside."""
    from multitask.data import sources

    source = sources.huggingface(files, image_column, label_column, _lines(classes))
    _import(source, table, split, seed, keep_order, max_side, rows_per_shard)


@app.command()
def inspect(table: TableUri, json_output: AsJson = False) -> None:
    """Show what a table holds: classes, counts, files, bytes."""
    import numpy as np

    described = {}
    for uri, opened in _open_all(table, verify=False).items():
        counts = np.bincount(opened.labels(), minlength=len(opened.classes)).tolist()
        size = sum(shard.bytes for shard in opened.shards)
        described[uri] = {
            "images": opened.num_rows,
            "classes": dict(zip(opened.classes, counts, strict=True)),
            "files": len(opened.shards),
            "bytes": size,
            "bytes_per_image": size / opened.num_rows,
        }
    if json_output:
        print(json.dumps(described))
        return
    shown = Table("table", "images", "classes", "images of a class", "files", "bytes", "bytes an image")
    for uri, entry in described.items():
        of_class = entry["classes"].values()
        row = [len(of_class), f"{min(of_class):,} to {max(of_class):,}", entry["files"], f"{entry['bytes']:,}"]
        shown.add_row(uri, f"{entry['images']:,}", *map(str, row), f"{entry['bytes_per_image']:,.0f}")
    Console().print(shown)


@app.command()
def verify(
    table: TableUri,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image too.")] = False,
) -> None:
    """Compare every shard with the index (presence, SHA-256, schema, labels); exit status 1 when one differs."""
    from multitask.data import DataError
    from multitask.data.transforms import decode as decode_image

    broken = 0
    for uri, opened in _open_all(table, verify=True).items():
        if decode:
            with _progress() as on_rows:
                for number, group in enumerate(opened.groups()):
                    for place in range(len(group)):
                        try:
                            decode_image(group.encoded(place))
                        except RuntimeError as error:
                            broken += 1
                            source = opened.source(opened.first_row(number) + place)
                            print(f"{source} ({group.ids[place]}): cannot be decoded: {str(error).splitlines()[0]}")
                    on_rows(opened.first_row(number) + len(group), opened.num_rows)
        print(f"{uri}: {opened.num_rows:,} images in {len(opened.shards)} files are as the index says")
    if broken:
        raise DataError(
            f"{broken} images cannot be decoded. Replace them in the source and import it again, or train with "
            "undecodable: skip."
        )


@app.command()
def head(
    table: TableUri,
    images: Annotated[int, typer.Option(min=1, help="How many.")] = 40,
    to: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("head.png"),
) -> None:
    """Write a contact sheet of a table's first images with their class names."""
    from multitask.data import open_table
    from multitask.data.sheet import contact_sheet
    from patches.files import write_atomic

    write_atomic(to, contact_sheet(open_table(table, verify=False), images))
    print(to)


def _import(
    source: Any,
    target: str,
    split: list[str] | None,
    seed: int,
    keep_order: bool,
    max_side: int | None,
    rows_per_shard: int,
) -> None:
    from multitask.cluster.session import ray_session
    from multitask.data.importing import import_table

    splits = {name: float(_value(share)) for name, share in _pairs(split, "--split").items()}
    with ray_session(), _progress() as on_rows:
        tables = import_table(
            source,
            target,
            splits=splits or None,
            shuffle=not keep_order,
            seed=seed,
            max_side=max_side,
            rows_per_shard=rows_per_shard,
            on_rows=on_rows,
        )
    for name, rows in tables.items():
        print(f"{target}{'/' if name else ''}{name}: {rows:,} images of {len(source.classes)} classes")


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar over rows; gives the function that moves it, of the rows done and of all rows."""
    columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("images", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _open_all(uri: str, verify: bool) -> dict[str, Any]:
    """The table at a place, or those of its folders that are tables."""
    from multitask.data import open_table
    from multitask.data.format import INDEX_NAME
    from multitask.data.storage import locate

    place = locate(uri)
    if place.size(INDEX_NAME) is not None:
        return {uri: open_table(uri, verify=verify)}
    names = sorted(name for name in place.names() if place.join(name).size(INDEX_NAME) is not None)
    # With none, opening the place itself says what is wrong with it.
    uris = [f"{uri.rstrip('/')}/{name}" for name in names] or [uri]
    return {table: open_table(table, verify=verify) for table in uris}


def _pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts or []]
    for key, equals, value in pairs:
        if not (key and equals and value):
            raise typer.BadParameter(f"found '{key}{equals}{value}', expected NAME=VALUE", param_hint=option)
    return {key: value for key, _, value in pairs}


def _value(text: str) -> Any:
    """A number, true or false, or else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _lines(file: Path | None) -> list[str] | None:
    return None if file is None else file.read_text(encoding="utf-8").split("\n")[:-1]
