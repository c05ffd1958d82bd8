"""Synthetic scenes: textured shapes among textured clutter, with exact boxes and areas.

A scene is a pure function of (seed, family, split, index). Only the outline determines the class:
objects, clutter and background have colours and textures from the same distributions. A minimum
contrast between an object and its surroundings keeps every outline visible.

Outlines are drawn on a fine grid of ``SUPERSAMPLE`` points per pixel and side. Pixels are averages
over this grid (antialiasing); boxes and areas are exact to a quarter of a pixel. As in COCO, they
cover the visible part of an object.
"""

from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["FAMILIES", "SceneFamily", "SceneOptions", "draw_scene"]

RECIPE = 2  # version: any change to the pixels or boxes of a scene increments it
SUPERSAMPLE = 4
SPLITS = ("train", "val")

Outline = tuple[np.ndarray, np.ndarray | None]  # polygon (P, 2) and the hole in it, arbitrary units
Window = tuple[slice, slice]  # rows, columns


def _arc(start: float, stop: float, radius: float = 1.0, points: int = 48) -> np.ndarray:
    angle = np.linspace(start, stop, points)
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _spokes(radii: list[float]) -> np.ndarray:
    angle = 2 * np.pi * np.arange(len(radii)) / len(radii)
    return np.array(radii)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _cross() -> np.ndarray:
    a = 0.3
    quarter = np.array([(1, -a), (1, a), (a, a)])
    turn = np.array([(0, 1), (-1, 0)])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 64)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, y], axis=1)


def _crescent() -> np.ndarray:
    outer = _arc(np.pi / 3, 2 * np.pi - np.pi / 3)
    bite = _arc(2 * np.pi - 1.9, 1.9, radius=outer[0, 1] / np.sin(1.9))
    return np.concatenate([outer, bite + (outer[0] - bite[-1])])


def _arrow() -> np.ndarray:
    upper = [(-1, 0.22), (0.1, 0.22), (0.1, 0.75), (1, 0)]
    return np.array(upper + [(x, -y) for x, y in upper[-2::-1]])


@dataclass(frozen=True)
class SceneFamily:
    """Classes of one dataset."""

    name: str
    code: int  # part of the random seed
    outlines: dict[str, Outline]  # by class name
    images: dict[str, int]  # default number of scenes by split

    @property
    def classes(self) -> list[str]:
        return list(self.outlines)


_SHAPES: dict[str, Outline] = {
    "disc": (_arc(0, 2 * np.pi), None),
    "square": (_spokes([1.0] * 4), None),
    "triangle": (_spokes([1.0] * 3), None),
    "star": (_spokes([1.0, 0.42] * 5), None),
    "ring": (_arc(0, 2 * np.pi), _arc(0, 2 * np.pi, radius=0.58)),
    "cross": (_cross(), None),
}
_SYMBOLS: dict[str, Outline] = {
    "heart": (_heart(), None),
    "crescent": (_crescent(), None),
    "arrow": (_arrow(), None),
    "hourglass": (
        np.array([(-0.8, 1), (0.8, 1), (0.14, 0), (0.8, -1), (-0.8, -1), (-0.14, 0)]),
        None,
    ),
}
FAMILIES = {
    "shapes": SceneFamily("shapes", 0, _SHAPES, {"train": 6000, "val": 300}),
    "symbols": SceneFamily("symbols", 1, _SYMBOLS, {"train": 400, "val": 150}),
}


@dataclass(frozen=True)
class SceneOptions:
    """Appearance of scenes.

    Args:
        sizes: candidates for (width, height) of a scene in pixels.
        min_object: longer side of the smallest object, pixels.
        max_object: longer side of the largest object, as a fraction of the image's shorter side.
        max_objects: largest number of objects in a scene; the smallest is 1.
        min_visible: smallest visible fraction of an object, inside the image and not occluded.
        min_contrast: RGB distance (0-255 per channel) between an object and its surroundings.
    """

    sizes: tuple[tuple[int, int], ...] = ((128, 128),)
    min_object: float = 10.0
    max_object: float = 0.5
    max_objects: int = 5
    min_visible: float = 0.5
    min_contrast: float = 70.0

    def __post_init__(self) -> None:
        for width, height in self.sizes:
            if min(width, height) * self.max_object < self.min_object:
                raise ValueError(
                    f"scenes of {width}x{height} pixels are too small for objects of "
                    f"{self.min_object:g} pixels; use at least "
                    f"{int(np.ceil(self.min_object / self.max_object))} pixels a side"
                )

    def to_dict(self) -> dict:
        return {**asdict(self), "sizes": [list(size) for size in self.sizes]}


