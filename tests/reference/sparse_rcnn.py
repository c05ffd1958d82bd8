"""Reference of the head of Sparse R-CNN with the published names and tensor layouts.

As in the published code, images and queries share one dimension, and the parameters of the dynamic
convolutions of a query are slices of one row.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

Weights = dict[str, Tensor]
FIRST_LEVEL, CANONICAL_LEVEL, CANONICAL_SIZE = 2, 4, 224
DELTA_WEIGHTS, SCALE_CLAMP = (2.0, 2.0, 1.0, 1.0), math.log(100_000.0 / 16)


def norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def pool(levels: list[Tensor], boxes: Tensor, bins: int) -> Tensor:
    """Pool boxes (B, N, 4), corners, from levels (B, C, H, W), to (B·N, C, bins, bins)."""
    batch, count = boxes.shape[:2]
    side = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1).sqrt()
    level = torch.floor(CANONICAL_LEVEL + torch.log2(side / CANONICAL_SIZE + 1e-8))
    level = level.clamp(FIRST_LEVEL, FIRST_LEVEL + len(levels) - 1).flatten() - FIRST_LEVEL
    index = torch.arange(batch, dtype=boxes.dtype).repeat_interleave(count)[:, None]
    rois = torch.cat([index, boxes.flatten(0, 1)], dim=1)
    pooled = levels[0].new_zeros(batch * count, levels[0].shape[1], bins, bins)
    for number, features in enumerate(levels):
        chosen = level == number
        scale = 1 / 2 ** (FIRST_LEVEL + number)
        pooled[chosen] = roi_align(features, rois[chosen], bins, scale, 2, aligned=True)
    return pooled


def apply_deltas(deltas: Tensor, boxes: Tensor) -> Tensor:
    """Refine boxes, corners to corners."""
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    x, y = boxes[:, 0] + 0.5 * width, boxes[:, 1] + 0.5 * height
    dx, dy, dw, dh = (d / w for d, w in zip(deltas.unbind(dim=1), DELTA_WEIGHTS, strict=True))
    x, y = dx * width + x, dy * height + y
    width, height = (d.clamp(max=SCALE_CLAMP).exp() * s for d, s in ((dw, width), (dh, height)))
    return torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], dim=1)


def stage(
    levels: list[Tensor], boxes: Tensor, queries: Tensor, weights: Weights, heads: int, bins: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Map boxes (B, N, 4), corners in pixels, and queries (B, N, C) to logits, boxes, queries."""
    batch, count, channels = queries.shape
    regions = pool(levels, boxes, bins).view(batch * count, channels, -1).permute(0, 2, 1)
    q = queries.permute(1, 0, 2)  # N, B, C
    names = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    in_weight, in_bias, out_weight, out_bias = (weights[f"self_attn.{name}"] for name in names)
    attended = F.multi_head_attention_forward(
        *(q, q, q, channels, heads, in_weight, in_bias, None, None, False, 0.0),
        *(out_weight, out_bias, False),
    )[0]
    q = norm(q + attended, weights, "norm1")
    q = q.permute(1, 0, 2).reshape(batch * count, channels)

    parameters = linear(q, weights, "inst_interact.dynamic_layer")
    size = parameters.shape[1] // 2
    first = parameters[:, :size].view(batch * count, channels, -1)
    second = parameters[:, size:].view(batch * count, -1, channels)
    x = F.relu(norm(torch.bmm(regions, first), weights, "inst_interact.norm1"))
    x = F.relu(norm(torch.bmm(x, second), weights, "inst_interact.norm2"))
    x = linear(x.flatten(1), weights, "inst_interact.out_layer")
    q = norm(q + F.relu(norm(x, weights, "inst_interact.norm3")), weights, "norm2")
    q = norm(
        q + linear(F.relu(linear(q, weights, "linear1")), weights, "linear2"), weights, "norm3"
    )

    outputs = []
    for module, layers in (("cls_module", 1), ("reg_module", 3)):
        x = q
        for layer in range(layers):
            x = linear(x, weights, f"{module}.{3 * layer}")
            x = F.relu(norm(x, weights, f"{module}.{3 * layer + 1}"))
        outputs.append(x)
    logits = linear(outputs[0], weights, "class_logits").view(batch, count, -1)
    deltas = linear(outputs[1], weights, "bboxes_delta")
    refined = apply_deltas(deltas, boxes.flatten(0, 1)).view(batch, count, 4)
    return logits, refined, q.view(batch, count, channels)


def head(
    levels: list[Tensor], image_sizes: Tensor, weights: Weights, heads: int, bins: int
) -> list[tuple[Tensor, Tensor]]:
    """Return logits and boxes (corners in pixels) of each stage; image_sizes: (B, 2) unpadded."""
    batch = len(image_sizes)
    scale = image_sizes.flip(1).repeat(1, 2)[:, None]
    center, size = weights["init_proposal_boxes.weight"].split(2, dim=1)
    boxes = torch.cat([center - size / 2, center + size / 2], dim=1) * scale
    queries = weights["init_proposal_features.weight"].expand(batch, -1, -1)
    stages = 1 + max(int(name.split(".")[2]) for name in weights if "head_series" in name)
    outputs = []
    for number in range(stages):
        prefix = f"head.head_series.{number}."
        own = {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}
        logits, boxes, queries = stage(levels, boxes, queries, own, heads, bins)
        outputs.append((logits, boxes))
        boxes = boxes.detach()
    return outputs
