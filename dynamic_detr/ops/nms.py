"""Non-maximum suppression of a fixed number of boxes, without a look at any value on a GPU."""

import torch
from torch import Tensor
from torchvision.ops import box_iou

__all__ = ["nms_mask"]

ROUNDS = 16


@torch.no_grad()
def nms_mask(boxes: Tensor, iou_threshold: float) -> Tensor:
    """Which boxes greedy non-maximum suppression keeps.

    A box is kept unless a better one that is kept overlaps it. Each of the `ROUNDS` rounds applies
    this rule to all boxes at once. The n-th round settles every box that the first n of a chain
    of overlapping boxes decide on, so that the result is `torchvision.ops.nms`'s unless a chain
    of boxes, each of which would be suppressed by the one before, is longer than `ROUNDS`.

    Args:
        boxes: (B, N, 4) corners, those of each image best first.
        iou_threshold: a box overlaps another if their IoU is greater.

    Returns:
        (B, N) bool, True for boxes that are kept.
    """
    overlaps = torch.vmap(box_iou)(boxes, boxes) > iou_threshold
    # (B, N, N): row, a better box; column, a worse one. A product counts the first that are kept.
    suppresses = overlaps.triu(diagonal=1).to(boxes.dtype)
    kept = torch.ones_like(suppresses[:, :1])
    for _ in range(ROUNDS):
        kept = (kept @ suppresses < 0.5).to(boxes.dtype)
    return kept[:, 0] > 0.5
