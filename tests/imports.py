"""The imports between the rooms of the project, read from the source.

A room is a folder of `multitask/`, or a file that lies loose in it; `patches` and `jobs` are one room each. An arrow
goes from a room to each one that it imports, and a room's floor is one above the highest room that it imports.

`python -m tests.imports` prints the drawing that docs/architecture.md shows; another folder as its argument draws
another checkout.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("patches", "multitask", "jobs")

Graph = dict[str, set[str]]
"""Node -> those that it imports."""


def imported(path: Path) -> Iterator[tuple[str, str | None]]:
    """Each module that a file imports, inside functions too, with the name taken from it or None."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


def modules(root: Path = ROOT) -> Graph:
    """Module -> the project's modules that it imports; a package is its `__init__`."""
    paths = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph: Graph = {}
    for module, path in paths.items():
        found = {f"{name}.{taken}" if f"{name}.{taken}" in paths else name for name, taken in imported(path)}
        graph[module] = (found & paths.keys()) - {module}
    return graph


def room_of(module: str) -> str | None:
    """None for `multitask` itself, which only hands out the names of the others."""
    package, *rest = module.split(".")
    if package != "multitask":
        return package
    return rest[0] if rest else None


def rooms(graph: Mapping[str, set[str]]) -> Graph:
    found: Graph = {}
    for module, others in graph.items():
        room = room_of(module)
        if room is not None:
            found.setdefault(room, set()).update(other for other in map(room_of, others) if other not in (None, room))
    return found


def circle(graph: Graph) -> list[str]:
    """The nodes of a circle of imports, or none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        nodes: list[str] = error.args[1]
        return nodes
    return []


def floors(graph: Graph) -> dict[str, int]:
    """Room -> its floor, from 0; the graph has no circle."""
    floor: dict[str, int] = {}
    for room in TopologicalSorter(graph).static_order():
        floor[room] = max((floor[other] + 1 for other in graph[room]), default=0)
    return floor


def drawing(root: Path = ROOT) -> str:
    graph = rooms(modules(root))
    arrows = sum(map(len, graph.values()))
    if circle(graph):
        return f"{len(graph)} rooms, {arrows} arrows, a circle: {' <- '.join(circle(graph))}\n" + "\n".join(
            f"  {room:<11} {' '.join(sorted(graph[room]))}" for room in sorted(graph)
        )
    floor = floors(graph)
    lines = [f"{len(graph)} rooms on {max(floor.values()) + 1} floors, {arrows} arrows, all downwards, no circle"]
    for number in range(max(floor.values()), -1, -1):
        for room in sorted(room for room in graph if floor[room] == number):
            below = " ".join(sorted(graph[room], key=lambda other: (-floor[other], other)))
            lines.append(f"{number:>2}  {room:<11}{'-> ' + below if below else ''}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    print(drawing(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT))
