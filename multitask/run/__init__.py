"""A training run from its start to its end: the trainer, what it shows, and the directory that it leaves."""
