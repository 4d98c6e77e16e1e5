"""`multitask predict`: the names of the classes of photos, from an export or a cascade."""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer
from rich.table import Table

from jobs.tables import show
from multitask.progress import showing_rows

if TYPE_CHECKING:
    from patches import Answer, ImageError

    AnswerFiles: TypeAlias = Callable[[Sequence[str]], Iterator[Answer | ImageError]]
    """Returns the answer to each file, or the error if it cannot be decoded."""


def predict(
    export: Annotated[
        Path, typer.Argument(help="The folder that `multitask export` wrote, or a file NAME.cascade.", metavar="EXPORT")
    ],
    photos: Annotated[list[Path], typer.Argument(help="Image files, and folders of image files.", metavar="PHOTOS...")],
    task: Annotated[
        str | None, typer.Option(help="The task that answers; needed if the export has several.", metavar="TASK")
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            help="Write the answers to this file (.parquet, .csv or .jsonl), with the probability of every class.",
            metavar="FILE",
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")] = False,
) -> None:
    """Name the class of each photo. A file that cannot be decoded is named and left out."""
    from multitask.data.answers import answer_record, answers_writer, check_ending
    from patches import ImageError

    if to is not None:
        check_ending(to)
    files = find_photos(photos)
    answers_of, classes = _open(export, task)
    kept: list[tuple[str, Answer]] = []
    failed: dict[str, ImageError] = {}
    writer = (
        nullcontext(lambda file, answer: kept.append((file, answer))) if to is None else answers_writer(to, classes)
    )
    with showing_rows("predicting") as on_rows, writer as write:
        for number, (file, answer) in enumerate(zip(files, answers_of(files), strict=True)):
            if isinstance(answer, ImageError):
                failed[file] = answer
            else:
                write(file, answer)
            on_rows(number + 1, len(files))
        if len(failed) == len(files):
            _name(failed, len(files))
            raise ImageError("None of the files can be decoded, expected JPEG, PNG, WebP, GIF, BMP, TIFF or PPM.")
    _name(failed, len(files))
    if json_output:
        records = [answer_record(file, answer, classes) for file, answer in kept]
        errors = [{"file": file, "error": str(error)} for file, error in failed.items()]
        print(json.dumps({"answered": len(files) - len(failed), "answers": records, "undecodable": errors}))
    elif to is not None:
        print(f"{to}: answers for {len(files) - len(failed):,} images")
    else:
        table = Table("file", "class", "probability")
        for file, answer in kept:
            table.add_row(file, answer.class_name, f"{answer.probability:.3f}")
        show(table)


def find_photos(paths: Sequence[Path]) -> list[str]:
    """Return the files among `paths`, and the image files in the folders among them and below.

    In a folder, hidden files and files without the ending of an image are left aside, as at an import. Their kinds are
    printed on standard error.

    Raises:
        DataError: a path does not exist, a name is not UTF-8, or there is no image file.
    """
    from multitask.data import DataError
    from multitask.data.sources.files import list_counts, path_array
    from multitask.data.sources.image_folder import images_below

    files: list[str] = []
    left_aside: Counter[str] = Counter()
    for path in paths:
        if path.is_dir():
            found = images_below(str(path), "", left_aside)
            files += [os.path.normpath(os.path.join(path, below)) for below in found]
        elif path.is_file():
            files.append(str(path))
        else:
            raise DataError(f"'{path}': found no such file or folder, expected photos. Check the path.")
    if left_aside:
        print(f"Left aside: {list_counts(left_aside)}.", file=sys.stderr)
    if not files:
        raise DataError(f"Found no image file in {', '.join(map(str, paths))}. Name files, or folders with files.")
    path_array(files, "PHOTOS")
    return files


def _open(export: Path, task: str | None) -> "tuple[AnswerFiles, Sequence[str]]":
    """Return what answers files, and the class names in the order of the answers' probabilities."""
    if not export.is_file():
        from patches import open_export

        bank = open_export(export)
        return partial(bank.answers, task=task), bank.classes(task)
    from multitask.cascade import CascadeError, CascadeModel

    if task is not None:
        raise CascadeError(f"'{export}' is a cascade, whose stages are one task together. Leave --task out.")
    cascade = CascadeModel.load(export)
    assert cascade.classes is not None, "bundles have class names"
    return cascade.answers, cascade.classes


def _name(failed: "dict[str, ImageError]", files: int) -> None:
    """Print on standard error which files could not be decoded, and why."""
    for error in failed.values():
        print(error, file=sys.stderr)
    if failed:
        print(f"{len(failed):,} of {files:,} files cannot be decoded.", file=sys.stderr)
