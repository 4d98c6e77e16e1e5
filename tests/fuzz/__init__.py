"""Fuzzers: files that chance has changed are read as they were, or refused with a documented error."""

import os


def cases(default: int) -> int:
    """Return the number of cases: FUZZ_CASES from the environment, or a small default."""
    return int(os.environ.get("FUZZ_CASES", default))
