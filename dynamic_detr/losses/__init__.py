"""The set loss: which prediction answers for which object, and what it costs to be wrong."""

from .boxes import generalized_iou
from .build import build_criterion
from .criterion import SetCriterion, Target
from .matcher import HungarianMatcher

__all__ = ["HungarianMatcher", "SetCriterion", "Target", "build_criterion", "generalized_iou"]
