"""A training run from its start to its end: the trainer, the monitor, MLflow tracking and the run directory."""
