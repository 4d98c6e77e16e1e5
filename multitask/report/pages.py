"""HTML pages that need no other file: how templates become pages, and the pages about a cascade and about a sweep."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from multitask.report import plots
from patches.files import write_atomic

JPEG = b"\xff\xd8\xff"
"""First bytes of every JPEG."""


def environment(*packages: str) -> jinja2.Environment:
    """Return the template environment of a report.

    Args:
        packages: Python packages whose `templates` folders are searched first, before the one of `multitask.report`.
    Returns:
        An environment that refuses undefined names and escapes all values. Its filter `bytes` prints a size for people,
        and its filter `inline` turns a PNG or a JPEG into a `data:` URI.
    """
    loader = jinja2.ChoiceLoader(
        [jinja2.PackageLoader(package, "templates") for package in (*packages, "multitask.report")]
    )
    made = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters |= {"bytes": plots.human_bytes, "inline": inline}
    return made


def inline(picture: bytes) -> str:
    """Return a PNG or a JPEG as a `data:` URI, so that a page that shows it needs no other file."""
    kind = "jpeg" if picture.startswith(JPEG) else "png"
    return f"data:image/{kind};base64," + base64.b64encode(picture).decode("ascii")


def write_cascade_report(title: str, section: Mapping[str, Any], directory: Path) -> Path:
    """Write the figures about one cascade, and `cascade.html`, which contains them and needs no other file.

    Args:
        section: the result of `multitask.cascade.figures.section`.
        directory: created if it is missing.
    Returns:
        The path of `cascade.html`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_cascade_pictures(section, directory)
    html = environment().get_template("cascade.html").render(title=title, cascade=section, colours=[])
    path = directory / "cascade.html"
    write_atomic(path, html.encode())
    return path


def write_cascade_pictures(section: Mapping[str, Any], directory: Path) -> None:
    """Write the figures of a section about a cascade as PNG files, and `stages.png` if the section has a sheet."""
    for figure in section["figures"]:
        write_atomic(directory / f"{figure.name}.png", figure.light)
    if section["sheet"] is not None:
        write_atomic(directory / "stages.png", section["sheet"])


def write_sweep_report(title: str, section: Mapping[str, Any], directory: Path) -> Path:
    """Write `report.html` about a sweep, which contains its figures and needs no other file.

    Args:
        section: the result of `multitask.sweep.summary.section`.
    Returns:
        The path of `report.html`.
    """
    html = environment().get_template("sweep.html").render(title=title, sweep=section)
    path = directory / "report.html"
    write_atomic(path, html.encode())
    return path
