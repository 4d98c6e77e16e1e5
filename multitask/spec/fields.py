"""Types of a job spec's values, with the ranges that pydantic checks."""

import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from multitask.spec.errors import SpecError, quoted

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
"""Unknown keys and numbers that are not finite are errors. The docstring under a field becomes its description in the
JSON schema."""


def _no_switch(value: Any) -> Any:
    """Refuse true and false (also written yes and no), which Python would take for the numbers 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


def _on_the_scale_of_pixels(value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(
            "expected a number from 0 to 1, the scale of the pixels; divide numbers on the scale 0 to 255 by 255"
        )
    return value


def from_home(path: str) -> str:
    """Replace a `~` at the beginning of a path by the home directory, as a shell does.

    Raises:
        SpecError: there is no such home directory, or the `~` begins the path within a URI.
    """
    whole = os.path.expanduser(path)
    if whole.startswith("~"):
        raise SpecError(
            f"{quoted(path)} begins with ~, but this machine has no such home directory. Write the path out, or ./ "
            "before a ~ that belongs to a name"
        )
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/+~", whole):
        raise SpecError(f"~ stands for the home directory only where a path begins. Write {quoted(path)} out")
    return whole


Number = Annotated[float, BeforeValidator(_no_switch)]
Whole = Annotated[int, BeforeValidator(_no_switch)]
PathText = Annotated[str, AfterValidator(from_home)]
"""A path, in which `~` is the home directory, or a URI."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]
TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.@-]*$", max_length=100)]
Rate = Annotated[Number, Field(gt=0)]
Share = Annotated[Number, Field(ge=0, lt=1)]
Decay = Annotated[Number, Field(gt=0, lt=1)]
Amount = Annotated[Number, Field(ge=0)]
Count = Annotated[Whole, Field(ge=1)]
Classes = Annotated[Whole, Field(ge=1, le=2**20)]
"""Number of outputs of a head. The limit keeps a slip, or a hostile request, from filling the memory."""
Pixels = Annotated[Whole, Field(ge=8, le=2**13)]
"""Side of an image."""
ResourceAmount = Annotated[Number, Field(ge=0.0001)]
Pixel = Annotated[Number, AfterValidator(_on_the_scale_of_pixels)]
"""A number on the scale of the pixels, 0 to 1."""
Spread = Annotated[Pixel, Field(gt=0)]
LABEL = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
LabelKey = Annotated[str, Field(pattern=rf"^([A-Za-z0-9.-]+/)?{LABEL}$")]
LabelValue = Annotated[str, Field(pattern=rf"^{LABEL}$")]
