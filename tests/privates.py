"""Where tests reach into private names of the code, which ties them to how it is written.

`python -m tests.privates` prints every place and the count; `tests/test_layers.py` holds the limit.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.imports import PACKAGES, ROOT


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def reaches(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of each private name of another object, or of the project's modules, that a file uses."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES:
            yield from ((node.lineno, alias.name) for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("setattr", "delattr"):
            names = [argument.value for argument in node.args[:2] if isinstance(argument, ast.Constant)]
            yield from (
                (node.lineno, name) for name in names if isinstance(name, str) and is_private(name.rpartition(".")[2])
            )


def all_reaches() -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for line, name in sorted(reaches(path))
    ]


if __name__ == "__main__":
    found = all_reaches()
    print(*found, f"{len(found)} places", sep="\n")
