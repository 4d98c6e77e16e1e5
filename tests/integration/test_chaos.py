"""One of everything is lost, at random moments of one run; `make chaos` does so for long."""

import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos import KINDS, disturb, final_bytes, steps_unaccounted_for, undisturbed

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("engine", [{"name": "async"}, {"name": "sync"}], ids=lambda engine: engine["name"])
def test_a_run_survives_the_loss_of_a_worker_the_server_the_driver_and_a_node(
    tmp_path: Path, engine: dict[str, Any]
) -> None:
    seed = random.randrange(1_000_000)
    print("seed", seed)
    kinds = random.Random(seed).sample(KINDS, len(KINDS))

    spec, run = disturb(tmp_path, engine, kinds, seed)

    assert [kill.kind for kill in run.kills] == kinds
    assert steps_unaccounted_for(spec, run.result) == 0
    if engine["name"] == "sync":
        assert final_bytes(run.directory) == undisturbed(spec)
