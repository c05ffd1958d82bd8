"""Images from any source as 8-bit RGB: files, videos, Pillow images, arrays, tensors, lists."""

import glob
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import UserError
from ..visualization.files import find_images
from ..visualization.images import read_image, to_rgb
from ..visualization.video import VideoReader, is_video

__all__ = ["Picture", "Pictures", "WrongPicture", "collect", "file_picture", "to_picture"]

logger = logging.getLogger(__name__)


class WrongPicture(UserError, ValueError):
    """Argument that cannot be used as an image."""


@dataclass(frozen=True)
class Picture:
    """One image, read on demand.

    Args:
        name: name in messages.
        path: file of the image; None for arrays and video frames.
        read: returns the pixels, (H, W, 3) uint8, RGB.
    """

    name: str
    path: Path | None
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Pictures:
    """Images of one source.

    Args:
        items: the images.
        total: number of images; None if unknown.
        is_one: whether the source is a single image, rather than a list of one.
        is_stream: whether the images may not fit into memory, as the frames of a video.
    """

    items: Iterable[Picture]
    total: int | None
    is_one: bool = False
    is_stream: bool = False


def collect(source: Any, channel_order: str = "RGB") -> Pictures:
    """Return the images of a source.

    Args:
        source: the path of an image, a folder or a video; a pattern such as ``"in/*.jpg"``; a
            Pillow image; an array (H, W), (H, W, C) or (B, H, W, C); a tensor (H, W), (C, H, W) or
            (B, C, H, W); a list of these, or any iterable. C is 1 (grey), 3, or 4 (with alpha,
            placed on white). Values are uint8, or floats in [0, 1].
        channel_order: channel order of arrays and tensors, "RGB" or "BGR".

    Raises:
        UserError: the source is none of these, or a path does not exist.
    """
    if channel_order not in ("RGB", "BGR"):
        raise WrongPicture(f"channel_order is {channel_order!r}; it must be 'RGB' or 'BGR'")
    if isinstance(source, str | os.PathLike):
        return _named(os.fspath(source))
    if isinstance(source, Picture):
        return Pictures([source], 1, is_one=True)
    if isinstance(source, np.ndarray | torch.Tensor) and source.ndim == 4:
        source = list(source)
    if isinstance(source, list | tuple):
        parts = [collect(part, channel_order) for part in source]
        counts = [part.total for part in parts]
        return Pictures(
            (picture for part in parts for picture in part.items),
            None if None in counts else sum(counts),
            is_stream=any(part.is_stream for part in parts),
        )
    if isinstance(source, np.ndarray | torch.Tensor | Image.Image):
        return Pictures([_held(source, channel_order, "the picture")], 1, is_one=True)
    if isinstance(source, Iterable):
        return Pictures(_each(source, channel_order), None, is_stream=True)
    raise WrongPicture(
        "expected a path, a Pillow image, an array, a tensor or a list of these, got "
        f"{type(source).__name__}"
    )


def _named(name: str) -> Pictures:
    path = Path(os.path.expanduser(name))
    if is_video(name) and os.path.isfile(path):
        reader = VideoReader.open_file(str(path))
        return Pictures(_frames(reader, path), reader.expected or None, is_stream=True)
    files = find_images([name])
    is_one = not os.path.isdir(path) and (os.path.exists(path) or not glob.has_magic(name))
    return Pictures(map(file_picture, files), len(files), is_one=is_one)


def file_picture(path: Path) -> Picture:
    """Return the image of a file without reading it."""
    return Picture(str(path), path, lambda: read_image(path))


def _frames(reader: VideoReader, path: Path) -> Iterator[Picture]:
    for number, frame in enumerate(reader, start=1):
        yield Picture(f"{path}, frame {number}", None, lambda frame=frame: frame)
    if reader.is_cut_short:
        logger.warning(f"{path} is broken: {reader.read} of {reader.expected} frames could be read")


def _each(source: Iterable, channel_order: str) -> Iterator[Picture]:
    for part in source:
        yield from collect(part, channel_order).items


def _held(source: Any, channel_order: str, name: str) -> Picture:
    return Picture(name, None, lambda: to_picture(source, channel_order))


def to_picture(source: Any, channel_order: str = "RGB") -> np.ndarray:
    """Convert an image to 8-bit RGB.

    torchvision's `to_pil_image` neither checks the range of floats nor places alpha on white.

    Args:
        source: a Pillow image, an array (H, W) or (H, W, C), or a tensor (H, W) or (C, H, W).
        channel_order: channel order of arrays and tensors, "RGB" or "BGR".

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        WrongPicture: shape, dtype or values are not those of an image.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source)
    kind = "array"
    pixels = source
    if isinstance(source, torch.Tensor):
        kind, pixels = "tensor", source.detach().cpu()
        pixels = (pixels.float() if pixels.is_floating_point() else pixels).numpy()
        if pixels.ndim == 3:
            pixels = pixels.transpose(1, 2, 0)
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.ndim not in (2, 3) or channels not in (1, 3, 4) or not pixels.size:
        shape = "(H, W, C)" if kind == "array" else "(C, H, W)"
        found = tuple(source.shape)
        raise WrongPicture(f"{kind}: expected (H, W) or {shape} with C = 1, 3 or 4, got {found}")
    pixels = _as_uint8(pixels, kind)
    if channels == 1:
        return np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, axis=2)
    if channel_order == "BGR":
        pixels = pixels[:, :, [2, 1, 0, *range(3, channels)]]
    pixels = np.ascontiguousarray(pixels)
    return to_rgb(Image.fromarray(pixels)) if channels == 4 else pixels


def _as_uint8(pixels: np.ndarray, kind: str) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind != "f":
        raise WrongPicture(f"{kind}: expected uint8 or floats in [0, 1], got {pixels.dtype}")
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0 and high <= 1):  # also true for NaN
        raise WrongPicture(
            f"{kind}: expected floats in [0, 1] or uint8, got floats from {low:g} to {high:g}"
        )
    return (pixels * 255 + 0.5).astype(np.uint8)
