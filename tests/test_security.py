"""Nothing that is read can run code: no pickles, no YAML tags, no `eval`."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RISKY = {
    *(f"{module}.{name}" for module in ("pickle", "cloudpickle", "dill", "joblib") for name in ("load", "loads")),
    "pickle.Unpickler",
    *(f"yaml.{name}" for name in ("load", "load_all", "unsafe_load", "full_load", "unsafe_load_all", "full_load_all")),
    "eval",
    "exec",
}
TORCH_READERS = (".load_state_dict_from_url", ".get_state_dict")
"""As `torch.load` they unpickle unless `weights_only` is True; the last one is that of torchvision's weights."""


def risky(source: str) -> Iterator[str]:
    """What in a source text may run what is read: calls, and imports that would hide such a call's full name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            if any(f"{node.module}.{alias.name}" in {*RISKY, "torch.load"} for alias in node.names):
                yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            of_torch = name == "torch.load" or name.endswith(TORCH_READERS)
            unsafe_torch = of_torch and options.get("weights_only") != "True"
            if name in RISKY or unsafe_torch or options.get("allow_pickle") == "True":
                yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("package", ["patches", "multitask", "jobs"])
def test_no_code_reads_what_could_run_code(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = {str(path.relative_to(ROOT)): list(risky(path.read_text(encoding="utf-8"))) for path in files}
    assert not {path: calls for path, calls in found.items() if calls}


@pytest.mark.parametrize(
    "line",
    [
        "pickle.loads(x)",
        "from pickle import loads",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "weights.get_state_dict(progress=False)",
        "yaml.load(x, Loader)",
        "np.load(x, allow_pickle=True)",
        "eval(x)",
    ],
)
def test_such_a_line_would_be_found(line: str) -> None:
    assert len(list(risky(line))) == 1


def test_readers_of_tensors_and_plain_yaml_are_left_alone() -> None:
    assert not list(
        risky("torch.load(x, weights_only=True), yaml.safe_load(x), safetensors.torch.load(x), model.eval()")
    )
