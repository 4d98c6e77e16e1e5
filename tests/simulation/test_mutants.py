"""The faults of `tests/simulation/mutants` fit the present code."""

from pathlib import Path

import pytest

from multitask.engines import ENGINES
from tests.simulation.mutants import AnchorError, Mutant, Replacement, apply, load, mutated

ROOT = Path(__file__).parents[2]
MUTANTS = load()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_fault_fits_the_code_and_what_it_leaves_is_python(mutant: Mutant) -> None:
    for file, text in mutated(mutant, ROOT).items():
        assert text != (ROOT / file).read_text(encoding="utf-8")
        compile(text, file, "exec")


def test_there_are_enough_faults_of_both_kinds() -> None:
    assert len(MUTANTS) >= 30
    assert sum(mutant.commit is not None for mutant in MUTANTS) >= 12
    assert [mutant.number for mutant in MUTANTS] == list(range(1, len(MUTANTS) + 1))
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_each_fault_says_what_is_wrong_and_where_it_shows() -> None:
    for mutant in MUTANTS:
        assert mutant.title.endswith("."), mutant.name
        assert mutant.engines, mutant.name
        assert set(mutant.engines) <= ENGINES.keys(), mutant.name


def test_a_copy_has_the_fault_and_the_checkout_stays_as_it_was(tmp_path: Path) -> None:
    source, target = tmp_path / "checkout", tmp_path / "copy"
    for folder in ("multitask", "patches", "jobs/__pycache__", "tests", "benchmarks"):
        (source / folder).mkdir(parents=True)
    (source / "multitask" / "one.py").write_text("one = 1\n")
    (source / "jobs" / "two.yaml").write_text("two: 2\n")
    (source / "jobs" / "__pycache__" / "three.pyc").write_bytes(b"3")
    mutant = Mutant(1, "two_for_one", "One is two.", None, ("async",), (Replacement("multitask/one.py", "= 1", "= 2"),))

    apply(mutant, source, target)

    assert {path.relative_to(target).as_posix() for path in target.rglob("*.*")} == {
        "multitask/one.py",
        "jobs/two.yaml",
    }
    assert (target / "multitask" / "one.py").read_text() == "one = 2\n"
    assert (source / "multitask" / "one.py").read_text() == "one = 1\n"


def test_a_fault_that_does_not_fit_is_named(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("one = 1\nuno = 1\n")
    mutant = Mutant(7, "two_for_one", "One is two.", None, ("async",), (Replacement("one.py", "= 1", "= 2"),))

    with pytest.raises(AnchorError, match=r"07_two_for_one: expected its old text once in one\.py, found it 2 times"):
        mutated(mutant, tmp_path)
