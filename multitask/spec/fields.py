"""Types of a job spec's values, with the ranges that pydantic checks."""

import math
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, PlainSerializer, PlainValidator

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


Augmentation = Literal["crop_flip", "resize_crop", "flip", "color_jitter", "rand_augment"]


def _augmentations(value: Any) -> Any:
    """Return one name as it is, and several as a tuple."""
    names = [value] if isinstance(value, str) else value
    if names == ["none"]:
        return "none"
    known = get_args(Augmentation)
    allowed = f"none, or one or several of {', '.join(known)}"
    if not isinstance(names, list | tuple) or not names:
        raise ValueError(f"expected {allowed}")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"expected {allowed}, found {quoted(unknown[0])} in it")
    made = [part for name in names for part in (("resize_crop", "flip") if name == "crop_flip" else (name,))]
    if len(set(made)) < len(made):
        raise ValueError("it names a change twice; crop_flip stands for resize_crop and flip")
    return names[0] if len(names) == 1 else tuple(names)


def _class_weights(value: Any) -> Any:
    """Return a name as it is, and the weights of classes as numbers."""
    if isinstance(value, str) and value in ("none", "balanced"):
        return value
    if not isinstance(value, Mapping) or not value:
        raise ValueError("expected none, balanced, or class names and their weights, for example {cat: 2.0}")
    for name, weight in value.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (isinstance(name, str) and number and 0 < weight < math.inf):
            raise ValueError(f"the weight of class {quoted(name)} is {quoted(weight)}; expected a number above 0")
    return {name: float(weight) for name, weight in value.items()}


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
Augmentations = Annotated[
    Literal["none"] | Augmentation | tuple[Augmentation, ...],
    PlainValidator(_augmentations, json_schema_input_type=Literal["none"] | Augmentation | tuple[Augmentation, ...]),
    PlainSerializer(lambda value: value),  # pydantic's own warns of the list that it makes of a tuple
]
"""One name, or a tuple of several."""
ClassWeights = Annotated[
    Literal["none", "balanced"] | dict[str, float],
    PlainValidator(_class_weights, json_schema_input_type=Literal["none", "balanced"] | dict[str, Rate]),
]
"""A name, or class name -> weight."""
