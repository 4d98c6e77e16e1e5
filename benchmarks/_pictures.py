"""Generated pictures: JPEGs of 500 x 375 pixels and 100 to 120 kB, the mean of ImageNet, and small noisy PNGs."""

import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

HEIGHT, WIDTH = 375, 500
LEAST_BYTES, MOST_BYTES = 100_000, 120_000
OCTAVES = (4, 8, 16, 32, 64, 128)
"""Cells of noise across the picture, by octave. As in nature, each octave has half the contrast of the one before."""
CONTRAST, COLOUR = 45.0, 0.3
"""Standard deviation of the first octave (of 255), and the share of it that differs between channels."""
GRAIN = (10, 18)
"""Range of the standard deviation of the noise of single pixels: fine texture and the noise of the camera."""
SHAPES = 6
QUALITY = (75, 99)


def make_jpegs(count: int, seed: int = 0) -> list[bytes]:
    """Return generated JPEGs. A seed gives the same pictures whatever their number."""
    return [jpeg(picture(np.random.default_rng([seed, number]))) for number in range(count)]


def picture(random: np.random.Generator) -> NDArray[np.uint8]:
    """Return a picture of weakly coloured clouds with a few flat shapes in front: shape (375, 500, 3)."""

    def noise(*shape: int) -> NDArray[np.float32]:
        return random.standard_normal(shape, dtype=np.float32)

    image_chw = np.full((3, HEIGHT, WIDTH), random.uniform(80, 170, (3, 1, 1)), np.float32)
    for octave, cells in enumerate(OCTAVES):
        grid_chw = torch.from_numpy(noise(1, cells * 3 // 4, cells) + COLOUR * noise(3, cells * 3 // 4, cells))
        clouds_nchw = interpolate(grid_chw[None], (HEIGHT, WIDTH), mode="bilinear")
        image_chw += CONTRAST * 0.5**octave * clouds_nchw[0].numpy()
    y, x = np.ogrid[:HEIGHT, :WIDTH]
    for _ in range(SHAPES):
        across = np.abs(y - random.uniform(0, HEIGHT)) / random.uniform(10, 90)
        along = np.abs(x - random.uniform(0, WIDTH)) / random.uniform(10, 90)
        inside = across**2 + along**2 < 1 if random.random() < 0.5 else np.maximum(across, along) < 1
        image_chw[:, inside] = 0.5 * image_chw[:, inside] + random.uniform(0, 128, (3, 1))
    image_chw += random.uniform(*GRAIN) * noise(1, HEIGHT, WIDTH)
    return np.ascontiguousarray(image_chw.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def jpeg(image_hwc: NDArray[np.uint8]) -> bytes:
    """Encode the picture at a quality that brings its size into the range."""
    image = Image.fromarray(image_hwc)
    low, high = QUALITY
    while low < high:
        quality = (low + high) // 2
        file = io.BytesIO()
        image.save(file, "jpeg", quality=quality)
        if LEAST_BYTES <= file.tell() <= MOST_BYTES:
            return file.getvalue()
        low, high = (quality + 1, high) if file.tell() < LEAST_BYTES else (low, quality)
    raise AssertionError(f"no quality of {QUALITY} gives {LEAST_BYTES} to {MOST_BYTES} bytes")


def noise_png(random: np.random.Generator, size: int = 32) -> bytes:
    """Return a PNG of size x size pixels of noise, which takes a step little time to read."""
    file = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (size, size, 3), np.uint8)).save(file, "png")
    return file.getvalue()
