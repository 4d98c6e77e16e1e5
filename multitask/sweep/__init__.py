"""Sweeps: many trainings of one job with other values of its keys, on Ray Tune, each trial a run of its own."""

from multitask.sweep.outcomes import Choice, TrialOutcome
from multitask.sweep.run import SweepResult, run_sweep
from multitask.sweep.spec import SweepSpec, load_sweep

__all__ = ["Choice", "SweepResult", "SweepSpec", "TrialOutcome", "load_sweep", "run_sweep"]
