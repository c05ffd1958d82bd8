"""Encoder of DETR (section 3.2): self-attention over all positions of a pyramid."""

from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ..config import check_arguments
from ..layers import Attention, FeedForward, apply_layer, check_heads, padding_mask, sine_positions
from ..structures import Pyramid
from .build import ENCODER_REGISTRY

__all__ = ["TransformerEncoder", "TransformerEncoderLayer"]


class TransformerEncoderLayer(nn.Module):
    """Self-attention and a feed-forward network; see `TransformerEncoder`."""

    def __init__(self, channels: int, num_heads: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = Attention(channels, num_heads, dropout)
        self.ffn = FeedForward(channels, ffn_dim, dropout)

    def forward(self, table: Tensor, positions: Tensor, padding: Tensor | None) -> Tensor:
        """Apply the layer.

        Args:
            table: (B, ΣHW, C) features of all levels, flattened and concatenated.
            positions: (B, ΣHW, C) position embeddings, added to queries and keys.
            padding: (B, ΣHW) bool, True for positions to ignore; None if there are none.

        Returns:
            (B, ΣHW, C), undefined in the padding.
        """
        return self.ffn(self.self_attention(table, positions, padding=padding))


@ENCODER_REGISTRY.register()
class TransformerEncoder(nn.Module):
    """Stack of transformer layers over the positions of all levels, without a final norm.

    Args:
        channels: C, divisible by 4.
        num_layers: number of layers.
        num_heads: number of attention heads.
        ffn_dim: hidden units of the feed-forward networks.
        dropout: dropout probability, see `Attention` and `FeedForward`.
        checkpoint_layers: use activation checkpointing, which recomputes each layer in the backward
            pass.

    Raises:
        ValueError: an argument is out of range, or the heads do not divide the channels.
    """

    @configurable
    def __init__(
        self,
        channels: int,
        *,
        num_layers: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        checkpoint_layers: bool,
    ) -> None:
        super().__init__()
        node = "MODEL.TRANSFORMER_ENCODER"
        options = {"num_heads": num_heads, "ffn_dim": ffn_dim, "dropout": dropout}
        check_arguments(node, num_layers=num_layers, **options)
        check_heads(node, num_heads, channels)
        self.checkpoint_layers = checkpoint_layers
        self.layers = nn.ModuleList(
            TransformerEncoderLayer(channels, **options) for _ in range(num_layers)
        )
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        detector, encoder = cfg.MODEL.SET_DETECTOR, cfg.MODEL.TRANSFORMER_ENCODER
        return {
            "channels": detector.HIDDEN_DIM,
            "checkpoint_layers": detector.ACTIVATION_CHECKPOINT.ENCODER,
            **{name.lower(): value for name, value in encoder.items()},
        }

    def forward(self, pyramid: Pyramid) -> Pyramid:
        """Return a pyramid of the same shape, with zeros in the padding."""
        table, padding = pyramid.masked().table(), padding_mask(pyramid)
        positions = sine_positions(pyramid, pyramid.channels, offset=1).to(table.dtype)
        recompute = self.checkpoint_layers and self.training
        for layer in self.layers:
            table = apply_layer(layer, table, positions, padding, recompute=recompute)
        return pyramid.with_table(table).masked()
