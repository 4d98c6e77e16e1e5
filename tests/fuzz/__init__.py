"""Fuzzers: damaged and hostile files of every kind, read as a user would read them (docs/security.md)."""

import os
from random import SystemRandom


def cases(default: int) -> int:
    """Return the number of cases: FUZZ_CASES from the environment, or a small default."""
    return int(os.environ.get("FUZZ_CASES", default))


def is_long() -> bool:
    """Return whether this is a long run, which also checks how much time each file takes."""
    return "FUZZ_CASES" in os.environ


def first_seed() -> int:
    """Return the seed of the first file; the next files have the next seeds.

    It is FUZZ_SEED from the environment. Without it, a long run tries other files each time, and `make test` the same.
    """
    if "FUZZ_SEED" in os.environ:
        return int(os.environ["FUZZ_SEED"])
    return SystemRandom().randrange(2**63) if is_long() else 0
