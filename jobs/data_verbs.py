"""`multitask data`: import image data sets into tables, and look at what is in a table."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from jobs.groups import Group
from jobs.tables import show

app = typer.Typer(
    cls=Group, help="Import image data sets into tables, and look at what is in a table.", no_args_is_help=True
)
import_app = typer.Typer(
    cls=Group,
    help="Copy the images of a data set into a table. An interrupted import continues when it is repeated.",
    no_args_is_help=True,
)
app.add_typer(import_app, name="import")

Target = Annotated[str, typer.Argument(metavar="TABLE", help="The table to write: a path or a URI (s3://, gs://).")]
Folder = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="The data set's folder.")]
Splits = Annotated[
    list[str] | None,
    typer.Option(
        "--split",
        metavar="NAME=SHARE",
        help="Write a table of this name with this share of every class; may be given several times.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the splits and of the order of the rows.")]
KeepOrder = Annotated[bool, typer.Option("--keep-order", help="Keep the source's order instead of shuffling the rows.")]
MaxSide = Annotated[
    int | None,
    typer.Option(
        min=8, help="Scale images with a longer side than this (in pixels) down to it, and encode them again."
    ),
]
IgnoreOrientation = Annotated[
    bool,
    typer.Option("--ignore-orientation", help="Read the images as their pixels are stored, whatever their EXIF says."),
]
RowsPerShard = Annotated[int, typer.Option(min=1, help="Number of images in each file.")]
Classes = Annotated[
    Path | None,
    typer.Option(
        exists=True, dir_okay=False, help="File of class names, one on each line, in the order of the labels."
    ),
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
    ignore_orientation: IgnoreOrientation = False,
    rows_per_shard: RowsPerShard = DEFAULT_ROWS,
) -> None:
    """Import a folder that has one folder of images for each class, as ImageNet has."""
    from multitask.data import sources

    read = sources.image_folder(source, _lines(classes))
    _import(read, table, split, seed, keep_order, max_side, ignore_orientation, rows_per_shard)


@import_app.command()
def places365(
    images: Annotated[
        str, typer.Argument(help="The folder to which the paths in the list are relative, for example data_256.")
    ],
    file_list: Annotated[
        Path,
        typer.Argument(exists=True, help="The list of images: places365_train_standard.txt, places365_val.txt, ..."),
    ],
    categories: Annotated[Path, typer.Argument(exists=True, help="The list of classes: categories_places365.txt.")],
    table: Target,
    split: Splits = None,
    seed: Seed = 0,
    keep_order: KeepOrder = False,
    max_side: MaxSide = None,
    ignore_orientation: IgnoreOrientation = False,
    rows_per_shard: RowsPerShard = DEFAULT_ROWS,
) -> None:
    """Import Places-365, as its own list files describe it."""
    from multitask.data import sources

    source = sources.places365(images, file_list, categories)
    _import(source, table, split, seed, keep_order, max_side, ignore_orientation, rows_per_shard)


@import_app.command("torchvision")
def torchvision_dataset(
    name: Annotated[str, typer.Argument(help="A class of torchvision.datasets, for example CIFAR10.")],
    root: Folder,
    table: Target,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="An option of that class, for example split=test or train=false; may be given several times.",
        ),
    ] = None,
    split: Splits = None,
    seed: Seed = 0,
    keep_order: KeepOrder = False,
    max_side: MaxSide = None,
    ignore_orientation: IgnoreOrientation = False,
    rows_per_shard: RowsPerShard = DEFAULT_ROWS,
) -> None:
    """Import a data set that torchvision can read; it is not downloaded."""
    from multitask.data import sources

    options = {key: _value(text) for key, text in _pairs(option, "--option").items()}
    source = sources.torchvision_dataset(name, root, **options)
    _import(source, table, split, seed, keep_order, max_side, ignore_orientation, rows_per_shard)


@import_app.command()
def webdataset(
    tars: Annotated[
        str, typer.Argument(help='A folder of tar files, or a pattern such as "train-{000000..000146}.tar".')
    ],
    table: Target,
    classes: Classes = None,
    split: Splits = None,
    seed: Seed = 0,
    keep_order: KeepOrder = False,
    max_side: MaxSide = None,
    ignore_orientation: IgnoreOrientation = False,
    rows_per_shard: RowsPerShard = DEFAULT_ROWS,
) -> None:
    """Import WebDataset tar files that have an image and a .cls file (or a .json file with "label") for each key."""
    from multitask.data import sources

    source = sources.webdataset(tars, _lines(classes))
    _import(source, table, split, seed, keep_order, max_side, ignore_orientation, rows_per_shard)


@import_app.command()
def paths(
    file: Annotated[
        str, typer.Argument(help="A Parquet file with a path and a label in each row, or a folder of such files.")
    ],
    table: Target,
    path_column: Annotated[str, typer.Option(help="Name of the column of paths.")] = "path",
    label_column: Annotated[
        str, typer.Option(help="Name of the column of labels, which are numbers or names.")
    ] = "label",
    root: Annotated[
        str | None,
        typer.Option(help="Folder to which relative paths refer; by default the folder of the Parquet file."),
    ] = None,
    classes: Classes = None,
    split: Splits = None,
    seed: Seed = 0,
    keep_order: KeepOrder = False,
    max_side: MaxSide = None,
    ignore_orientation: IgnoreOrientation = False,
    rows_per_shard: RowsPerShard = DEFAULT_ROWS,
) -> None:
    """Import the image files whose paths are in a Parquet file."""
    from multitask.data import sources

    source = sources.paths_parquet(file, path_column, label_column, root, _lines(classes))
    _import(source, table, split, seed, keep_order, max_side, ignore_orientation, rows_per_shard)


@import_app.command()
def huggingface(
    files: Annotated[
        str, typer.Argument(help="A Parquet file, a folder of Parquet files, or a pattern that matches some.")
    ],
    table: Target,
    image_column: Annotated[
        str, typer.Option(help="Name of the column of images, each with its bytes and path.")
    ] = "image",
    label_column: Annotated[str, typer.Option(help="Name of the column of labels.")] = "label",
    classes: Classes = None,
    split: Splits = None,
    seed: Seed = 0,
    keep_order: KeepOrder = False,
    max_side: MaxSide = None,
    ignore_orientation: IgnoreOrientation = False,
    rows_per_shard: RowsPerShard = DEFAULT_ROWS,
) -> None:
    """Import Parquet files that contain the images, as on the Hugging Face hub."""
    from multitask.data import sources

    source = sources.huggingface(files, image_column, label_column, _lines(classes))
    _import(source, table, split, seed, keep_order, max_side, ignore_orientation, rows_per_shard)


@app.command()
def inspect(table: TableUri, json_output: AsJson = False) -> None:
    """Show the classes, image counts, files and bytes of a table."""
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
    folder = None if table in described else table
    header = ("table", "images", "classes", "images of a class", "files", "bytes", "bytes per image")
    shown = Table(*header, title=folder)
    for uri, entry in described.items():
        of_class = entry["classes"].values()
        row = [len(of_class), f"{min(of_class):,} to {max(of_class):,}", entry["files"], f"{entry['bytes']:,}"]
        name = uri if folder is None else _name(uri)
        shown.add_row(name, f"{entry['images']:,}", *map(str, row), f"{entry['bytes_per_image']:,.0f}")
    show(shown)


@app.command()
def verify(
    table: TableUri,
    decode: Annotated[bool, typer.Option("--decode", help="Also decode every image.")] = False,
) -> None:
    """Compare every shard with the index (presence, SHA-256, schema, labels); the exit status is 1 if one differs."""
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
            "`undecodable: skip`."
        )


@app.command()
def head(
    table: TableUri,
    images: Annotated[int, typer.Option(min=1, help="Number of images of each table.")] = 40,
    to: Annotated[
        Path, typer.Option(help="The PNG file to write. With several tables, each one's name is added to its name.")
    ] = Path("head.png"),
) -> None:
    """Write a picture of a table's first images with their class names; of a folder, one picture for each table."""
    from multitask.data.sheet import contact_sheet
    from patches.files import write_atomic

    tables = _open_all(table, verify=False)
    for uri, opened in tables.items():
        file = to if len(tables) == 1 else to.with_stem(f"{to.stem}_{_name(uri)}")
        write_atomic(file, contact_sheet(opened, images))
        print(file)


