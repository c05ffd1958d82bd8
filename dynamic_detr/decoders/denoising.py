"""Noised copies of true boxes, which a decoder refines in training.

After DN-DETR (arXiv 2203.01305). There, copies have noised classes too, which are also learned.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.transfers import to_device

__all__ = ["noised_copies"]

SHIFT = 0.3  # in sizes of the box
LOG_SCALE = 0.5


def noised_copies(boxes: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Return copies of boxes, moved and scaled at random.

    The boxes of an image have equal shares of its copies, up to one copy: all N / T_b on average.
    The random numbers are drawn on the host, so that they do not depend on the device.

    Args:
        boxes: (T_b, 4) cx, cy, w, h of each of B images, normalised.
        count: number of copies in each image, N.

    Returns:
        The copies (B, N, 4). The centre is moved by at most `SHIFT` times the size of the box;
        width and height are multiplied by a factor between exp(-`LOG_SCALE`) and exp(`LOG_SCALE`).
        And their boxes (B, N) int64, as indices of the concatenated boxes; -1 in images without
        boxes, whose copies have no meaning.
    """
    sizes = torch.tensor([[len(b)] for b in boxes])
    share = (torch.arange(count) + torch.rand(len(boxes), 1).double()) / count  # (B, N), in [0, 1)
    index = sizes.cumsum(0) - sizes + (share * sizes).long().clamp(max=sizes - 1)
    index = torch.where(sizes > 0, index, -1)
    shift, scale = (2 * torch.rand(len(boxes), count, 4) - 1).split(2, dim=-1)
    noise = torch.cat([SHIFT * shift, (LOG_SCALE * scale).exp()], dim=-1)
    index, noise = (to_device(tensor, boxes[0].device) for tensor in (index, noise))
    copies = torch.cat([*boxes, boxes[0].new_full((1, 4), 0.5)])[index]  # -1 is the added box
    shift, scale = noise.to(copies.dtype).split(2, dim=-1)
    center, size = copies.split(2, dim=-1)
    return torch.cat([center + shift * size, scale * size], dim=-1), index
