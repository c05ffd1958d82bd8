"""Building a configured detector with its weights for inference."""

import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from ..engine.build import build_detector
from ..engine.checkpoint import SafeCheckpointer
from ..errors import UserError
from ..files.model_file import is_model_file
from ..files.reading import require_finite

__all__ = ["build_with_weights"]

logger = logging.getLogger(__name__)


class _Checkpointer(SafeCheckpointer):
    """Checkpointer that reports weights that do not match the model in one line."""

    def __init__(self, model: nn.Module, path: str) -> None:
        super().__init__(model, strict_classes=True)
        self.path = path

    def _log_incompatible_keys(self, incompatible) -> None:
        missing = incompatible.missing_keys
        if is_model_file(self.path) and (missing or incompatible.incorrect_shapes):
            name = [*missing, *(entry[0] for entry in incompatible.incorrect_shapes)][0]
            raise UserError(
                f"the weights in {self.path} do not fit the configured model ({name} is missing or "
                "has another shape)"
            )
        super()._log_incompatible_keys(incompatible._replace(missing_keys=[], unexpected_keys=[]))
        if missing:
            logger.warning(
                f"{len(missing)} of the detector's tensors are not in the weights (such as "
                f"{missing[0]}) and stay random: expect no sensible boxes"
            )


def build_with_weights(cfg: CfgNode) -> tuple[nn.Module, dict[str, Any]]:
    """Build `MODEL` and load `MODEL.WEIGHTS`, on the CPU if there is no GPU.

    Args:
        cfg: `MODEL.WEIGHTS` is a path, the name of a shipped model, or a URL (`https://`,
            `detectron2://`).

    Returns:
        The model in evaluation mode, and the content of the file except the weights.

    Raises:
        UserError: the model cannot be built, or the weights are missing, damaged, not finite, or
            have another number of classes.
    """
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("no GPU is available: running on the CPU")
        cfg.MODEL.DEVICE = "cpu"
    model = build_detector(cfg)
    if not cfg.MODEL.WEIGHTS:
        logger.warning("MODEL.WEIGHTS is empty: the detector is not trained")
    rest = _Checkpointer(model, cfg.MODEL.WEIGHTS).load(cfg.MODEL.WEIGHTS, checkpointables=[])
    require_finite(model, cfg.MODEL.WEIGHTS)
    return model.eval(), rest
