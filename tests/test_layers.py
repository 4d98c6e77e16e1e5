"""Imports only run downwards: jobs -> multitask -> patches."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.imports import circle, modules

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "patches": {"multitask", "jobs", "ray", "mlflow", "pyarrow", "pydantic"},
    "multitask": {"jobs"},
}
STORES = {"patches/features.py"}
"""May read and write Arrow files, and is imported by nothing that `import patches` imports."""


def imported(path: Path) -> set[str]:
    """Top-level packages that the file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("package", list(FORBIDDEN))
def test_no_import_runs_upwards(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = {str(path.relative_to(ROOT)): imported(path) & FORBIDDEN[package] for path in files}
    for path in STORES & found.keys():
        found[path] -= {"pyarrow"}
    assert not {path: names for path, names in found.items() if names}


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = modules()
    assert "patches.method" in graph["patches.methods"]  # imports are found, in functions and under TYPE_CHECKING too
    assert circle(graph) == []


def test_importing_patches_loads_no_cluster_and_no_torchvision() -> None:
    names = ("ray", "mlflow", "torchvision", "multitask", "pyarrow")
    code = f"import sys, patches; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
