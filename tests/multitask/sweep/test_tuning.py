"""The trials that Tune gets to run, without Ray."""

import os
import signal

from multitask.sweep.tuning import quiet_tune, start_order
from tests.multitask.sweep.conftest import MakeOutcome


def test_finished_trials_start_again_only_to_tell_a_scheduler(make_outcome: MakeOutcome) -> None:
    outcomes = [make_outcome(number, 50.0, state="finished" if number % 2 else "failed") for number in range(20)]

    assert start_order(outcomes, None) == list(range(0, 20, 2))
    told = start_order(outcomes, 0)
    assert sorted(told) == list(range(20))
    # The order is random, and the same at each start.
    assert told != sorted(told)
    assert told == start_order(outcomes, 0)
    assert told != start_order(outcomes, 1)


def test_a_sweep_leaves_signals_and_environment_as_they_were() -> None:
    before, environment = signal.getsignal(signal.SIGINT), dict(os.environ)

    with quiet_tune():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] == "0"

    assert signal.getsignal(signal.SIGINT) == before
    assert dict(os.environ) == environment
