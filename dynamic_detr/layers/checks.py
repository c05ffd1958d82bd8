"""Checks of the arguments that encoders and decoders have in common."""

from torch import nn

from ..structures import Pyramid

__all__ = ["check_heads", "check_levels"]


def check_heads(node: str, num_heads: int, channels: int) -> None:
    """Check that the number of heads divides the number of channels.

    Args:
        node: config node with the key NUM_HEADS, for example "MODEL.TRANSFORMER_ENCODER".
        num_heads: attention heads.
        channels: C.

    Raises:
        ValueError: it does not.
    """
    if channels % num_heads:
        raise ValueError(
            f"{node}.NUM_HEADS is {num_heads}; it must divide MODEL.SET_DETECTOR.HIDDEN_DIM, which "
            f"is {channels}."
        )


def check_levels(module: nn.Module, num_levels: int | None, pyramid: Pyramid) -> None:
    """Check the number of levels of the input of a module.

    Args:
        module: its class is named in the error.
        num_levels: expected number of levels; None for any.
        pyramid: input of the module.

    Raises:
        ValueError: the pyramid has another number of levels.
    """
    if num_levels not in (None, len(pyramid)):
        raise ValueError(
            f"{type(module).__name__}: expected a pyramid of num_levels = {num_levels} levels, got "
            f"{len(pyramid)}."
        )
