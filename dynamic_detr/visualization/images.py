"""Pictures of any kind that people have, read as 8-bit RGB; and pictures written."""

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..errors import UserError, one_line

__all__ = ["read_image", "to_rgb", "write_image"]

JPEG_QUALITY = 95
# What is white, by the kind of number that the file holds: the least of these that no value
# exceeds. Other values have no customary white, and their own range is used.
_WHITE_OF_INTEGERS = (65535,)
_WHITE_OF_FLOATS = (1, 255, 65535)
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Reads a picture as a person sees it.

    Turned as its EXIF orientation says; what is transparent lies on white; palettes, grey, CMYK
    and 16 bits become RGB of 8 bits. Of several frames or pages, the first.

    Args:
        path: a file of any format that Pillow opens.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        UserError: there is no such file, or it is not a whole picture.
    """
    path = Path(path)
    if os.path.islink(path) and not os.path.exists(path):
        raise UserError(f"{path} is a link to nothing")
    if not os.path.isfile(path):
        raise UserError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata, and sizes short of the limit
            with Image.open(path) as image:
                image.load()
                return to_rgb(image)
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{path} is too large ({Path(path).stat().st_size} bytes hold more than "
            f"{2 * Image.MAX_IMAGE_PIXELS} pixels); make it smaller first"
        ) from error
    except Exception as error:  # every format of Pillow has its own errors
        reason = "unknown format" if "cannot identify" in str(error) else one_line(error)[:100]
        raise UserError(f"{path} cannot be read as a picture ({reason})") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return image


def to_rgb(image: Image.Image) -> np.ndarray:
    """Pixels of an image of any mode, upright, what is transparent on white: (H, W, 3) uint8."""
    image = _upright(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return np.repeat(_to_eight_bits(image)[..., None], 3, axis=2)
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _to_eight_bits(image: Image.Image) -> np.ndarray:
    values = np.asarray(image).astype(np.float32)
    values = np.where(np.isfinite(values), values, 0)
    low, high = float(values.min()), float(values.max())
    for white in _WHITE_OF_FLOATS if image.mode == "F" else _WHITE_OF_INTEGERS:
        if low >= 0 and high <= white:
            low, high = 0, white
            break
    return ((values - low) * (255 / max(high - low, 1e-12)) + 0.5).astype(np.uint8)


def write_image(path: str | os.PathLike, image: np.ndarray) -> None:
    """Writes a picture, and the folders above it.

    Args:
        path: its suffix says the format.
        image: (H, W, 3) uint8, RGB.

    Raises:
        UserError: it cannot be written there.
    """
    path = Path(path)
    aside = path.with_name(f".part.{path.name}")  # a stop leaves no half of a picture behind
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(aside, quality=JPEG_QUALITY)
        os.replace(aside, path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written ({one_line(error)}); see --output") from error
