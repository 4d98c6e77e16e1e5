"""Fuzzers: damaged and hostile files of every kind, read as a user would read them (docs/security.md)."""

import os


def cases(default: int) -> int:
    """Return the number of cases: FUZZ_CASES from the environment, or a small default."""
    return int(os.environ.get("FUZZ_CASES", default))
