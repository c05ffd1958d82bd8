"""Building the model of a configuration, and its wrapper for several processes."""

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError, one_line

__all__ = ["build_detector", "distribute"]

# Errors of constructors for wrong arguments, and for sizes that exceed the memory.
_ERRORS = (AssertionError, LookupError, ValueError, TypeError)
_ERRORS += (MemoryError, OverflowError, RuntimeError)


def build_detector(cfg: CfgNode) -> nn.Module:
    """Build the model on ``MODEL.DEVICE``.

    Raises:
        UserError: the configuration cannot be built, or needs more memory than there is.
    """
    try:
        return build_model(cfg)
    except _ERRORS as error:
        text = one_line(error)[:300]
        raise UserError(f"the configured model cannot be built: {text}") from error


def distribute(model: nn.Module) -> nn.Module:
    """Wrap a model for data-parallel training if there are several processes.

    Detectron2's ``create_ddp_model`` names a GPU even if the model is on the CPU.

    Args:
        model: model on the device where it is trained.
    """
    if comm.get_world_size() == 1:
        return model
    on_gpu = next(model.parameters()).is_cuda
    device_ids = [torch.cuda.current_device()] if on_gpu else None
    return DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)
