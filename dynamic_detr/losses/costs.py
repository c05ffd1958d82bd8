"""Class, L1 and GIoU terms, shared by the matcher and the criterion."""

from dataclasses import dataclass

from detectron2.config import CfgNode
from torch import Tensor
from torchvision.ops import box_convert

from ..config import check_arguments
from .boxes import iou_and_generalized_iou
from .class_loss import ClassLoss, FocalClassLoss, SoftmaxClassLoss, VarifocalClassLoss

__all__ = ["SetCosts"]


@dataclass(frozen=True)
class SetCosts:
    """Types and weights of the three losses, which are also the matching costs.

    Args:
        class_head: "focal" or "softmax".
        class_target: target of a matched query, "one" or "iou", see `VarifocalClassLoss`.
        class_weight: weight of the class loss.
        l1_weight: weight of the L1 loss.
        giou_weight: weight of the GIoU loss.
        l1_format: box format of the L1 loss, "cxcywh" or "xyxy"; both normalised.
        focal_alpha: weight of positives in the focal loss, in [0, 1].
        focal_gamma: exponent of the focal loss.
        no_object_weight: weight of "no object" in the cross-entropy.

    Raises:
        ValueError: a value is out of the range of its key in `MODEL.SET_DETECTOR`, or the target
            is "iou" and the head is not "focal".
    """

    class_head: str
    class_target: str
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
        if self.class_target == "iou" and self.class_head != "focal":
            raise ValueError(
                f"MODEL.SET_DETECTOR.LOSS.CLASS_TARGET 'iou' needs CLASS_HEAD 'focal', not "
                f"{self.class_head!r}."
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "SetCosts":
        """Build from `MODEL.SET_DETECTOR.CLASS_HEAD` and `MODEL.SET_DETECTOR.LOSS`."""
        node = cfg.MODEL.SET_DETECTOR
        losses = {name.lower(): value for name, value in node.LOSS.items()}
        return cls(class_head=node.CLASS_HEAD, **losses)

    @property
    def class_loss(self) -> ClassLoss:
        """Return the class loss of the class head."""
        if self.class_head == "softmax":
            return SoftmaxClassLoss(self.no_object_weight)
        loss = VarifocalClassLoss if self.class_target == "iou" else FocalClassLoss
        return loss(self.focal_alpha, self.focal_gamma)

    def box_losses(self, boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the unweighted box losses of broadcastable boxes, and their IoU.

        Args:
            boxes: (..., 4) cx, cy, w, h, normalised.
            others: (..., 4) cx, cy, w, h, normalised.

        Returns:
            L1 summed over the coordinates, 1 - GIoU, and the IoU: (...) each.
        """
        corners, other_corners = (box_convert(b, "cxcywh", "xyxy") for b in (boxes, others))
        difference = corners - other_corners if self.l1_format == "xyxy" else boxes - others
        iou, giou = iou_and_generalized_iou(corners, other_corners)
        return difference.abs().sum(dim=-1), 1 - giou, iou
