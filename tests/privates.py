"""Where tests reach into private names of the code, which ties the tests to how the code is written.

`python -m tests.privates` prints every place and the count; `tests/test_layers.py` holds the limit.
"""

import ast
from collections.abc import Iterator

from tests.imports import PACKAGES, ROOT

BY_NAME = ("getattr", "hasattr", "setattr", "delattr", "object")
"""Functions and methods that take an attribute's name as a string: the built-in ones, those of pytest's `monkeypatch`,
and `patch.object` of unittest.mock."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def reaches(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and name of each place where a source text uses a private name that is not its own.

    Own names are attributes of `self` and `cls`, and names that the text defines itself. A private attribute of any
    other object counts, whatever the object is: a module, a fixture, a value. So do private names that are imported
    from the project, and private names that are given as a string to a function of `BY_NAME`.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES:
            yield from ((node.lineno, alias.name) for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in BY_NAME:
            # The name is the second argument, or the end of a dotted path in the first one.
            names = [argument.value for argument in node.args[:2] if isinstance(argument, ast.Constant)]
            yield from (
                (node.lineno, name) for name in names if isinstance(name, str) and is_private(name.rpartition(".")[2])
            )


def all_reaches() -> list[str]:
    """Return every place in the tests as "FILE:LINE: NAME"."""
    return [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for line, name in sorted(reaches(path.read_text(encoding="utf-8")))
    ]


if __name__ == "__main__":
    found = all_reaches()
    print(*found, f"{len(found)} places", sep="\n")
