"""The criterion that a config describes."""

from detectron2.config import CfgNode

from .criterion import SetCriterion
from .matcher import HungarianMatcher

__all__ = ["build_criterion"]

CHOICES = {"CLASS_HEAD": ("focal", "softmax"), "L1_FORMAT": ("cxcywh", "xyxy")}


def build_criterion(cfg: CfgNode) -> SetCriterion:
    """Criterion and matcher from `MODEL.DYNAMIC_DETR`; costs and losses share their weights.

    Raises:
        ValueError: CLASS_HEAD or LOSS.L1_FORMAT is none of the known ones, or LOSS.FOCAL_ALPHA is
            no share.
    """
    node = cfg.MODEL.DYNAMIC_DETR
    for key, value in (("CLASS_HEAD", node.CLASS_HEAD), ("L1_FORMAT", node.LOSS.L1_FORMAT)):
        if value not in CHOICES[key]:
            where = "LOSS.L1_FORMAT" if key == "L1_FORMAT" else key
            raise ValueError(
                f"MODEL.DYNAMIC_DETR.{where} is {value!r}; wants one of {list(CHOICES[key])}."
            )
    if not 0 <= node.LOSS.FOCAL_ALPHA <= 1:
        raise ValueError(
            f"MODEL.DYNAMIC_DETR.LOSS.FOCAL_ALPHA is {node.LOSS.FOCAL_ALPHA}; wants 0 to 1."
        )
    shared = {
        "class_weight": node.LOSS.CLASS_WEIGHT,
        "l1_weight": node.LOSS.L1_WEIGHT,
        "giou_weight": node.LOSS.GIOU_WEIGHT,
        "class_head": node.CLASS_HEAD,
        "l1_format": node.LOSS.L1_FORMAT,
        "alpha": node.LOSS.FOCAL_ALPHA,
        "gamma": node.LOSS.FOCAL_GAMMA,
    }
    return SetCriterion(
        HungarianMatcher(**shared),
        no_object_weight=node.LOSS.NO_OBJECT_WEIGHT,
        **shared,
    )
