"""Reads one file after another and judges what comes of it: an answer, one of the documented errors, or a fault."""

import os
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.fuzz import cases, first_seed, is_long

LONGEST_S, MOST_BYTES = 1.0, 300 * 2**20
"""Limits for the processor time and the additional memory of one small file."""
LONGEST_MESSAGE, QUOTED = 1000, 200
"""Limits in characters, for a message and for what it quotes of the file."""
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
"""Linux's files about this process. On other systems memory is not measured."""


@dataclass
class Counts:
    """What came of the cases so far."""

    kind: str
    tried: int = 0
    accepted: int = 0
    refused: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    """Where and what -> number of cases. Faults of one place in the code count as one kind."""
    slowest_s: float = 0.0
    largest_bytes: int = 0

    def __str__(self) -> str:
        return (
            f"\n{self.kind}: {self.tried:,} tried, {self.accepted:,} accepted, {self.refused:,} refused, "
            f"{self.faults.total():,} wrong; slowest {self.slowest_s:.2f} s, "
            f"largest {self.largest_bytes / 2**20:.0f} MiB"
        )


def fuzz(
    kind: str,
    default: int,
    errors: tuple[type[Exception], ...],
    make: Callable[[Random], bytes],
    read: Callable[[bytes], None],
) -> None:
    """Try files, and fail at the end if one of them was not treated as docs/security.md promises.

    The first fault of each kind is printed at once, with the command that makes and reads its file again. If a file
    ends the whole process, the first seed, which is printed at the start, leads to it.

    Args:
        kind: name of the files in the counts, which are printed at the end.
        default: number of cases, if FUZZ_CASES does not set another one.
        errors: the documented errors of the reader.
        make: makes a file from a source of random numbers.
        read: reads a file. It raises AssertionError if the file was accepted and should not have been.
    """
    counts, first = Counts(kind), first_seed()
    print(f"\n{kind}: {cases(default):,} seeds from {first}")
    try:
        for seed in range(first, first + cases(default)):
            counts.tried += 1
            try:
                data = make(Random(seed))
                refused = _judged(counts, data, errors, read)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as fault:  # a panic of a library in Rust is no Exception
                _note(counts, fault, seed)
            else:
                counts.refused += refused
                counts.accepted += not refused
    finally:
        print(counts)
    if counts.faults:
        found = "; ".join(f"{number} x {fault}" for fault, number in counts.faults.most_common())
        raise AssertionError(f"{kind}: {counts.faults.total()} of {counts.tried} files are not treated well: {found}")


def _note(counts: Counts, fault: BaseException, seed: int) -> None:
    """Count a fault. The first one of its kind is printed, with the command that repeats it."""
    place = traceback.extract_tb(fault.__traceback__)[-1]
    which = f"{type(fault).__name__} in {place.name} ({Path(place.filename).name}:{place.lineno})"
    counts.faults[which] += 1
    if counts.faults[which] == 1:
        test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
        print(f"\n{counts.kind}: {which}: {str(fault)[:LONGEST_MESSAGE]}")
        print(f"Again: FUZZ_SEED={seed} FUZZ_CASES=1 .venv/bin/python -m pytest -s '{test}'", flush=True)


def _judged(counts: Counts, data: bytes, errors: tuple[type[Exception], ...], read: Callable[[bytes], None]) -> bool:
    """Read one file; return whether it was refused."""
    message = None
    before = _begin_peak()
    start = time.process_time()
    try:
        read(data)
    except errors as error:
        message = str(error)
    seconds, grown = time.process_time() - start, _memory("VmHWM") - before
    counts.slowest_s, counts.largest_bytes = max(counts.slowest_s, seconds), max(counts.largest_bytes, grown)
    # The short run of `make test` asserts no time: there, the first file may pay for imports.
    assert seconds <= LONGEST_S or not is_long(), f"{seconds:.1f} s of processor time"
    assert grown <= MOST_BYTES, f"{grown:,} bytes more"
    if message is not None:
        assert len(message) <= LONGEST_MESSAGE, f"a message of {len(message)} characters: {message[:300]}"
        assert not quotes(message, data), f"the message quotes too much: {message}"
    return message is not None


def quotes(message: str, data: bytes) -> bool:
    """Return whether more than 200 consecutive characters of the message are in the file."""
    half = QUOTED // 2
    # Any 201 consecutive characters contain one of these parts as a whole.
    for start in range(0, len(message) - half, half):
        if message[start : start + half].encode() in data:
            for place in range(max(0, start - half - 1), start + 1):
                window = message[place : place + QUOTED + 1]
                if len(window) > QUOTED and window.encode() in data:
                    return True
    return False


def _begin_peak() -> int:
    """Let Linux forget the largest memory so far; return the present memory in bytes."""
    if CLEAR.exists():
        CLEAR.write_text("5")
    return _memory("VmRSS")


def _memory(field: str) -> int:
    if not STATUS.exists():
        return 0
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
    return 1024 * int(lines[field].split()[0])
