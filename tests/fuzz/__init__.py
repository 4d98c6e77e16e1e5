"""Fuzzers: damaged and hostile files of every kind, read as a user would read them (docs/security.md)."""

import os


def cases(default: int) -> int:
    """Return the number of cases: FUZZ_CASES from the environment, or a small default."""
    return int(os.environ.get("FUZZ_CASES", default))


def is_long() -> bool:
    """Return whether this is a long run, which also checks how much time each file takes."""
    return "FUZZ_CASES" in os.environ
