"""Preprocessing: how an image of any shape becomes the input of a task's network."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

from patches.errors import PatchError
from patches.options import check_choice, check_whole, is_number
from patches.quoting import quoted, shortened

Resize = Literal["squash", "center_crop", "pad"]
"""Ways in which an image of any shape becomes a square. `resizing.resize_images` describes them."""
MOST_PIXELS = 8192
"""Largest height and width of the images that a network reads."""
INTERPOLATION = "bilinear"
"""The interpolation of every resize."""


class Framing(NamedTuple):
    """How an image of any shape becomes a square: the part of the preprocessing that changes its geometry."""

    resize: Resize = "squash"
    border: tuple[int, int, int] = (0, 0, 0)
    """Red, green and blue of the border that `pad` adds, 0 to 255. It is 0 for the other ways."""


SQUASH = Framing()
"""The framing that resizes height and width to the resolution, whatever their ratio."""


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input of a task's network.

    It is resized bilinearly with antialiasing, and then (pixel / 255 - mean) / std is computed for each channel. A
    bundle holds the preprocessing as JSON.

    Raises:
        PatchError: a value is not allowed.
    """

    resolution: int
    """Height and width of the network's input, in pixels: 2 to 8192."""
    mean: tuple[float, float, float]
    """Mean of each channel (red, green, blue), on the scale 0 to 1."""
    std: tuple[float, float, float]
    """Standard deviation of each channel, above 0, on the scale 0 to 1."""
    resize: Resize = "squash"
    """How an image that is no square becomes one."""

    def __post_init__(self) -> None:
        # torch 2.15 cannot resize uint8 images to a single pixel: an internal assertion fails.
        check_whole("resolution", self.resolution, 2, MOST_PIXELS)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not (isinstance(values, list | tuple) and len(values) == 3 and all(map(is_number, values))):
                raise PatchError(f"Option {name}={quoted(values)}: use three numbers, one for each channel.")
        if min(self.std) <= 0:
            raise PatchError(f"Option std={quoted(self.std)}: use three numbers above 0, one for each channel.")
        check_choice("resize", self.resize, get_args(Resize))
        # Tuples, so that equal preprocessings have equal hashes, whether they come from JSON or not.
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))

    @property
    def framing(self) -> Framing:
        """How an image becomes a square. With `pad`, the border has the colour that is closest to the mean."""
        if self.resize != "pad":
            return Framing(self.resize)
        red, green, blue = (round(min(255.0, max(0.0, 255 * mean))) for mean in self.mean)
        return Framing("pad", (red, green, blue))

    def as_json(self) -> dict[str, Any]:
        """Return the values in the form in which a bundle holds them.

        `squash` is left out, as in version 0.1, so that an equal patch still makes a bundle with an equal hash.
        """
        content = {
            "resolution": self.resolution,
            "interpolation": INTERPOLATION,
            "mean": list(self.mean),
            "std": list(self.std),
        }
        return content if self.resize == "squash" else content | {"resize": self.resize}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Preprocessing":
        """Read what a bundle holds. Without `resize` it is `squash`, as in version 0.1.

        Raises:
            PatchError: a value is missing, unknown or not allowed.
        """
        known = {field.name for field in fields(cls)}
        missing = {"resolution", "mean", "std"} - content.keys()
        unknown = content.keys() - known - {"interpolation"}
        if missing or unknown:
            found = f"no {', '.join(sorted(missing))}" if missing else f"also {shortened(', '.join(sorted(unknown)))}"
            raise PatchError(
                f"Preprocessing: expected resolution, mean and std, with interpolation and resize or without, found "
                f"{found}. Save the bundle with all of them, or use the version that wrote it."
            )
        if content.get("interpolation", INTERPOLATION) != INTERPOLATION:
            raise PatchError(
                f"Preprocessing: expected interpolation '{INTERPOLATION}', found {quoted(content['interpolation'])}. "
                "Use the version that wrote the bundle."
            )
        return cls(**{name: content[name] for name in known & content.keys()})
