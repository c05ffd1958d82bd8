"""Contact sheets: a grid of images with titles."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["contact_sheet"]

GAP = 8  # pixels between images
INK = (32, 32, 32)


def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # ships a font, so titles look the same on every system

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size)


def _write_title(draw: ImageDraw.ImageDraw, text: str, center: tuple[float, float], box) -> None:
    """Draw a centred title in the largest size that fits into the box (width, height)."""
    width, height = box
    for size in range(max(round(height * 0.6), 6), 5, -1):
        font = _font(size)
        if draw.textlength(text, font) <= width:
            break
    draw.text(center, text, INK, font, anchor="mm")


def contact_sheet(
    images: Sequence[np.ndarray], columns: int, titles: Sequence[str] | None = None
) -> np.ndarray:
    """Arrange images in a grid, row by row, without scaling them.

    torchvision's `make_grid` needs images of one size and has no titles.

    Args:
        images: (H, W, 3) uint8 each, RGB; each is centred in a cell of the largest size.
        columns: number of images in a row, at least 1.
        titles: one per image, drawn above it.

    Returns:
        (H', W', 3) uint8, RGB.

    Raises:
        ValueError: there are no images or no columns, or the number of titles differs.
    """
    if not images or columns < 1:
        raise ValueError(
            f"expected images and columns, got {len(images)} images and {columns} columns"
        )
    if titles is not None and len(titles) != len(images):
        raise ValueError(
            f"expected one title per image, got {len(titles)} for {len(images)} images"
        )
    cell_height = max(image.shape[0] for image in images)
    cell_width = max(image.shape[1] for image in images)
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    title_height = 0 if titles is None else min(max(cell_width // 12, 24), 48)
    step_x, step_y = cell_width + GAP, cell_height + title_height + GAP
    size = (columns * step_x + GAP, rows * step_y + GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        left = GAP + index % columns * step_x
        top = GAP + index // columns * step_y
        if titles is not None:
            center = (left + cell_width / 2, top + title_height / 2)
            _write_title(draw, titles[index], center, (cell_width, title_height))
        height, width = image.shape[:2]
        corner = (
            left + (cell_width - width) // 2,
            top + title_height + (cell_height - height) // 2,
        )
        sheet.paste(Image.fromarray(image), corner)
    return np.asarray(sheet)
