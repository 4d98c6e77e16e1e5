"""A worker, the server, the driver and a node are lost at random moments; `make chaos` does so for long."""

import random
from pathlib import Path

import pytest

from benchmarks.chaos import disturb, final_bytes, steps_unaccounted_for, undisturbed, updates_uncounted

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("engine", "lost"),
    [
        ("async", ["server", "node"]),
        ("sync", ["worker", "driver"]),
    ],
)
def test_a_run_survives_what_it_loses_and_accounts_for_every_step(tmp_path: Path, engine: str, lost: list[str]) -> None:
    seed = random.randrange(1_000_000)
    print("seed", seed)
    kinds = random.Random(seed).sample(lost, len(lost))

    spec, run = disturb(tmp_path, {"name": engine}, kinds, seed)

    assert [kill.kind for kill in run.kills] == kinds
    assert steps_unaccounted_for(spec, run.result) == 0
    assert updates_uncounted(spec) == 0
    if engine == "sync":
        assert final_bytes(run.directory) == undisturbed(spec)