def _smooth_noise(rng: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
    """Return noise in about [-1, 1] with features of ``cell`` pixels, (height, width) float32."""
    grid = (int(np.ceil(width / cell)) + 3, int(np.ceil(height / cell)) + 3)
    noise = Image.fromarray(rng.uniform(-1.3, 1.3, grid[::-1]).astype(np.float32))
    box = (1.0, 1.0, 1.0 + width / cell, 1.0 + height / cell)
    return np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC, box=box))


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a random pattern with values in [-1, 1], (height, width) float32."""
    angle, kind = rng.uniform(0, 2 * np.pi), rng.integers(5)
    period = float(np.exp(rng.uniform(np.log(5), np.log(30))))
    if kind in (0, 3, 4):  # coordinates along and across the pattern, pixels
        c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        y = np.arange(height, dtype=np.float32)[:, None]
        x = np.arange(width, dtype=np.float32)[None, :]
        u, v = x * c + y * s, y * c - x * s
        phase = 2 * np.pi / period
    if kind == 0:  # gradient
        pattern = 2 * (u - u.min()) / max(float(np.ptp(u)), 1.0) - 1
    elif kind == 1:  # coarse noise
        pattern = _smooth_noise(rng, height, width, period)
    elif kind == 2:  # fine on coarse noise
        coarse = _smooth_noise(rng, height, width, period + 8)
        pattern = 0.6 * coarse + 0.6 * _smooth_noise(rng, height, width, 2.5)
    elif kind == 3:  # stripes
        pattern = 2 * np.sin(u * phase)
    else:  # checkers
        pattern = 4 * np.sin(u * phase) * np.sin(v * phase)
    return np.clip(pattern, -1, 1, dtype=np.float32)


def _paint(rng: np.random.Generator, height: int, width: int, colour: np.ndarray) -> np.ndarray:
    """Return a texture with a mean of about ``colour``, (height, width, 3) float32 in 0-255."""
    swing = rng.normal(size=3)
    swing *= rng.uniform(6, 34) / np.linalg.norm(swing)
    pattern = _texture(rng, height, width)[..., None]
    return colour.astype(np.float32) + pattern * swing.astype(np.float32)


def _colour(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(25, 230, size=3)


def _pose(rng: np.random.Generator, outline: Outline, longer_side: float) -> list[np.ndarray]:
    """Squeeze, rotate and scale an outline; the longer side of its box is ``longer_side``."""
    angle = rng.uniform(0, 2 * np.pi)
    c, s = np.cos(angle), np.sin(angle)
    squeeze = np.exp(rng.uniform(-0.2, 0.2))
    matrix = np.diag([squeeze, 1 / squeeze]) @ np.array([[c, s], [-s, c]])
    polygons = [part @ matrix for part in outline if part is not None]
    low, high = polygons[0].min(axis=0), polygons[0].max(axis=0)
    return [(part - (low + high) / 2) * (longer_side / (high - low).max()) for part in polygons]


def _blob(rng: np.random.Generator) -> np.ndarray:
    """Return an elongated, lobed polygon that belongs to no class."""
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    radius = 1 + sum(
        rng.uniform(0.15, 0.4) * np.sin(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3)
    )
    return radius[:, None] * np.stack(
        [np.cos(angle), rng.uniform(0.3, 0.55) * np.sin(angle)], axis=1
    )


def _stroke(rng: np.random.Generator, length: float, thickness: float) -> np.ndarray:
    """Return a bent stroke as a polygon."""
    t = np.linspace(-0.5, 0.5, 16)
    bend = rng.uniform(-0.9, 0.9) * t**2 + rng.uniform(-1.5, 1.5) * t**3
    middle = length * np.stack([t, bend], axis=1)
    along = np.gradient(middle, axis=0)
    normal = np.stack([-along[:, 1], along[:, 0]], axis=1)
    normal *= thickness / 2 / np.linalg.norm(normal, axis=1, keepdims=True)
    return np.concatenate([middle + normal, (middle - normal)[::-1]])


@dataclass(frozen=True)
class _Print:
    """Rasterised outline.

    Args:
        window: the h × w pixels of the image that it overlaps.
        mask: (4h, 4w) bool, covered points of the fine grid.
        alpha: (h, w, 1) float32, covered fraction of each pixel.
        area: covered points of the fine grid, also outside the image.
    """

    window: Window
    mask: np.ndarray
    alpha: np.ndarray
    area: int


class _Canvas:
    """Pixels of the scene, and the index of the visible object at each point of the fine grid."""

    def __init__(self, pixels: np.ndarray, min_visible: float) -> None:
        height, width = pixels.shape[:2]
        self.pixels = pixels  # (H, W, 3) float32
        self.owner = np.zeros((height * SUPERSAMPLE, width * SUPERSAMPLE), np.uint8)  # 0: none
        self.min_visible = min_visible
        self.full: list[int] = [0]  # fine-grid area of every object, with hidden parts
        self.visible: list[int] = [0]
        self.windows: list[Window] = [(slice(0), slice(0))]

    def rasterise(self, polygons: list[np.ndarray], centre: np.ndarray) -> _Print:
        height, width = self.pixels.shape[:2]
        low = np.floor(polygons[0].min(axis=0) + centre).astype(int) - 1
        high = np.ceil(polygons[0].max(axis=0) + centre).astype(int) + 1
        picture = Image.new("L", tuple((SUPERSAMPLE * (high - low)).tolist()))
        draw = ImageDraw.Draw(picture)
        for polygon, fill in zip(polygons, (255, 0), strict=False):
            # The origin is the centre of the first pixel in Pillow, its corner here.
            points = (polygon + centre - low) * SUPERSAMPLE - 0.5
            draw.polygon([tuple(point) for point in points.tolist()], fill=fill)
        first, last = np.maximum(low, 0), np.minimum(high, (width, height))
        last = np.maximum(first, last)
        (x0, y0), (x1, y1) = (first - low).tolist(), (last - low).tolist()
        mask = np.asarray(picture) > 0
        alpha = np.asarray(picture.reduce(SUPERSAMPLE), dtype=np.float32) / 255
        return _Print(
            (slice(first[1], last[1]), slice(first[0], last[0])),
            mask[y0 * SUPERSAMPLE : y1 * SUPERSAMPLE, x0 * SUPERSAMPLE : x1 * SUPERSAMPLE],
            alpha[y0:y1, x0:x1, None],
            int(np.count_nonzero(mask)),
        )

    @staticmethod
    def fine(window: Window) -> Window:
        rows, columns = (slice(s.start * SUPERSAMPLE, s.stop * SUPERSAMPLE) for s in window)
        return rows, columns

    def claim(self, spot: _Print, is_object: bool) -> bool:
        """Assign the points to a new object or clutter, unless it hides too much of an object."""
        inside = int(np.count_nonzero(spot.mask))
        if inside == 0 or (is_object and inside < self.min_visible * spot.area):
            return False
        owner = self.owner[self.fine(spot.window)]
        lost = np.bincount(owner[spot.mask], minlength=len(self.full))
        remaining = np.array(self.visible) - lost
        if np.any(remaining[1:] < self.min_visible * np.array(self.full[1:])):
            return False
        self.visible = [0, *remaining[1:].tolist()]
        owner[spot.mask] = len(self.full) if is_object else 0
        if is_object:
            self.full.append(spot.area)
            self.visible.append(inside)
            self.windows.append(spot.window)
        return True

    def cover(self, rng: np.random.Generator, spot: _Print, colour: np.ndarray) -> None:
        view = self.pixels[spot.window]
        view += spot.alpha * (_paint(rng, *view.shape[:2], colour) - view)

    def surroundings(self, spot: _Print) -> np.ndarray:
        """Return the mean colour of the window outside the mask, or of all if the mask fills it."""
        weight = 1.02 - spot.alpha
        return (weight * self.pixels[spot.window]).sum(axis=(0, 1)) / weight.sum()

    def measure(self, index: int) -> tuple[list[float], float]:
        """Return box (x, y, width, height) and area of an object's visible part, pixels."""
        window = self.windows[index]
        mask = self.owner[self.fine(window)] == index
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        y0, y1 = rows[0] / SUPERSAMPLE, (rows[-1] + 1) / SUPERSAMPLE
        x0, x1 = columns[0] / SUPERSAMPLE, (columns[-1] + 1) / SUPERSAMPLE
        box = [window[1].start + x0, window[0].start + y0, x1 - x0, y1 - y0]
        return [float(n) for n in box], float(mask.sum() / SUPERSAMPLE**2)


