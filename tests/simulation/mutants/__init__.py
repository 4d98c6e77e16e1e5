"""Faults that are put into the code on purpose, to show that the simulation finds them.

Each fault is a file `NN_NAME.yaml` in this folder:

    title: what is wrong, in one sentence
    commit: the commit whose fix is undone; left out for a fault that the code never had
    engines: the engines under which it can show
    replace: list of `file`, `old` and `new`; the text `old` occurs exactly once in the file

The faults were chosen before the simulation was built, and none was left out because the simulation did not find it.
`python -m tests.simulation.mutants` prints which seeds find which fault.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml

FOLDER = Path(__file__).parent
COPIED_FOLDERS = ("multitask", "patches", "jobs", "tests", "benchmarks")
COPIED_ENDINGS = (".py", ".yaml")


@dataclass(frozen=True)
class Replacement:
    """A change of one place in the code."""

    file: str
    """Path from the root of the checkout."""
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """One fault."""

    number: int
    name: str
    title: str
    commit: str | None
    """Short hash of the commit whose fix is undone; None for a fault that the code never had."""
    engines: tuple[str, ...]
    """Engines under which the fault can show."""
    replacements: tuple[Replacement, ...]


class AnchorError(ValueError):
    """The code has changed, so that a fault does not fit it any more."""


def load() -> list[Mutant]:
    """Return all faults in the order of their numbers."""
    return [_read(path) for path in sorted(FOLDER.glob("*.yaml"))]


def _read(path: Path) -> Mutant:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    number, _, name = path.stem.partition("_")
    replacements = tuple(Replacement(**replacement) for replacement in content["replace"])
    return Mutant(int(number), name, content["title"], content.get("commit"), tuple(content["engines"]), replacements)


def mutated(mutant: Mutant, source: Path) -> dict[str, str]:
    """Return the files that a fault changes, by their paths from the root of a checkout, with the fault in them.

    Args:
        source: root of the checkout.
    Raises:
        AnchorError: a text that the fault replaces does not occur exactly once.
    """
    texts: dict[str, str] = {}
    for replacement in mutant.replacements:
        file = replacement.file
        text = texts[file] if file in texts else (source / file).read_text(encoding="utf-8")
        found = text.count(replacement.old)
        if found != 1:
            raise AnchorError(
                f"Mutant {mutant.number:02d}_{mutant.name}: expected its old text once in {file}, found it {found} "
                f"times. Write the fault anew for the present code:\n{replacement.old}"
            )
        texts[file] = text.replace(replacement.old, replacement.new)
    return texts


def apply(mutant: Mutant, source: Path, target: Path) -> None:
    """Copy the code of a checkout, with a fault in it.

    Args:
        source: root of the checkout.
        target: an empty folder.
    Raises:
        AnchorError: as from `mutated`.
    """
    texts = mutated(mutant, source)
    for folder in COPIED_FOLDERS:
        for path in (source / folder).rglob("*"):
            if path.suffix in COPIED_ENDINGS:
                copy = target / path.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
    for file, text in texts.items():
        (target / file).write_text(text, encoding="utf-8")
