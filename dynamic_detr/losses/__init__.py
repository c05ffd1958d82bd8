"""The set loss: bipartite matching, and the losses of the matched pairs."""

from .boxes import iou_and_generalized_iou
from .costs import SetCosts
from .criterion import SetCriterion, Target
from .matcher import HungarianMatcher

__all__ = ["HungarianMatcher", "SetCosts", "SetCriterion", "Target", "iou_and_generalized_iou"]