def _contrasting_colour(
    rng: np.random.Generator, surroundings: np.ndarray, distance: float
) -> np.ndarray:
    candidates = [_colour(rng) for _ in range(8)]
    for colour in candidates:
        if np.linalg.norm(colour - surroundings) >= distance:
            return colour
    return max(candidates, key=lambda colour: np.linalg.norm(colour - surroundings))


def _add_clutter(rng: np.random.Generator, canvas: _Canvas, front: bool) -> None:
    """Draw a stroke, or, behind the objects only, a blob or a soft patch of another texture."""
    height, width = canvas.pixels.shape[:2]
    side = min(height, width)
    centre = rng.uniform((0, 0), (width, height))
    kind = 0 if front else rng.integers(3)
    if kind == 2:
        soft = _smooth_noise(rng, height, width, rng.uniform(0.15, 0.5) * side)
        alpha = np.clip(4 * soft - 1, 0, 1)[..., None]
        canvas.pixels += alpha * (_paint(rng, height, width, _colour(rng)) - canvas.pixels)
        return
    if kind == 0:
        polygon = _stroke(
            rng, rng.uniform(0.1, 0.8) * side, rng.uniform(1.0, 2.0 if front else 4.0)
        )
        polygons = _pose(rng, (polygon, None), float(np.ptp(polygon, axis=0).max()))
    else:
        polygons = _pose(rng, (_blob(rng), None), np.exp(rng.uniform(np.log(8), np.log(side / 2))))
    spot = canvas.rasterise(polygons, centre)
    if canvas.claim(spot, is_object=False):
        canvas.cover(rng, spot, _colour(rng))


