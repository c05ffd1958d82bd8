"""What a wrong class and a wrong box cost: one value that matcher and criterion share."""

from dataclasses import dataclass

from detectron2.config import CfgNode
from torch import Tensor

from ..config import check_arguments
from ..structures import box_cxcywh_to_xyxy
from .boxes import generalized_iou
from .class_loss import ClassLoss, FocalClassLoss, SoftmaxClassLoss

__all__ = ["SetCosts"]


@dataclass(frozen=True)
class SetCosts:
    """Kinds and weights of the three losses, which are also the costs of the matching.

    Args:
        class_head: "focal" or "softmax".
        class_weight, l1_weight, giou_weight: weights of the three.
        l1_format: "cxcywh" or "xyxy", the coordinates, both normalised, that L1 is taken of.
        focal_alpha, focal_gamma: of the focal loss.
        no_object_weight: of the class "no object" with softmax.

    Raises:
        ValueError: a value is out of its range; the line names its key in `MODEL.SET_DETECTOR`.
    """

    class_head: str
    class_weight: float
    l1_weight: float
    giou_weight: float
    l1_format: str
    focal_alpha: float
    focal_gamma: float
    no_object_weight: float

    def __post_init__(self) -> None:
        fields = dict(vars(self))
        check_arguments("MODEL.SET_DETECTOR", class_head=fields.pop("class_head"))
        check_arguments("MODEL.SET_DETECTOR.LOSS", **fields)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "SetCosts":
        """From `MODEL.SET_DETECTOR.CLASS_HEAD` and `MODEL.SET_DETECTOR.LOSS`."""
        node = cfg.MODEL.SET_DETECTOR
        losses = {name.lower(): value for name, value in node.LOSS.items()}
        return cls(class_head=node.CLASS_HEAD, **losses)

    @property
    def class_loss(self) -> ClassLoss:
        if self.class_head == "softmax":
            return SoftmaxClassLoss(self.no_object_weight)
        return FocalClassLoss(self.focal_alpha, self.focal_gamma)

    def box_losses(self, boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """Unweighted losses of boxes (..., 4) in cx, cy, w, h that broadcast to each other.

        Returns:
            L1, summed over the coordinates, and 1 - GIoU: (...) each.
        """
        corners, other_corners = box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(others)
        difference = corners - other_corners if self.l1_format == "xyxy" else boxes - others
        return difference.abs().sum(dim=-1), 1 - generalized_iou(corners, other_corners)
