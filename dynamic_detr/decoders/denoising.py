"""Noised copies of true boxes, which a decoder refines in training."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..runtime.transfers import to_device
from ..structures import copied_objects

__all__ = ["noised_copies"]

SHIFT = 0.3  # in sizes of the box
LOG_SCALE = 0.5


def noised_copies(boxes: Sequence[Tensor], count: int) -> Tensor:
    """Return copies of boxes, moved and scaled at random, as in DN-DETR (arXiv 2203.01305).

    Args:
        boxes: (T_b, 4) cx, cy, w, h of each of B images, normalised.
        count: number of copies in each image, N.

    Returns:
        (B, N, 4), copies of the boxes that `copied_objects` names. The centre is moved by at most
        `SHIFT` times the size of the box; width and height are multiplied by a factor between
        exp(-`LOG_SCALE`) and exp(`LOG_SCALE`). Copies of an image without boxes have no meaning.
    """
    filled = [b if len(b) else b.new_full((1, 4), 0.5) for b in boxes]
    index = to_device(copied_objects([len(b) for b in boxes], count), filled[0].device)
    copies = pad_sequence(filled, batch_first=True).gather(1, index[..., None].expand(-1, -1, 4))
    noise = 2 * torch.rand_like(copies) - 1
    center = copies[..., :2] + SHIFT * noise[..., :2] * copies[..., 2:]
    return torch.cat([center, (LOG_SCALE * noise[..., 2:]).exp() * copies[..., 2:]], dim=-1)
