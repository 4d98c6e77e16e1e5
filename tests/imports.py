"""The imports between the rooms of the project, read from the source.

A room is a folder of `multitask/`, or a file directly in `multitask/`; `patches` and `jobs` are one room each. An arrow
goes from a room to each room that it imports. A room's floor is one above the highest floor that it imports from.

`python -m tests.imports` prints the drawing that docs/architecture.md shows; with the folder of another checkout as its
argument it draws that one.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("patches", "multitask", "jobs")

Graph = dict[str, set[str]]
"""Node -> the nodes that it imports."""


def imported(path: Path) -> Iterator[tuple[str, str | None]]:
    """Yield each module that a file imports, also inside functions, with the name taken from it or None.

    Raises:
        ValueError: a relative import, which the project does not use.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level or node.module is None:
                raise ValueError(f"{path}:{node.lineno} imports relatively. Name the module from its package on.")
            yield from ((node.module, alias.name) for alias in node.names)


def modules(root: Path = ROOT) -> Graph:
    """Return module -> the project's modules that it imports. A package stands for its `__init__.py`."""
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
    """Return a module's room, and None for `multitask` itself, which only hands out names of other modules."""
    package, *rest = module.split(".")
    if package != "multitask":
        return package
    return rest[0] if rest else None


def rooms(graph: Mapping[str, set[str]]) -> Graph:
    """Return room -> the other rooms that its modules import."""
    found: Graph = {}
    for module, others in graph.items():
        room = room_of(module)
        if room is not None:
            found.setdefault(room, set()).update(other for other in map(room_of, others) if other not in (None, room))
    return found


def circle(graph: Graph) -> list[str]:
    """Return the nodes of a circle of imports; an empty list if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        nodes: list[str] = error.args[1]
        return nodes
    return []


def floors(graph: Graph) -> dict[str, int]:
    """Return room -> its floor, counted from 0. The graph must have no circle."""
    floor: dict[str, int] = {}
    for room in TopologicalSorter(graph).static_order():
        floor[room] = max((floor[other] + 1 for other in graph[room]), default=0)
    return floor


def drawing(root: Path = ROOT) -> str:
    """Return the rooms of a checkout as text, a line each: floor, room, and the rooms that it imports."""
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
