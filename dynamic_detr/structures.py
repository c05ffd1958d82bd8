"""The input of encoders and decoders, `Pyramid`, and the output of decoders, `Prediction`.

Shape letters of all files: B images, L levels, Q queries, C channels, K classes, S stages, R side
of a pooled region.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Prediction", "Pyramid"]


@dataclass(frozen=True)
class Pyramid:
    """Feature maps of one batch at several strides, and the unpadded size of every image.

    Images of a batch are padded at the right and at the bottom to a common size. The unpadded, or
    true, size of a level is ceil(image size / stride); positions beyond it are padding.

    Args:
        features: (B, C, H, W) for each level, fine to coarse, in channels-last memory.
        strides: stride of each level in pixels of the image.
        image_sizes: (B, 2) integers, unpadded (height, width) of each image in pixels, on the
            device of the features; None for images without padding.

    Raises:
        ValueError: the shapes of levels, strides and sizes do not match.
    """

    features: tuple[Tensor, ...]
    strides: tuple[int, ...]
    image_sizes: Tensor | None = None
    # Results that depend on the sizes alone are shared by `with_features`. torch.compile cannot
    # trace the lock of functools.cached_property in Python 3.11.
    _sizes_cache: dict = field(init=False, repr=False, compare=False, default_factory=dict)
    _features_cache: dict = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", tuple(self.features))
        object.__setattr__(self, "strides", tuple(self.strides))
        if len(self.features) != len(self.strides) or not self.features:
            raise ValueError(
                "Pyramid: expected at least one level and one stride for each level, got "
                f"{len(self.features)} levels and {len(self.strides)} strides."
            )
        batch, channels = self.features[0].shape[:2]
        for level, feature in enumerate(self.features):
            if feature.dim() != 4 or feature.shape[:2] != (batch, channels):
                raise ValueError(
                    f"Pyramid: expected shape ({batch}, {channels}, H, W) for level {level}, got "
                    f"{tuple(feature.shape)}."
                )
        if self.image_sizes is None:
            stride, feature = self.strides[0], self.features[0]
            size = [feature.shape[-2] * stride, feature.shape[-1] * stride]
            sizes = [torch.full((batch, 1), n, device=feature.device) for n in size]
            object.__setattr__(self, "image_sizes", torch.cat(sizes, dim=1))
        if self.image_sizes.shape != (batch, 2) or self.image_sizes.is_floating_point():
            raise ValueError(
                f"Pyramid: expected integer image_sizes of shape ({batch}, 2), got "
                f"{self.image_sizes.dtype} of shape {tuple(self.image_sizes.shape)}."
            )

    def __len__(self) -> int:
        return len(self.features)

    @property
    def channels(self) -> int:
        """Return the number of channels, C."""
        return self.features[0].shape[1]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Return the padded (H, W) of each level."""
        return [tuple(feature.shape[-2:]) for feature in self.features]

    @property
    def areas(self) -> list[int]:
        """Return the number of positions of each level, H · W."""
        return [height * width for height, width in self.shapes]

    def sizes(self, level: int) -> Tensor:
        """Return the true (height, width) of a level: (B, 2) integers, at least 1."""
        stride = self.strides[level]
        return self.cached(
            ("sizes", level),
            lambda: (self.image_sizes + stride - 1).div(stride, rounding_mode="floor"),
        )

    def valid_mask(self, level: int) -> Tensor:
        """Return the mask of the positions that are not padding: (B, 1, H, W) bool."""

        def mask() -> Tensor:
            feature, sizes = self.features[level], self.sizes(level)
            height, width = feature.shape[-2:]
            rows = torch.arange(height, device=feature.device) < sizes[:, :1]  # (B, H)
            columns = torch.arange(width, device=feature.device) < sizes[:, 1:]  # (B, W)
            return (rows[:, :, None] & columns[:, None, :])[:, None]

        return self.cached(("valid_mask", level), mask)

    def is_unpadded(self, level: int) -> bool:
        """Return whether the level provably has no padding, without synchronising with a GPU.

        False for sizes on a GPU, and in compiled code, which must run for images of any true size.
        """
        if self.image_sizes.device.type != "cpu" or torch.compiler.is_compiling():
            return False

        def unpadded() -> bool:
            padded = torch.tensor(self.features[level].shape[-2:])
            return bool((self.sizes(level) >= padded).all())

        return self.cached(("is_unpadded", level), unpadded)

    def cached(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Return `compute()`, computed once for all pyramids that share the sizes.

        Args:
            key: key of the result in the cache.
            compute: function of the strides, the shapes and `image_sizes`, not of the features.
        """
        if key not in self._sizes_cache:
            self._sizes_cache[key] = compute()
        return self._sizes_cache[key]

    def with_features(self, features: Sequence[Tensor]) -> "Pyramid":
        """Return a pyramid with other features of the same spatial sizes."""
        pyramid = replace(self, features=tuple(features))
        object.__setattr__(pyramid, "_sizes_cache", self._sizes_cache)
        return pyramid

    def select(self, levels: Sequence[int]) -> "Pyramid":
        """Return the pyramid of the levels with the given indices."""
        features = [self.features[level] for level in levels]
        return Pyramid(features, [self.strides[level] for level in levels], self.image_sizes)

    def masked(self) -> "Pyramid":
        """Return the pyramid with zeros in the padding."""
        if all(self.is_unpadded(level) for level in range(len(self))):
            return self
        if "table" in self._features_cache:  # one operation for all levels
            return self.with_table(torch.where(self.valid_table()[..., None], self.table(), 0))
        return self.with_features(
            [
                feature
                if self.is_unpadded(level)
                else torch.where(self.valid_mask(level), feature, 0)
                for level, feature in enumerate(self.features)
            ]
        )

    def table(self) -> Tensor:
        """Return the flattened levels, concatenated fine to coarse: (B, ΣHW, C); built once."""
        if "table" not in self._features_cache:
            levels = [feature.permute(0, 2, 3, 1).flatten(1, 2) for feature in self.features]
            self._features_cache["table"] = torch.cat(levels, dim=1)
        return self._features_cache["table"]

    def with_table(self, table: Tensor) -> "Pyramid":
        """Return the pyramid with flattened features (B, ΣHW, C); inverse of `table`."""
        parts = table.split(self.areas, dim=1)
        pyramid = self.with_features(
            [
                part.unflatten(1, shape).permute(0, 3, 1, 2)
                for part, shape in zip(parts, self.shapes, strict=True)
            ]
        )
        pyramid._features_cache["table"] = table
        return pyramid

    def valid_table(self) -> Tensor:
        """Return the mask of the rows of the table that are not padding: (B, ΣHW) bool."""

        def mask() -> Tensor:
            levels = [self.valid_mask(level).flatten(1) for level in range(len(self))]
            return torch.cat(levels, dim=1)

        return self.cached("valid_table", mask)

    def level_centers(self) -> list[Tensor]:
        """Return the centres of the positions of each level: (B, H · W, 2) float32 x, y.

        They are normalised by the true size of the level in cells: (1, 1) is the lower right corner
        of the last true cell, and centres of the padding are beyond 1.
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

        return self.cached("level_centers", centers)

    def centers(self) -> Tensor:
        """Return `level_centers` in the rows of the table: (B, ΣHW, 2)."""
        return self.cached("centers", lambda: torch.cat(self.level_centers(), dim=1))

    def valid_ratios(self) -> Tensor:
        """Return the true size divided by the padded size of each level: (B, L, 2) float64 x, y.

        The product of a valid ratio and a location normalised by the true size is normalised by the
        padded size.
        """

        def ratios() -> Tensor:
            levels = []
            for level, (height, width) in enumerate(self.shapes):
                true_height, true_width = self.sizes(level).unbind(dim=1)
                # a level may be smaller than ceil(image size / stride)
                ratio_x = true_width.clamp(max=width).double() / width
                ratio_y = true_height.clamp(max=height).double() / height
                levels.append(torch.stack([ratio_x, ratio_y], dim=1))
            return torch.stack(levels, dim=1)

        return self.cached("valid_ratios", ratios)


@dataclass(frozen=True)
class Prediction:
    """Predictions of one decoder stage for a batch.

    Args:
        pred_logits: (B, Q, K), or (B, Q, K + 1) with a softmax head, with "no object" last.
        pred_boxes: (B, Q, 4) cx, cy, w, h, normalised by the size of the unpadded image.
        is_proposal: True for the proposals of a two-stage decoder.
        true_logits: (B, T, K) or (B, T, K + 1), in training the logits of the true boxes of each
            image, padded to the largest number T. None if they are not classified.
        noised_boxes: (B, N, 4) cx, cy, w, h, normalised, in training the refined boxes of N noised
            copies of the true boxes of each image. None without copies.
        noised_objects: (B, N) int64, objects of these copies, as indices of the objects of all
            images; -1 for images without objects.
    """

    pred_logits: Tensor
    pred_boxes: Tensor
    is_proposal: bool = False
    true_logits: Tensor | None = None
    noised_boxes: Tensor | None = None
    noised_objects: Tensor | None = None
