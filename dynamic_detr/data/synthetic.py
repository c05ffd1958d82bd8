"""Synthetic scenes: textured shapes among textured clutter, with exact boxes and areas.

A scene is a pure function of (seed, family, split, index). What an object is, is said by its
outline alone: objects, clutter and background draw their colours and textures from the same
distributions, so neither a threshold nor a contour finder tells them apart, while a floor on the
contrast between an object and its surroundings keeps every outline visible.

Outlines are drawn at ``SUPERSAMPLE`` times the image's resolution. The pixels of the image are
averages over that grid (antialiasing), and areas and boxes are measured on it, so they are true to
a quarter of a pixel. As in COCO, box and area are those of the visible part of an object.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["FAMILIES", "SceneFamily", "SceneOptions", "draw_scene"]

RECIPE = 2  # to be raised by whatever changes the pixels or boxes of a scene
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


def _disc() -> Outline:
    return _arc(0, 2 * np.pi), None


def _square() -> Outline:
    return _spokes([1.0] * 4), None


def _triangle() -> Outline:
    return _spokes([1.0] * 3), None


def _star() -> Outline:
    return _spokes([1.0, 0.42] * 5), None


def _ring() -> Outline:
    return _arc(0, 2 * np.pi), _arc(0, 2 * np.pi, radius=0.58)


def _cross() -> Outline:
    a = 0.3
    quarter = np.array([(1, -a), (1, a), (a, a)])
    turn = np.array([(0, 1), (-1, 0)])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)]), None


def _heart() -> Outline:
    t = np.linspace(0, 2 * np.pi, 64)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, y], axis=1), None


def _crescent() -> Outline:
    outer = _arc(np.pi / 3, 2 * np.pi - np.pi / 3)
    bite = _arc(2 * np.pi - 1.9, 1.9, radius=outer[0, 1] / np.sin(1.9))
    return np.concatenate([outer, bite + (outer[0] - bite[-1])]), None


def _arrow() -> Outline:
    upper = [(-1, 0.22), (0.1, 0.22), (0.1, 0.75), (1, 0)]
    return np.array(upper + [(x, -y) for x, y in upper[-2::-1]]), None


def _hourglass() -> Outline:
    return np.array([(-0.8, 1), (0.8, 1), (0.14, 0), (0.8, -1), (-0.8, -1), (-0.14, 0)]), None


@dataclass(frozen=True)
class SceneFamily:
    """Classes that occur together in one dataset, and how many scenes each split has."""

    name: str
    code: int  # enters the seed in place of the name
    outlines: dict[str, Callable[[], Outline]]
    images: dict[str, int]  # split -> number of scenes

    @property
    def classes(self) -> list[str]:
        return list(self.outlines)


FAMILIES = {
    family.name: family
    for family in (
        SceneFamily(
            "shapes",
            0,
            {
                "disc": _disc,
                "square": _square,
                "triangle": _triangle,
                "star": _star,
                "ring": _ring,
                "cross": _cross,
            },
            {"train": 6000, "val": 300},
        ),
        SceneFamily(
            "symbols",
            1,
            {
                "heart": _heart,
                "crescent": _crescent,
                "arrow": _arrow,
                "hourglass": _hourglass,
            },
            {"train": 400, "val": 150},
        ),
    )
}


@dataclass(frozen=True)
class SceneOptions:
    """What a scene looks like; equal options and an equal seed give equal pixels.

    Args:
        sizes: (width, height) in pixels; a scene draws one of them.
        min_object: longer side of the smallest object, pixels.
        max_object: longer side of the largest object, as a fraction of the image's shorter side.
        max_objects: a scene holds 1 to this many objects.
        min_visible: fraction of an object that borders and other objects must leave visible.
        min_contrast: RGB distance (0-255 a channel) between an object and its surroundings.
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
    """Noise in about [-1, 1] whose features are ``cell`` pixels across, (height, width) float32."""
    grid = (int(np.ceil(width / cell)) + 3, int(np.ceil(height / cell)) + 3)
    noise = Image.fromarray(rng.uniform(-1.3, 1.3, grid[::-1]).astype(np.float32))
    box = (1.0, 1.0, 1.0 + width / cell, 1.0 + height / cell)
    return np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC, box=box))


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """One random pattern with values in [-1, 1], (height, width) float32."""
    angle, kind = rng.uniform(0, 2 * np.pi), rng.integers(5)
    period = float(np.exp(rng.uniform(np.log(5), np.log(30))))
    if kind in (0, 3, 4):  # along and across the pattern, in pixels
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
    """A textured surface whose mean is about ``colour``, (height, width, 3) float32 in 0-255."""
    swing = rng.normal(size=3)
    swing *= rng.uniform(6, 34) / np.linalg.norm(swing)
    pattern = _texture(rng, height, width)[..., None]
    return colour.astype(np.float32) + pattern * swing.astype(np.float32)


