"""The shape of the code: imports run downwards, files and functions stay short, tests use public names."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.imports import PACKAGES, ROOT, Graph, circle, drawing, floors, imported, modules, rooms
from tests.privates import all_reaches, reaches

FORBIDDEN = {
    "patches": {"multitask", "jobs", "ray", "mlflow", "pyarrow", "pydantic"},
    "multitask": {"jobs"},
}
STORES = {"patches/features.py"}
"""May read and write Arrow files, and is imported by nothing that `import patches` imports."""
FILE_LINES, FUNCTION_LINES = 450, 60
PRIVATE_REACHES = 10
PAGE = ROOT / "docs" / "architecture.md"


@pytest.fixture(scope="module")
def graph() -> Graph:
    """Module -> the project's modules that it imports."""
    return modules()


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def packages_of(path: Path) -> set[str]:
    """Top-level packages that the file imports, inside functions too."""
    return {module.partition(".")[0] for module, _ in imported(path)}


@pytest.mark.parametrize("package", list(FORBIDDEN))
def test_no_import_runs_upwards(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = {str(path.relative_to(ROOT)): packages_of(path) & FORBIDDEN[package] for path in files}
    for path in STORES & found.keys():
        found[path] -= {"pyarrow"}
    assert not {path: names for path, names in found.items() if names}


def test_no_files_import_each_other_in_a_circle(graph: Graph) -> None:
    assert "patches.method" in graph["patches.methods"]  # imports are found, in functions and under TYPE_CHECKING too
    assert circle(graph) == []


def test_predicting_loads_no_cluster_and_importing_patches_no_torchvision_either() -> None:
    code = """
import sys, patches, torch
found = lambda *names: [name for name in names if name in sys.modules]
cluster = ("ray", "mlflow", "multitask", "pyarrow", "pandas")
print(found(*cluster, "torchvision"))
export = patches.open_export("tests/data/v0_1/finished/export")
answers = export.predict([torch.zeros(3, 9, 9, dtype=torch.uint8)], task="pets_8")
print(found(*cluster), len(answers))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[] 1"]


def test_engines_reach_the_cluster_and_its_time_through_the_interface_alone() -> None:
    """Otherwise they would not run on the simulation unchanged. `interface.py` has Ray's cluster as a default."""
    files = sorted((ROOT / "multitask" / "engines").rglob("*.py"))
    forbidden = ("ray", "time", "threading", "torch.distributed", "multitask.cluster.ray_", "multitask.cluster.session")
    found = {(path.name, module) for path in files for module, _ in imported(path) if module.startswith(forbidden)}
    assert {(name, module) for name, module in found if module != "ray.exceptions"} == {
        ("interface.py", "multitask.cluster.ray_cluster"),
        ("interface.py", "time"),
    }


def test_rooms_import_each_other_in_no_circle(graph: Graph) -> None:
    found = rooms(graph)
    assert {"patches", "engines", "server", "run", "jobs"} <= found.keys()
    assert not circle(found)


def test_no_room_imports_a_room_that_the_page_draws_above_it(graph: Graph) -> None:
    """The floors are those of the page, so that an arrow upwards is found before anybody draws it anew."""
    lines = [line.split() for line in PAGE.read_text(encoding="utf-8").splitlines()]
    floor = {line[1]: int(line[0]) for line in lines if len(line) > 1 and line[0].isdigit()}
    found = rooms(graph)
    assert found.keys() <= floor.keys()
    upwards = [f"{room} -> {other}" for room in found for other in found[room] if floor[other] >= floor[room]]
    assert not upwards


def test_the_page_shows_the_drawing_of_today() -> None:
    assert f"```\n{drawing()}\n```" in PAGE.read_text(encoding="utf-8"), (
        "docs/architecture.md shows other rooms, floors or arrows than the code has. Put the output of "
        "`python -m tests.imports` in the place of its first drawing under 'Rooms and floors'."
    )


def test_only_jobs_imports_from_multitask_itself(graph: Graph) -> None:
    """`multitask` hands out names of many rooms: an import from it would hide an arrow."""
    assert [name for name, others in graph.items() if "multitask" in others and not name.startswith("jobs")] == []


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yield name and number of lines of each function and method of a file, without its decorators."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


def test_files_are_short() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert not {path: number for path, number in lines.items() if number >= FILE_LINES}


def test_functions_are_short() -> None:
    found = dict(function for path in sources() for function in functions(path))
    assert len(found) > 1000
    assert not {name: number for name, number in found.items() if number > FUNCTION_LINES}


def test_tests_reach_into_few_private_names() -> None:
    found = all_reaches()
    assert len(found) <= PRIVATE_REACHES, "\n".join(found)


# The helpers that find these things.


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("self._own = cls._own", []),
        ("_own = 1\nprint(_own)", []),
        ("print(value.__class__)", []),
        ("import multitask.worker\nmultitask.worker._x()", [(2, "_x")]),
        ("def test(fixture): assert fixture._x == fixture.y._z", [(1, "_x"), (1, "_z")]),
        ("self.crew._x = 1", [(1, "_x")]),
        ("from multitask.worker import _x, y", [(1, "_x")]),
        ("from tests.helpers import _x", []),
        ("monkeypatch.setattr(module, '_x', 1)", [(1, "_x")]),
        ("monkeypatch.setattr('multitask.worker._x', 1)", [(1, "multitask.worker._x")]),
        ("getattr(value, '_x'), patch.object(value, '_y'), getattr(value, 'z')", [(1, "_x"), (1, "_y")]),
    ],
)
def test_private_reaches_are_found(source: str, found: list[tuple[int, str]]) -> None:
    assert sorted(reaches(source)) == found


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Three rooms on three floors; two of them import inside a function or for types only."""
    for name, text in {
        "patches/__init__.py": "import torch",
        "multitask/__init__.py": "import multitask.errors",
        "multitask/errors.py": "",
        "multitask/data/__init__.py": "from multitask.data import table",
        "multitask/data/table.py": "def read():\n    from multitask.errors import Wrong",
        "multitask/run/__init__.py": "if TYPING:\n    from multitask.data import table\nfrom patches import fold",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_rooms_and_floors_follow_from_the_imports(checkout: Path) -> None:
    assert modules(checkout)["multitask.data"] == {"multitask.data.table"}
    graph = rooms(modules(checkout))
    assert graph == {"patches": set(), "errors": set(), "data": {"errors"}, "run": {"data", "patches"}}
    assert floors(graph) == {"patches": 0, "errors": 0, "data": 1, "run": 2}
    assert drawing(checkout).splitlines() == [
        "4 rooms on 3 floors, 3 arrows, all downwards, no circle",
        " 2  run        -> data patches",
        " 1  data       -> errors",
        " 0  errors",
        " 0  patches",
    ]


def test_a_circle_and_a_relative_import_are_found(checkout: Path) -> None:
    (checkout / "multitask" / "errors.py").write_text("import multitask.run")
    assert {"errors", "run", "data"} <= set(circle(rooms(modules(checkout))))
    assert "a circle" in drawing(checkout)
    (checkout / "multitask" / "errors.py").write_text("from . import run")
    with pytest.raises(ValueError, match="imports relatively"):
        modules(checkout)
