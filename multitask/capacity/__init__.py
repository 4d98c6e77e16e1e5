"""Capacity planning: measured times of a job's steps, and an estimate of the job on a given cluster."""
