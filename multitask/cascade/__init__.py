"""Cascades: an ordered list of models with rules, in which the first model that is sure enough answers."""

from multitask.cascade.artifact import load_cascade, save_cascade, save_package
from multitask.cascade.cascade import Answers, Cascade, OperatingPoint
from multitask.cascade.checking import Check, check, fit_and_check
from multitask.cascade.costs import Costs, cost_text, count_macs, measure_latency, read_costs
from multitask.cascade.errors import CascadeError
from multitask.cascade.fitting import fit
from multitask.cascade.model import CascadeModel
from multitask.cascade.predictions import Predictions, read_predictions
from multitask.data.predictions import predictions_writer

__all__ = [
    "Answers",
    "Cascade",
    "CascadeError",
    "CascadeModel",
    "Check",
    "Costs",
    "OperatingPoint",
    "Predictions",
    "check",
    "cost_text",
    "count_macs",
    "fit",
    "fit_and_check",
    "load_cascade",
    "measure_latency",
    "predictions_writer",
    "read_costs",
    "read_predictions",
    "save_cascade",
    "save_package",
]
