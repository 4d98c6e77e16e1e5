"""The package's error."""


class CascadeError(ValueError):
    """Predictions, costs or a cascade that cannot be used; the message says what to change."""
