"""The JSON of a cascade: what is written for a cascade, and the cascade that a JSON of any origin describes."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from multitask.cascade.cascade import Cascade, OperatingPoint
from multitask.cascade.costs import Costs
from multitask.cascade.errors import CascadeError
from multitask.cascade.greedy import Stage
from multitask.cascade.rules import FEATURES
from patches.backbone import is_identity
from patches.quoting import quoted, shortened

FORMAT = 1
"""Version of the JSON."""
MOST_IMAGES = 1 << 53
"""Largest number of images. Floats hold whole numbers up to here."""
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, config=STRICT)
class PlainCosts:
    """Costs in the form of the JSON, which has no pairs as keys."""

    unit: str
    alone: dict[str, float]
    shared: tuple[tuple[str, str, float], ...]


@dataclass(frozen=True, config=STRICT)
class PlainPoint:
    """An operating point, with two numbers that follow from its stages and are there for readers of the file."""

    relative_accuracy: float
    accuracy: float
    mean_cost: float
    stages: tuple[Stage, ...]


@dataclass(frozen=True, config=STRICT)
class Document:
    """Everything that the JSON of a cascade or of a package holds."""

    format: int
    reference: str
    slack: float
    asked: int
    points: tuple[PlainPoint, ...]
    costs: PlainCosts
    latency: PlainCosts | None
    fitted_on: tuple[str, ...]
    backbone: dict[str, Any] | None = None
    """`Backbone.identity` of the backbone. Only in a package."""
    bundles: dict[str, str] | None = None
    """Model -> payload hash of its bundle. Only in a package."""

    def cascade(self) -> Cascade:
        """Return the cascade.

        Raises:
            CascadeError: parts of the JSON contradict each other.
        """
        cascade = Cascade(
            points=tuple(OperatingPoint(point.relative_accuracy, point.stages) for point in self.points),
            asked=self.asked,
            reference=self.reference,
            costs=_costs(self.costs),
            slack=self.slack,
            latency=None if self.latency is None else _costs(self.latency),
            fitted_on=self.fitted_on,
        )
        if self.backbone is not None and not is_identity(self.backbone):
            raise CascadeError(f"the backbone {quoted(self.backbone)} lacks its name, its options or its content hash")
        if not 0 <= cascade.asked < len(cascade.points):
            raise CascadeError(f"point {quoted(cascade.asked)} of {len(cascade.points)} is the one that was asked for")
        for point in cascade.points:
            _check_point(point, cascade)
        return cascade


_ADAPTER = TypeAdapter(Document)


def describe(cascade: Cascade) -> dict[str, Any]:
    """Return the cascade in the form of its JSON."""
    return {
        "format": FORMAT,
        "reference": cascade.reference,
        "slack": cascade.slack,
        "asked": cascade.asked,
        "points": [
            {
                "relative_accuracy": point.relative_accuracy,
                "accuracy": point.accuracy,
                "mean_cost": point.mean_cost,
                "stages": [asdict(stage) for stage in point.stages],
            }
            for point in cascade.points
        ],
        "costs": _plain_costs(cascade.costs),
        "latency": None if cascade.latency is None else _plain_costs(cascade.latency),
        "fitted_on": list(cascade.fitted_on),
    }


def understand(content: Mapping[str, Any]) -> Document:
    """Return the content of a JSON as a document, after checking every type.

    Raises:
        CascadeError: an entry is missing, unknown or of another type.
    """
    try:
        # Only from JSON does pydantic's strict mode take lists as tuples.
        return _ADAPTER.validate_json(json.dumps(content))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise CascadeError(f"{shortened(problem['msg'])} at {quoted(place)}") from error


def _plain_costs(costs: Costs) -> dict[str, Any]:
    shared = [[one, other, cost] for (one, other), cost in costs.shared.items()]
    return {"unit": costs.unit, "alone": dict(costs.alone), "shared": shared}


def _costs(found: PlainCosts) -> Costs:
    costs = Costs(found.unit, found.alone, {(one, other): cost for one, other, cost in found.shared})
    for (one, other), cost in costs.shared.items():
        if not 0 <= cost <= min(found.alone.get(one, -1), found.alone.get(other, -1)):
            raise CascadeError(f"models {quoted(one)} and {quoted(other)} share more than one of them costs")
    return costs


def _check_point(point: OperatingPoint, cascade: Cascade) -> None:
    """Check that the stages of an operating point are whole and that every model has its costs.

    Raises:
        CascadeError: they contradict each other.
    """
    last = len(point.stages) - 1
    for number, stage in enumerate(point.stages):
        rule = stage.rule
        if (stage.threshold is None) != (number == last):
            raise CascadeError(
                f"stage {number} of a point has threshold {stage.threshold}, but the last stage, and it alone, has no "
                "threshold"
            )
        # A stage may be right on more images than it answers: such cascades were made by hand with version 0.1.
        if not (0 <= stage.right <= MOST_IMAGES and 0 <= stage.answered <= MOST_IMAGES):
            raise CascadeError(f"stage {number} of a point answers less than 0 images, or more than {MOST_IMAGES}")
        if rule.temperature <= 0 or (rule.score == "predictor" and len(rule.weights) != len(FEATURES)):
            raise CascadeError(f"stage {number} of a point has the ill-formed rule {quoted(rule)}")
        for costs in (cascade.costs, cascade.latency):
            if costs is not None and stage.model not in costs.alone:
                raise CascadeError(f"model {quoted(stage.model)} has no cost")
    if not sum(stage.answered for stage in point.stages):
        raise CascadeError("a point has no stages, or they answer no image")
    if min(stage.cost for stage in point.stages) < 0 or not math.isfinite(point.worst_cost * point.images):
        raise CascadeError("a stage costs less than 0, or all stages together cost too much to be added up")
