"""Reference of DETR from layers of PyTorch and torchvision, with the published names."""

import math

import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

HEADS = 8


def sine_positions(height: int, width: int, channels: int) -> Tensor:
    """Return the sine embedding (HW, C), one entry at a time."""
    table = torch.zeros(height, width, channels)
    half = channels // 2
    for row in range(height):
        for column in range(width):
            for start, place in ((0, (row + 1) / height), (half, (column + 1) / width)):
                for k in range(half // 2):
                    angle = 2 * math.pi * place / 10_000 ** (2 * k / half)
                    table[row, column, start + 2 * k] = math.sin(angle)
                    table[row, column, start + 2 * k + 1] = math.cos(angle)
    return table.flatten(0, 1)


class DETR(nn.Module):
    """DETR without dropout, for one unpadded image.

    Args:
        rows: rows of the class head.
        channels: channels C of the transformer.
        ffn_dim: hidden units of the feed-forward networks.
        queries: Q.
        layers: layers of encoder and decoder.
        width: channels of the first 3×3 convolution of the ResNet-50.
    """

    def __init__(
        self, rows: int, channels: int, ffn_dim: int, queries: int, layers: int, width: int
    ) -> None:
        super().__init__()
        body = torchvision.models.resnet50(width_per_group=width, norm_layer=FrozenBatchNorm2d)
        del body.fc, body.avgpool
        self.backbone = nn.ModuleList([nn.ModuleDict({"body": body})])
        self.input_proj = nn.Conv2d(2048, channels, 1)
        self.query_embed = nn.Embedding(queries, channels)
        sizes = (channels, HEADS, ffn_dim, 0.0)
        encoder, decoder = nn.TransformerEncoderLayer(*sizes), nn.TransformerDecoderLayer(*sizes)
        self.transformer = nn.ModuleDict(
            {
                "encoder": nn.TransformerEncoder(encoder, layers, enable_nested_tensor=False),
                "decoder": nn.TransformerDecoder(decoder, layers, nn.LayerNorm(channels)),
            }
        )
        self.class_embed = nn.Linear(channels, rows)
        self.bbox_embed = nn.ModuleDict(
            {"layers": nn.ModuleList(nn.Linear(channels, n) for n in (channels, channels, 4))}
        )

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Map (1, 3, H, W) to logits (Q, rows) and boxes (Q, 4) of the last layer."""
        x = image
        for layer in self.backbone[0]["body"].children():
            x = layer(x)
        x = self.input_proj(x)[0]
        positions = sine_positions(*x.shape[1:], len(x)).to(x.dtype)[:, None]
        memory = x.flatten(1).t()[:, None]  # (HW, 1, C)
        for layer in self.transformer["encoder"].layers:
            place = memory + positions
            memory = layer.norm1(memory + layer.self_attn(place, place, memory)[0])
            memory = layer.norm2(memory + layer.linear2(layer.linear1(memory).relu()))
        query_positions = self.query_embed.weight[:, None]
        queries = torch.zeros_like(query_positions)
        for layer in self.transformer["decoder"].layers:
            place = queries + query_positions
            queries = layer.norm1(queries + layer.self_attn(place, place, queries)[0])
            place = queries + query_positions
            attended = layer.multihead_attn(place, memory + positions, memory)[0]
            queries = layer.norm2(queries + attended)
            queries = layer.norm3(queries + layer.linear2(layer.linear1(queries).relu()))
        queries = self.transformer["decoder"].norm(queries)[:, 0]
        x = queries
        for layer in self.bbox_embed["layers"][:-1]:
            x = layer(x).relu()
        return self.class_embed(queries), self.bbox_embed["layers"][-1](x).sigmoid()
