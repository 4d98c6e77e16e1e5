"""The Ray that a run starts for itself."""

import subprocess
import sys

import pytest

PUTS = """
import resource
import time

import numpy as np
import ray

from multitask.cluster.session import ray_session

values = np.ones(3_500_000, np.float32)
with ray_session():
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        reference = ray.put(values)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        del reference
        time.sleep(0.1)  # another process frees it
"""


@pytest.mark.slow
def test_new_values_take_the_memory_of_those_that_nobody_needs_any_more() -> None:
    done = subprocess.run([sys.executable, "-c", PUTS], capture_output=True, text=True, check=True)
    new_pages = [int(line) for line in done.stdout.split()]
    # The first one shows what all of them would meet.
    assert new_pages[0] > 1000
    assert sum(new_pages[1:]) < 10 * new_pages[0]
