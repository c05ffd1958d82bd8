"""Non-maximum suppression of batched boxes without synchronising with the device."""

import torch
from torch import Tensor
from torchvision.ops import box_iou

__all__ = ["nms_mask"]

ROUNDS = 16


@torch.no_grad()
def nms_mask(boxes: Tensor, iou_threshold: float) -> Tensor:
    """Return which boxes greedy non-maximum suppression keeps.

    A box is kept unless it overlaps a better box that is kept. Each of the `ROUNDS` rounds applies
    this rule to all boxes at once. After n rounds, the first n boxes of every chain are decided: a
    chain is a sequence of boxes each of which would be suppressed by the one before. The result
    therefore equals that of `torchvision.ops.nms` unless a chain is longer than `ROUNDS`.

    Args:
        boxes: (B, N, 4) corners, in each image from best to worst.
        iou_threshold: two boxes overlap if their IoU is greater.

    Returns:
        (B, N) bool, True for boxes that are kept.
    """
    overlaps = torch.vmap(box_iou)(boxes, boxes) > iou_threshold
    # (B, N, N): row, the better box; column, the worse one
    suppresses = overlaps.triu(diagonal=1).to(boxes.dtype)
    kept = torch.ones_like(suppresses[:, :1])
    for _ in range(ROUNDS):
        kept = (kept @ suppresses < 0.5).to(boxes.dtype)
    return kept[:, 0] > 0.5
