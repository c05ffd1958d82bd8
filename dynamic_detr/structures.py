"""What flows between the rooms of the detector: `Pyramid` in, `Prediction` out.

Shape letters, used in the comments of every file: B images, L levels, Q queries, C channels,
K classes, S stages, R the side of the pooled region.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Prediction", "Pyramid", "box_cxcywh_to_xyxy", "box_xyxy_to_cxcywh"]


@dataclass(frozen=True)
class Pyramid:
    """Feature maps of one batch at several strides, and the true size of every image.

    Images of a batch are padded at the right and the bottom to a common size, so that a level may
    hold positions that belong to no image. The true size of a level is ceil(image size / stride).

    Args:
        features: (B, C, H, W) for each level, fine to coarse, in channels-last memory.
        strides: the stride of each level in pixels of the image.
        image_sizes: (B, 2) integers, true (height, width) of each image in pixels, on the device
            of the features; None where nothing is known of padding: every map is then true as a
            whole.

    Raises:
        ValueError: levels, strides and sizes do not fit together.
    """

    features: tuple[Tensor, ...]
    strides: tuple[int, ...]
    image_sizes: Tensor | None = None
    # What was computed once: of the sizes, shared with the same pyramid with other features; and
    # of the features. (torch.compile cannot trace the lock in Python 3.11's cached_property.)
    _of_sizes: dict = field(init=False, repr=False, compare=False, default_factory=dict)
    _of_features: dict = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", tuple(self.features))
        object.__setattr__(self, "strides", tuple(self.strides))
        if len(self.features) != len(self.strides) or not self.features:
            raise ValueError(
                f"Pyramid: got {len(self.features)} levels and {len(self.strides)} strides; "
                "wants one stride for each level, and at least one level."
            )
        batch, channels = self.features[0].shape[:2]
        for level, feature in enumerate(self.features):
            if feature.dim() != 4 or feature.shape[:2] != (batch, channels):
                raise ValueError(
                    f"Pyramid: level {level} has shape {tuple(feature.shape)}; "
                    f"wants ({batch}, {channels}, H, W) as level 0."
                )
        if self.image_sizes is None:
            stride, feature = self.strides[0], self.features[0]
            size = [feature.shape[-2] * stride, feature.shape[-1] * stride]
            sizes = [torch.full((batch, 1), n, device=feature.device) for n in size]
            object.__setattr__(self, "image_sizes", torch.cat(sizes, dim=1))
        if self.image_sizes.shape != (batch, 2) or self.image_sizes.is_floating_point():
            raise ValueError(
                f"Pyramid: image_sizes is {self.image_sizes.dtype} "
                f"{tuple(self.image_sizes.shape)}; wants integers of shape ({batch}, 2)."
            )

    def __len__(self) -> int:
        return len(self.features)

    @property
    def channels(self) -> int:
        return self.features[0].shape[1]

    def sizes(self, level: int) -> Tensor:
        """True (height, width) of a level for each image: (B, 2) integers, at least 1."""
        return (self.image_sizes + self.strides[level] - 1).div(
            self.strides[level], rounding_mode="floor"
        )

    def valid_mask(self, level: int) -> Tensor:
        """True where a position of the level belongs to the image: (B, 1, H, W) bool."""

        def mask() -> Tensor:
            feature, sizes = self.features[level], self.sizes(level)
            height, width = feature.shape[-2:]
            rows = torch.arange(height, device=feature.device) < sizes[:, :1]  # (B, H)
            columns = torch.arange(width, device=feature.device) < sizes[:, 1:]  # (B, W)
            return (rows[:, :, None] & columns[:, None, :])[:, None]

        return self._kept(self._of_sizes, ("valid_mask", level), mask)

    def is_unpadded(self, level: int) -> bool:
        """True only if the level provably has no padding; never synchronises.

        False for sizes on a GPU, and in compiled code, which serves images of any true size.
        """
        if self.image_sizes.device.type != "cpu" or torch.compiler.is_compiling():
            return False

        def unpadded() -> bool:
            padded = torch.tensor(self.features[level].shape[-2:])
            return bool((self.sizes(level) >= padded).all())

        return self._kept(self._of_sizes, ("is_unpadded", level), unpadded)

    @staticmethod
    def _kept(cache: dict, key: object, compute: Callable[[], Any]) -> Any:
        if key not in cache:
            cache[key] = compute()
        return cache[key]

    def with_features(self, features: list[Tensor] | tuple[Tensor, ...]) -> "Pyramid":
        """The same pyramid with other features of the same spatial sizes."""
        pyramid = replace(self, features=tuple(features))
        object.__setattr__(pyramid, "_of_sizes", self._of_sizes)
        return pyramid

    def select(self, levels: Sequence[int]) -> "Pyramid":
        """Some of the levels, given by their indices."""
        features = [self.features[level] for level in levels]
        return Pyramid(features, [self.strides[level] for level in levels], self.image_sizes)

    def masked(self) -> "Pyramid":
        """The same pyramid with zeros beyond the true sizes."""
        if all(self.is_unpadded(level) for level in range(len(self))):
            return self
        return self.with_features(
            [
                feature
                if self.is_unpadded(level)
                else torch.where(self.valid_mask(level), feature, 0)
                for level, feature in enumerate(self.features)
            ]
        )

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(H, W) of each level, padding included."""
        return [tuple(feature.shape[-2:]) for feature in self.features]

    def table(self) -> Tensor:
        """All levels as one table of positions, fine to coarse, row by row: (B, ΣHW, C).

        It is built once; later calls return the same tensor.
        """
        return self._kept(
            self._of_features,
            "table",
            lambda: torch.cat([f.permute(0, 2, 3, 1).flatten(1, 2) for f in self.features], dim=1),
        )

    def with_table(self, table: Tensor) -> "Pyramid":
        """The same pyramid with the rows (B, ΣHW, C) of another table as features."""
        parts = table.split([height * width for height, width in self.shapes], dim=1)
        pyramid = self.with_features(
            [
                part.unflatten(1, shape).permute(0, 3, 1, 2)
                for part, shape in zip(parts, self.shapes, strict=True)
            ]
        )
        pyramid._of_features["table"] = table
        return pyramid

    def valid_table(self) -> Tensor:
        """True where a row of the table belongs to the image: (B, ΣHW) bool."""
        return self._kept(
            self._of_sizes,
            "valid_table",
            lambda: torch.cat(
                [self.valid_mask(level).flatten(1) for level in range(len(self))], dim=1
            ),
        )

    def level_centers(self) -> list[Tensor]:
        """Centres of the positions of each level, row by row: (B, H·W, 2) float32 x, y.

        They are normalised by the level's own true size in cells: (1, 1) is the lower right corner
        of its last true cell, and positions of the padding lie beyond.
        """

        def centers() -> list[Tensor]:
            levels = []
            for level, (height, width) in enumerate(self.shapes):
                device = self.image_sizes.device
                y = torch.arange(height, device=device, dtype=torch.float32) + 0.5
                x = torch.arange(width, device=device, dtype=torch.float32) + 0.5
                grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (H, W, 2)
                levels.append(grid.flatten(0, 1) / self.sizes(level).flip(-1)[:, None])
            return levels

        return self._kept(self._of_sizes, "centers", centers)

    def centers(self) -> Tensor:
        """`level_centers` in the rows of the table: (B, ΣHW, 2)."""
        return self._kept(
            self._of_sizes, "table_centers", lambda: torch.cat(self.level_centers(), dim=1)
        )

    def valid_ratios(self) -> Tensor:
        """True by padded size of each level: (B, L, 2) float64, of x and y.

        A location that is normalised by the true size of a level, times these, is normalised by
        the size of its padded map.
        """

        def ratios() -> Tensor:
            levels = []
            for level, (height, width) in enumerate(self.shapes):
                true_height, true_width = self.sizes(level).unbind(dim=1)
                # a level may be smaller than its image's size says: it has no more true cells
                ratio_x = true_width.clamp(max=width).double() / width
                ratio_y = true_height.clamp(max=height).double() / height
                levels.append(torch.stack([ratio_x, ratio_y], dim=1))
            return torch.stack(levels, dim=1)

        return self._kept(self._of_sizes, "valid_ratios", ratios)


@dataclass(frozen=True)
class Prediction:
    """What one decoder stage says of a batch.

    Args:
        pred_logits: (B, Q, K), or (B, Q, K + 1) with a softmax head, whose last entry is
            "no object".
        pred_boxes: (B, Q, 4) as cx, cy, w, h, normalised by the size of the unpadded image.
        is_proposal: whether these are the proposals of a two-stage decoder.
        cells: (B, Q, 4), of proposals that share objects: the cell of the pyramid that each is
            made at, as a box. None where an object is matched to one prediction alone.
    """

    pred_logits: Tensor
    pred_boxes: Tensor
    is_proposal: bool = False
    cells: Tensor | None = None


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Boxes (..., 4) from centre and size to corners."""
    center, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([center - 0.5 * size, center + 0.5 * size], dim=-1)


def box_xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Boxes (..., 4) from corners to centre and size."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([0.5 * (low + high), high - low], dim=-1)
