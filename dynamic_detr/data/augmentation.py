"""Image augmentation: Detectron2's, and the random crops of the DETR family."""

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T

__all__ = ["ResizeShortestEdge", "build_mapper", "crop_branch"]

MAX_ASPECT_RATIO = 10  # of a resized image before the random crop


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Detectron2's `ResizeShortestEdge` with results of at least 1 × 1 pixel."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        transform = super().get_transform(image)
        if isinstance(transform, T.ResizeTransform):
            transform.new_h, transform.new_w = max(transform.new_h, 1), max(transform.new_w, 1)
        return transform


class RandomCrop(T.RandomCrop):
    """Detectron2's `RandomCrop` with results of at least 1 × 1 pixel."""

    def get_crop_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        height, width = super().get_crop_size(image_size)
        return max(height, 1), max(width, 1)


def _of_a_pixel(augmentation: T.Augmentation) -> T.Augmentation:
    """Return the augmentation of this file in place of Detectron2's."""
    if type(augmentation) is T.ResizeShortestEdge:
        names = ("short_edge_length", "max_size", "sample_style", "interp")
        return ResizeShortestEdge(*(getattr(augmentation, name) for name in names))
    if type(augmentation) is T.RandomCrop:
        return RandomCrop(augmentation.crop_type, augmentation.crop_size)
    return augmentation


def crop_branch(resize: list[int], size: list[int]) -> T.Augmentation:
    """Return an augmentation that resizes and crops half of the images.

    Args:
        resize: candidates for the shortest side before the crop, pixels.
        size: range of both sides of the crop, pixels.
    """
    crop = [
        ResizeShortestEdge(resize, MAX_ASPECT_RATIO * max(resize), sample_style="choice"),
        T.RandomCrop("absolute_range", size),
    ]
    return T.RandomApply(T.AugmentationList(crop), prob=0.5)


def build_mapper(cfg: CfgNode, is_train: bool) -> DatasetMapper:
    """Build Detectron2's mapper; `INPUT.CROP_BRANCH` adds `crop_branch` in training.

    Raises:
        ValueError: both INPUT.CROP and INPUT.CROP_BRANCH are enabled.
    """
    options = DatasetMapper.from_config(cfg, is_train)
    options["augmentations"] = [_of_a_pixel(each) for each in options["augmentations"]]
    branch = cfg.INPUT.CROP_BRANCH
    if is_train and branch.ENABLED:
        if cfg.INPUT.CROP.ENABLED:
            raise ValueError(
                "INPUT.CROP.ENABLED and INPUT.CROP_BRANCH.ENABLED are True; enable only one."
            )
        options["augmentations"].insert(0, crop_branch(branch.RESIZE, branch.SIZE))
        options["recompute_boxes"] = cfg.MODEL.MASK_ON
    return DatasetMapper(**options)
