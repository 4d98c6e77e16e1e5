"""The error of a job spec that cannot run."""


class SpecError(ValueError):
    """A job spec that cannot run; the message names the file, the key and what is allowed."""
