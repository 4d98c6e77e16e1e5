"""Types of a job spec's values, with the ranges that pydantic checks."""

from typing import Annotated

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
"""Unknown keys are errors. The docstring under a field becomes its description in the JSON schema."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.@-]*$")]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Classes = Annotated[int, Field(ge=1, le=2**20)]
"""Number of outputs of a head. The limit keeps a slip, or a hostile request, from filling the memory."""
Pixels = Annotated[int, Field(ge=8, le=2**13)]
"""Side of an image."""
ResourceAmount = Annotated[float, Field(ge=0.0001, allow_inf_nan=False)]
LABEL = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
LabelKey = Annotated[str, Field(pattern=rf"^([A-Za-z0-9.-]+/)?{LABEL}$")]
LabelValue = Annotated[str, Field(pattern=rf"^{LABEL}$")]