def _add_object(
    rng: np.random.Generator, canvas: _Canvas, outline: Outline, options: SceneOptions
) -> bool:
    height, width = canvas.pixels.shape[:2]
    side = rng.uniform(options.min_object, options.max_object * min(height, width))
    polygons = _pose(rng, outline, side)
    margin = 0.4 * np.ptp(polygons[0], axis=0)  # the border cuts off a fifth of the extent at most
    spot = canvas.rasterise(polygons, rng.uniform(margin, np.array((width, height)) - margin))
    if not canvas.claim(spot, is_object=True):
        return False
    colour = _contrasting_colour(rng, canvas.surroundings(spot), options.min_contrast)
    canvas.cover(rng, spot, colour)
    return True


def _illuminate(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Apply uneven light, a colour cast and sensor noise."""
    height, width = pixels.shape[:2]
    angle, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.3)
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    light = 1 + slope * (x * np.cos(angle) + y * np.sin(angle))
    light = light + 0.08 * _smooth_noise(rng, height, width, min(height, width) / 2)
    cast = rng.uniform(0.9, 1.1, size=3).astype(np.float32)
    noise = rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(rng.uniform(0.5, 4))
    return pixels * light[..., None].astype(np.float32) * cast + noise


def draw_scene(
    family: SceneFamily, split: str, index: int, seed: int = 0, options: SceneOptions | None = None
) -> tuple[Image.Image, list[dict]]:
    """Draw one scene.

    Args:
        family: the classes of the dataset.
        split: "train" or "val".
        index: number of the scene within its split.
        seed: seed of the dataset.
        options: appearance of the scene; None for the defaults.

    Returns:
        The RGB image, and a dict per object, back to front: ``label`` (index into
        ``family.classes``), ``bbox`` (x, y, width, height in pixels) and ``area`` (square pixels).
    """
    options = options or SceneOptions()
    rng = np.random.default_rng([seed, family.code, SPLITS.index(split), index])
    width, height = options.sizes[rng.integers(len(options.sizes))]
    canvas = _Canvas(_paint(rng, height, width, _colour(rng)), options.min_visible)
    for _ in range(rng.integers(2, 8)):
        _add_clutter(rng, canvas, front=False)
    outlines = list(family.outlines.values())
    labels = []
    for _ in range(rng.integers(1, options.max_objects + 1)):
        label = int(rng.integers(len(outlines)))
        # The object is omitted if there is no room for it.
        if any(_add_object(rng, canvas, outlines[label], options) for _ in range(12)):
            labels.append(label)
    for _ in range(rng.integers(0, 3)):
        _add_clutter(rng, canvas, front=True)
    pixels = np.clip(_illuminate(rng, canvas.pixels), 0, 255).astype(np.uint8)
    objects = []
    for number, label in enumerate(labels, start=1):
        bbox, area = canvas.measure(number)
        objects.append({"label": label, "bbox": bbox, "area": area})
    return Image.fromarray(pixels), objects
