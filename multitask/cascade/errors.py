"""The error of all modules in this package."""


class CascadeError(ValueError):
    """Predictions, costs or a cascade cannot be used. The message says what to change."""
