"""The job spec: its keys, how it is read, and the recipes that fill it in."""

from multitask.spec.errors import SpecError
from multitask.spec.reading import dump_spec, load_spec
from multitask.spec.schema import JobSpec, TaskSpec

__all__ = ["JobSpec", "SpecError", "TaskSpec", "dump_spec", "load_spec"]
