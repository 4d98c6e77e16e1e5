"""A worker, the server, the driver and a node are lost, one after the other; `make chaos` does so for long."""

import random
from pathlib import Path

import pytest

from benchmarks import chaos
from benchmarks.chaos import (
    disturb,
    draw,
    final_bytes,
    last_bytes,
    steps_unaccounted_for,
    undisturbed,
    updates_uncounted,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize(
    ("engine", "steps_per_kill"),
    [
        # While one process is away, the others go on: the run has to be longer.
        ("async", 200),
        ("sync", 60),
    ],
)
def test_a_run_survives_whatever_it_loses_and_accounts_for_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, steps_per_kill: int
) -> None:
    """At random moments and in a random order; under `sync` no bit changes."""
    monkeypatch.setattr(chaos, "STEPS_PER_KILL", steps_per_kill)
    seed = random.randrange(1_000_000)
    print("seed", seed)
    kinds = draw(len(chaos.KINDS), seed)

    spec, run = disturb(tmp_path, {"name": engine}, kinds, seed)

    assert [kill.kind for kill in run.kills] == kinds
    assert steps_unaccounted_for(spec, run.result) == 0
    assert updates_uncounted(spec) == 0
    if engine == "sync":
        job, expected = undisturbed(spec)
        assert final_bytes(run.directory) == last_bytes(job, expected)
        for version in ("best", "last"):
            assert run.result[version]["tasks"] == expected.versions[version].metrics
