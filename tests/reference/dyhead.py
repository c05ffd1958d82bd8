"""Reference of the published DyHead code with its names: the first two attentions and the DyReLU on
a padded batch, with torchvision's deformable convolution."""

import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import deform_conv2d


def dyhead_block(levels: list[Tensor], weights: dict[str, Tensor], groups: int) -> list[Tensor]:
    """Apply a block to levels (B, C, H, W), fine to coarse, without regard to padding."""

    def branch(index: int, image: Tensor, offset: Tensor, mask: Tensor, stride: int) -> Tensor:
        # The published kernel reads the flattened offsets and masks of an image as if they had the
        # shape of its output.
        _, _, height, width = image.shape
        height, width = (height - 1) // stride + 1, (width - 1) // stride + 1
        offset = offset.flatten(1)[:, : 18 * height * width].view(-1, 18, height, width)
        mask = mask.flatten(1)[:, : 9 * height * width].view(-1, 9, height, width)
        name = f"DyConv.{index}"
        weight, bias = weights[f"{name}.conv.weight"], weights[f"{name}.conv.bias"]
        out = deform_conv2d(image, offset, weight, bias, stride=stride, padding=1, mask=mask)
        scale, shift = weights[f"{name}.bn.weight"], weights[f"{name}.bn.bias"]
        return F.group_norm(out, groups, scale, shift)

    result = []
    for index, level in enumerate(levels):
        predicted = F.conv2d(level, weights["offset.weight"], weights["offset.bias"], padding=1)
        offset, mask = predicted[:, :18].contiguous(), predicted[:, 18:].sigmoid().contiguous()
        maps = [branch(1, level, offset, mask, 1)]
        if index > 0:
            maps.append(branch(2, levels[index - 1], offset, mask, 2))
        if index + 1 < len(levels):
            coarse = branch(0, levels[index + 1], offset, mask, 1)
            maps.append(F.interpolate(coarse, level.shape[2:], mode="bilinear", align_corners=True))
        fused = 0
        for image in maps:
            pooled = F.adaptive_avg_pool2d(image, 1)
            score = F.conv2d(
                pooled, weights["AttnConv.1.weight"], weights["AttnConv.1.bias"]
            ).relu()
            fused = fused + image * (F.relu6(score + 3) / 6)
        fused = fused / len(maps)

        pooled = fused.mean(dim=(2, 3))
        hidden = F.linear(pooled, weights["relu.fc.0.weight"], weights["relu.fc.0.bias"]).relu()
        y = F.linear(hidden, weights["relu.fc.2.weight"], weights["relu.fc.2.bias"])
        a1, b1, a2, b2 = (F.relu6(y + 3) / 6)[:, :, None, None].split(level.shape[1], dim=1)
        result.append(
            ((2 * (a1 - 0.5) + 1) * fused + b1 - 0.5).maximum(2 * (a2 - 0.5) * fused + b2 - 0.5)
        )
    return result
