"""What is done to an image before the detector sees it: Detectron2's resizing, flipping and
cropping, and the random crops that the DETR family is trained with."""

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T

__all__ = ["ResizeShortestEdge", "build_mapper", "crop_branch"]

LONGEST = 10  # times the shortest side, before the random crop


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Detectron2's resizing, which of an image of 1x3000 pixels would leave none."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        transform = super().get_transform(image)
        if isinstance(transform, T.ResizeTransform):
            transform.new_h, transform.new_w = max(transform.new_h, 1), max(transform.new_w, 1)
        return transform


def crop_branch(resize: list[int], size: list[int]) -> T.Augmentation:
    """Crops half of the images: their shortest side is resized to one of `resize`, and a region is
    cut out, whose sides are drawn from `size[0]` to `size[1]` pixels."""
    crop = [
        ResizeShortestEdge(resize, LONGEST * max(resize), sample_style="choice"),
        T.RandomCrop("absolute_range", size),
    ]
    return T.RandomApply(T.AugmentationList(crop), prob=0.5)


def build_mapper(cfg: CfgNode, is_train: bool) -> DatasetMapper:
    """Detectron2's mapper, in training with `crop_branch` before its resizing if
    `INPUT.CROP_BRANCH` asks for it.

    Raises:
        ValueError: both INPUT.CROP and INPUT.CROP_BRANCH ask for a crop.
    """
    options = DatasetMapper.from_config(cfg, is_train)
    options["augmentations"] = [
        ResizeShortestEdge(aug.short_edge_length, aug.max_size, aug.sample_style, aug.interp)
        if type(aug) is T.ResizeShortestEdge
        else aug
        for aug in options["augmentations"]
    ]
    branch = cfg.INPUT.CROP_BRANCH
    if is_train and branch.ENABLED:
        if cfg.INPUT.CROP.ENABLED:
            raise ValueError(
                "INPUT.CROP.ENABLED and INPUT.CROP_BRANCH.ENABLED are True; wants one of the two."
            )
        options["augmentations"].insert(0, crop_branch(branch.RESIZE, branch.SIZE))
        options["recompute_boxes"] = cfg.MODEL.MASK_ON
    return DatasetMapper(**options)
