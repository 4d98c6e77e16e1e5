"""The harness itself: it goes on after a fault, names what repeats it, and fails at the end; what makes the files."""

import copy
import json
from random import Random

import pytest

from tests.fuzz.damage import OTHERS, edit
from tests.fuzz.harness import fuzz
from tests.fuzz.specs import has_a_key_twice


class DocumentedError(Exception):
    """The error of the reader."""


class PanicError(BaseException):
    """What a library in Rust raises: no Exception."""


def make(random: Random) -> bytes:
    return b"%d" % random.randrange(4)


def read(data: bytes) -> None:
    """Accept 0, refuse 1, and treat 2 and 3 as no reader should."""
    if data == b"1":
        raise DocumentedError("one")
    if data == b"2":
        raise KeyError("two")
    if data == b"3":
        raise PanicError("three")


@pytest.fixture
def forty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUZZ_CASES", "40")
    monkeypatch.setenv("FUZZ_SEED", "7")


@pytest.mark.usefixtures("forty")
def test_faults_are_counted_and_end_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    files = [make(Random(seed)) for seed in range(7, 47)]
    accepted, refused, wrong = (sum(file in kinds for file in files) for kinds in ([b"0"], [b"1"], [b"2", b"3"]))
    assert min(accepted, refused, wrong) > 1

    with pytest.raises(AssertionError, match=rf"numbers: {wrong} of 40 files .*KeyError in read") as failed:
        fuzz("numbers", 5, (DocumentedError,), make, read)

    assert "PanicError in read" in str(failed.value)
    assert f"40 tried, {accepted} accepted, {refused} refused, {wrong} wrong" in capsys.readouterr().out


@pytest.mark.usefixtures("forty")
def test_the_first_fault_of_each_kind_is_printed_with_its_seed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AssertionError):
        fuzz("numbers", 5, (DocumentedError,), make, read)
    printed = capsys.readouterr().out.splitlines()

    assert printed[1] == "numbers: 40 seeds from 7"
    again = [line for line in printed if line.startswith("Again: ")]
    assert len(again) == 2
    for line, kind in zip(again, ("KeyError", "PanicError"), strict=True):
        assert __name__.rpartition(".")[2] in line
        seed = line.partition("FUZZ_SEED=")[2].partition(" ")[0]
        monkeypatch.setenv("FUZZ_SEED", seed)
        monkeypatch.setenv("FUZZ_CASES", "1")
        with pytest.raises(AssertionError, match=rf"1 of 1 files .*1 x {kind}"):
            fuzz("numbers", 5, (DocumentedError,), make, read)


def test_the_same_files_are_tried_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUZZ_CASES", raising=False)
    monkeypatch.delenv("FUZZ_SEED", raising=False)
    tried: list[list[bytes]] = [[], []]
    for files in tried:
        fuzz("numbers", 5, (), lambda random: b"%d" % random.getrandbits(64), files.append)
    assert tried[0] == tried[1]
    assert len(set(tried[0])) == 5


def test_a_changed_tree_holds_no_part_of_itself_and_no_part_of_another() -> None:
    before = copy.deepcopy(OTHERS[3:7])
    for seed in range(300):
        random, tree = Random(seed), {"a": [1], "b": {"c": 2}}
        for _ in range(10):
            edit(random, tree)
        json.dumps(tree)
    assert OTHERS[3:7] == before


def test_a_tab_between_two_values_is_no_fault() -> None:
    assert not has_a_key_twice(b'{"a": 1\t, "b": \t2}')
    assert has_a_key_twice(b'{"a": 1\t, "a": 2}')
