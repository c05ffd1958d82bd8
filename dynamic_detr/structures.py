"""What flows between the rooms of the detector: `Pyramid` in, `Prediction` out.

Shape letters, used in the comments of every file: B images, L levels, Q queries, C channels,
K classes, S stages, R the side of the pooled region.
"""

from dataclasses import dataclass, field, replace

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
            of the features.

    Raises:
        ValueError: levels, strides and sizes do not fit together.
    """

    features: tuple[Tensor, ...]
    strides: tuple[int, ...]
    image_sizes: Tensor
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

    def valid(self, level: int) -> Tensor:
        """True where a position of the level belongs to the image: (B, 1, H, W) bool."""
        key = "valid", level
        if key not in self._of_sizes:
            feature, sizes = self.features[level], self.sizes(level)
            height, width = feature.shape[-2:]
            rows = torch.arange(height, device=feature.device) < sizes[:, :1]  # (B, H)
            columns = torch.arange(width, device=feature.device) < sizes[:, 1:]  # (B, W)
            self._of_sizes[key] = (rows[:, :, None] & columns[:, None, :])[:, None]
        return self._of_sizes[key]

    def filled(self, level: int) -> bool:
        """Whether the level is known to hold no padding; False where asking would cost a stall,
        and in what is compiled, which serves images of any true size."""
        if self.image_sizes.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        key = "filled", level
        if key not in self._of_sizes:
            padded = torch.tensor(self.features[level].shape[-2:])
            self._of_sizes[key] = bool((self.sizes(level) >= padded).all())
        return self._of_sizes[key]

    def with_features(self, features: list[Tensor] | tuple[Tensor, ...]) -> "Pyramid":
        """The same pyramid with other features of the same spatial sizes."""
        pyramid = replace(self, features=tuple(features))
        object.__setattr__(pyramid, "_of_sizes", self._of_sizes)
        return pyramid

    def masked(self) -> "Pyramid":
        """The same pyramid with zeros beyond the true sizes."""
        if all(self.filled(level) for level in range(len(self))):
            return self
        return self.with_features(
            [
                feature if self.filled(level) else torch.where(self.valid(level), feature, 0)
                for level, feature in enumerate(self.features)
            ]
        )

    def table(self) -> Tensor:
        """All levels as one table of positions, fine to coarse, row by row: (B, ΣHW, C).

        It is built once; later calls return the same tensor.
        """
        if "table" not in self._of_features:
            self._of_features["table"] = torch.cat(
                [f.permute(0, 2, 3, 1).flatten(1, 2) for f in self.features], dim=1
            )
        return self._of_features["table"]


@dataclass(frozen=True)
class Prediction:
    """What one decoder stage says of a batch.

    Args:
        pred_logits: (B, Q, K), or (B, Q, K + 1) with a softmax head, whose last entry is
            "no object".
        pred_boxes: (B, Q, 4) as cx, cy, w, h, normalised by the size of the unpadded image.
        is_proposal: whether these are the proposals of a two-stage decoder.
    """

    pred_logits: Tensor
    pred_boxes: Tensor
    is_proposal: bool = False


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Boxes (..., 4) from centre and size to corners."""
    center, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([center - 0.5 * size, center + 0.5 * size], dim=-1)


def box_xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Boxes (..., 4) from corners to centre and size."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([0.5 * (low + high), high - low], dim=-1)
