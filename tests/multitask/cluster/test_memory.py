"""A process that trains keeps the memory that it frees."""

import os
import subprocess
import sys

import pytest

from multitask.cluster.memory import FOR_ALL_THREADS

FAULTS = """
import resource
import threading
import torch
import multitask.engines  # as in a process that trains: its heap looks different when little was imported
from multitask.cluster.memory import keep_freed_memory

def step():
    kept = [torch.ones(size) for size in (30_000_000, 3_000_000, 500_000)]

def faults():
    for _ in range(5):  # aligned blocks of one size leave gaps that only the next ones fit
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

"""
PAGES = 4 * 33_500_000 // 4096
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")


def page_faults_of_a_step(ending: str, **variables: str) -> list[int]:
    """Return the numbers that a program prints at its end: page faults of a step."""
    around = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | variables
    done = subprocess.run([sys.executable, "-c", FAULTS + ending], env=around, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


IN_A_THREAD = "thread = threading.Thread(target=faults)\nthread.start()\nthread.join()\n"


def test_a_step_takes_the_memory_of_the_one_before_in_the_thread_that_asks_for_it() -> None:
    before, in_a_thread, after = page_faults_of_a_step(f"faults()\n{IN_A_THREAD}keep_freed_memory()\nfaults()")
    assert min(before, in_a_thread) > PAGES / 2
    assert after < PAGES / 20


def test_in_every_thread_of_a_process_that_started_with_the_variables() -> None:
    """Without them it would take new memory: see `in_a_thread` above."""
    assert page_faults_of_a_step(IN_A_THREAD, **FOR_ALL_THREADS)[0] < PAGES / 20