def _colour(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(25, 230, size=3)


def _pose(rng: np.random.Generator, outline: Outline, longer_side: float) -> list[np.ndarray]:
    """Squeezes, turns and scales an outline so that its box's longer side is ``longer_side``."""
    angle = rng.uniform(0, 2 * np.pi)
    c, s = np.cos(angle), np.sin(angle)
    squeeze = np.exp(rng.uniform(-0.2, 0.2))
    matrix = np.diag([squeeze, 1 / squeeze]) @ np.array([[c, s], [-s, c]])
    polygons = [part @ matrix for part in outline if part is not None]
    low, high = polygons[0].min(axis=0), polygons[0].max(axis=0)
    return [(part - (low + high) / 2) * (longer_side / (high - low).max()) for part in polygons]


def _blob(rng: np.random.Generator) -> np.ndarray:
    """An elongated, lobed outline that is none of the classes."""
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    radius = 1 + sum(
        rng.uniform(0.15, 0.4) * np.sin(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3)
    )
    return radius[:, None] * np.stack(
        [np.cos(angle), rng.uniform(0.3, 0.55) * np.sin(angle)], axis=1
    )


def _stroke(rng: np.random.Generator, length: float, thickness: float) -> np.ndarray:
    """A bent band, ``length`` long, as a polygon."""
    t = np.linspace(-0.5, 0.5, 16)
    bend = rng.uniform(-0.9, 0.9) * t**2 + rng.uniform(-1.5, 1.5) * t**3
    middle = length * np.stack([t, bend], axis=1)
    along = np.gradient(middle, axis=0)
    normal = np.stack([-along[:, 1], along[:, 0]], axis=1)
    normal *= thickness / 2 / np.linalg.norm(normal, axis=1, keepdims=True)
    return np.concatenate([middle + normal, (middle - normal)[::-1]])


@dataclass(frozen=True)
class _Print:
    """What an outline covers of the picture.

    ``window``: the h x w pixels concerned; ``mask``: (4h, 4w) bool, on the fine grid; ``alpha``:
    (h, w, 1) float32, covered fraction of each pixel; ``area``: in fine points, unclipped.
    """

    window: Window
    mask: np.ndarray
    alpha: np.ndarray
    area: int


class _Canvas:
    """The picture in the making, and which object is visible at each point of the fine grid."""

    def __init__(self, pixels: np.ndarray, min_visible: float) -> None:
        height, width = pixels.shape[:2]
        self.pixels = pixels  # (H, W, 3) float32
        self.owner = np.zeros((height * SUPERSAMPLE, width * SUPERSAMPLE), np.uint8)  # 0: nobody
        self.min_visible = min_visible
        self.full: list[int] = [0]  # fine-grid area of every object, hidden parts included
        self.visible: list[int] = [0]
        self.windows: list[Window] = [(slice(0), slice(0))]

    def rasterise(self, polygons: list[np.ndarray], centre: np.ndarray) -> _Print:
        height, width = self.pixels.shape[:2]
        low = np.floor(polygons[0].min(axis=0) + centre).astype(int) - 1
        high = np.ceil(polygons[0].max(axis=0) + centre).astype(int) + 1
        picture = Image.new("L", tuple((SUPERSAMPLE * (high - low)).tolist()))
        draw = ImageDraw.Draw(picture)
        for polygon, fill in zip(polygons, (255, 0), strict=False):
            # Pillow counts from pixel centres, outlines from the window's corner.
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
        """Takes the points for a new object or clutter, unless too little of an object remains."""
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
        """Mean colour of what the window shows around (and, where it is full, under) the mask."""
        weight = 1.02 - spot.alpha
        return (weight * self.pixels[spot.window]).sum(axis=(0, 1)) / weight.sum()

    def measure(self, index: int) -> tuple[list[float], float]:
        """Box (x, y, width, height) and area of an object's visible part, pixels."""
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
    """One stroke, or (behind the objects only) one blob or a soft patch of another texture."""
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
    margin = 0.4 * np.ptp(polygons[0], axis=0)  # borders may cut a fifth of its extent off
    spot = canvas.rasterise(polygons, rng.uniform(margin, np.array((width, height)) - margin))
    if not canvas.claim(spot, is_object=True):
        return False
    colour = _contrasting_colour(rng, canvas.surroundings(spot), options.min_contrast)
    canvas.cover(rng, spot, colour)
    return True


def _illuminate(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Light that falls off in one direction and in soft spots, a colour cast, sensor noise."""
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
    """Draws one scene.

    Args:
        family: whose classes occur in it.
        split: "train" or "val".
        index: number of the scene within its split.
        seed: of the whole dataset.
        options: what scenes look like; the defaults when None.

    Returns:
        The RGB image and, back to front, one dict an object: ``label`` (index into
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
        # A crowded scene may have no room left: it then keeps fewer objects.
        if any(_add_object(rng, canvas, outlines[label](), options) for _ in range(12)):
            labels.append(label)
    for _ in range(rng.integers(0, 3)):
        _add_clutter(rng, canvas, front=True)
    pixels = np.clip(_illuminate(rng, canvas.pixels), 0, 255).astype(np.uint8)
    objects = []
    for number, label in enumerate(labels, start=1):
        bbox, area = canvas.measure(number)
        objects.append({"label": label, "bbox": bbox, "area": area})
    return Image.fromarray(pixels), objects