def _import(
    source: Any,
    target: str,
    split: list[str] | None,
    seed: int,
    keep_order: bool,
    max_side: int | None,
    ignore_orientation: bool,
    rows_per_shard: int,
) -> None:
    """Write a source as tables. Its notes come first, before hours are spent on an import that lacks images."""
    from multitask.cluster.session import ray_session
    from multitask.data.importing import import_table

    for note in source.notes:
        print(note, file=sys.stderr)
    splits = {name: float(_value(share)) for name, share in _pairs(split, "--split").items()}
    with ray_session(), _progress() as on_rows:
        tables = import_table(
            source,
            target,
            splits=splits or None,
            shuffle=not keep_order,
            seed=seed,
            max_side=max_side,
            ignore_orientation=ignore_orientation,
            rows_per_shard=rows_per_shard,
            on_rows=on_rows,
        )
    for name, rows in tables.items():
        print(f"{target}{'/' if name else ''}{name}: {rows:,} images of {len(source.classes)} classes")


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar; yields the function that moves it, which takes the number of rows done and of all rows."""
    columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("images", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _open_all(uri: str, verify: bool) -> dict[str, Any]:
    """Open the table at a URI, or all tables in the folder at a URI; returns URI -> table."""
    from multitask.data import open_table
    from multitask.data.format import INDEX_NAME
    from multitask.data.storage import locate

    place = locate(uri)
    if place.size(INDEX_NAME) is not None:
        return {uri: open_table(uri, verify=verify)}
    names = sorted(name for name in place.names() if place.join(name).size(INDEX_NAME) is not None)
    # If there is no table, opening the URI itself raises an error that says what is wrong.
    uris = [f"{uri.rstrip('/')}/{name}" for name in names] or [uri]
    return {table: open_table(table, verify=verify) for table in uris}


def _name(uri: str) -> str:
    """Return the name that a table has in its folder."""
    return uri.rstrip("/").rpartition("/")[2]


def _pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts or []]
    for key, equals, value in pairs:
        if not (key and equals and value):
            raise typer.BadParameter(f"found '{key}{equals}{value}', expected NAME=VALUE", param_hint=option)
    return {key: value for key, _, value in pairs}


def _value(text: str) -> Any:
    """Return the number or the truth value that a text stands for, or else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _lines(file: Path | None) -> list[str] | None:
    """Return the class names in a file. Space around a name, empty lines and a byte order mark are no part of them.

    Raises:
        DataError: the file is not encoded in UTF-8.
    """
    from multitask.data import DataError

    if file is None:
        return None
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: found byte {error.object[error.start]:#04x} at place {error.start}, expected text in UTF-8 with "
            "one class name on each line. Save the file as UTF-8."
        ) from error
    return [name for line in lines if (name := line.strip())]
