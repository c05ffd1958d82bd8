"""Reading image files of any format as 8-bit RGB, and writing them."""

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..errors import UserError, one_line
from ..files.writing import write_atomically

__all__ = ["read_image", "to_rgb", "write_image"]

JPEG_QUALITY = 95
# Candidates for the value of white, by the type of the pixels: the smallest that no pixel exceeds.
# If there is none, the largest pixel is white and the smallest is black.
_WHITE_OF_INTEGERS = (65535,)
_WHITE_OF_FLOATS = (1, 255, 65535)
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Read the first frame of an image file as 8-bit RGB.

    The EXIF orientation is applied, transparent images are placed on white, and palette, grey,
    CMYK and 16-bit images are converted. Detectron2's `read_image` drops transparency and clips 16
    bits.

    Args:
        path: a file of any format that Pillow opens.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        UserError: the file does not exist or cannot be decoded.
    """
    path = Path(path)
    if os.path.islink(path) and not os.path.exists(path):
        raise UserError(f"{path} is a broken link")
    if not os.path.isfile(path):
        raise UserError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged metadata and large sizes
            with Image.open(path) as image:
                image.load()
                return to_rgb(image)
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{path} is too large ({Path(path).stat().st_size} bytes hold more than "
            f"{2 * Image.MAX_IMAGE_PIXELS} pixels); make it smaller first"
        ) from error
    except Exception as error:  # each format of Pillow raises its own errors
        reason = "unknown format" if "cannot identify" in str(error) else one_line(error)[:100]
        raise UserError(f"{path} cannot be read as a picture ({reason})") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the pixels are valid even if the EXIF block is damaged
        return image


def to_rgb(image: Image.Image) -> np.ndarray:
    """Convert an image of any mode to (H, W, 3) uint8, upright and on white if transparent."""
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
    """Write an image and create its parent folders.

    Args:
        path: the suffix selects the format.
        image: (H, W, 3) uint8, RGB.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    kind = Image.registered_extensions().get(path.suffix.lower())
    try:
        picture = Image.fromarray(image)
        if kind is None:
            raise ValueError(f"unknown file extension: {path.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: picture.save(file, kind, quality=JPEG_QUALITY))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written ({one_line(error)}); see --output") from error
