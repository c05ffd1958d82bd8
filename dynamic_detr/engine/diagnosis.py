"""Likely causes of failed training steps, in one line with what to try."""

import math
import re

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from ..errors import UserError, one_line
from .stopping import EXIT_UNFORESEEN, EXIT_USER_ERROR

__all__ = ["describe_error", "likely_cause", "non_finite_losses", "stage_of"]

_STAGE_SUFFIX = re.compile(r"_(\d+)$")


def stage_of(name: str, names: list[str]) -> int | None:
    """Return the decoder stage of a loss, from 1; None for a loss of no stage.

    Args:
        name: name of the loss; ``loss_giou_2`` is of the third stage, ``loss_giou`` of the last.
        names: names of all losses; without numbered ones there are no stages.
    """
    numbers = [int(m.group(1)) for m in map(_STAGE_SUFFIX.search, names) if m]
    if not numbers or not name.startswith("loss_"):
        return None
    match = _STAGE_SUFFIX.search(name)
    return int(match.group(1)) + 1 if match else max(numbers) + 2


def non_finite_losses(losses: dict[str, float]) -> str:
    """Name the first loss, by stage, that is not finite, and how many others there are, or ""."""
    names = list(losses)
    bad = sorted(
        (stage_of(name, names) or 0, name)
        for name, value in losses.items()
        if not math.isfinite(value)
    )
    if not bad:
        return ""
    stage, name = bad[0]
    others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    return f"{name} (stage {stage}){others}" if stage else f"{name}{others}"


def _bad_input(batch: list[dict]) -> str:
    """Return a message on the first image or boxes that are not finite; "" if there are none."""
    for record in batch:
        tensors = {"image": record.get("image")}
        if "instances" in record and record["instances"].has("gt_boxes"):
            tensors["boxes"] = record["instances"].gt_boxes.tensor
        for what, tensor in tensors.items():
            if tensor is not None and not torch.isfinite(tensor).all():
                return f"the {what} of {record.get('file_name', 'an image')} are not finite numbers"
    return ""


def likely_cause(cfg: CfgNode, model: nn.Module, batch: list[dict], iteration: int) -> str:
    """Return the likely cause of a non-finite loss or gradient, and what to try.

    Must be called on every process: all report what one finds in its part of the batch.

    Args:
        cfg: configuration of the run.
        model: model with the weights from before the step.
        batch: this process's part of the batch.
        iteration: iteration of the step, from 0.
    """
    found = next((text for text in comm.all_gather(_bad_input(batch)) if text), "")
    if found:
        return f"bad data: {found}"
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            return f"bad weights: {name} is not finite already; check MODEL.WEIGHTS"
    random_frozen_norm = not cfg.MODEL.WEIGHTS and cfg.MODEL.RESNETS.NORM == "FrozenBN"
    if iteration < cfg.SOLVER.WARMUP_ITERS and random_frozen_norm:
        return (
            "frozen batch norm over random weights; give pretrained MODEL.WEIGHTS, "
            "or MODEL.RESNETS.NORM BN or GN with MODEL.BACKBONE.FREEZE_AT 0"
        )
    if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "float16":
        return "float16 overflows; try SOLVER.AMP.DTYPE bfloat16, or SOLVER.AMP.ENABLED False"
    unclipped = not cfg.SOLVER.CLIP_GRADIENTS.ENABLED
    return (
        f"the learning rate is too high; lower SOLVER.BASE_LR ({cfg.SOLVER.BASE_LR:g}) or lengthen "
        f"SOLVER.WARMUP_ITERS ({cfg.SOLVER.WARMUP_ITERS})"
        + (", and set SOLVER.CLIP_GRADIENTS.ENABLED True" if unclipped else "")
    )


def describe_error(
    error: Exception, cfg: CfgNode, world_size: int, training: bool
) -> tuple[str, int]:
    """Return a line on an error that ends the run, and its exit code.

    Args:
        error: error of this process.
        cfg: configuration of the run.
        world_size: number of processes that share each batch.
        training: whether the model was training, not evaluating.
    """
    if isinstance(error, UserError):
        return one_line(error), EXIT_USER_ERROR
    if _is_out_of_memory(error):
        advice = _memory_advice(cfg, world_size, training)
        return f"out of memory ({one_line(error)[:200]}); {advice}", EXIT_USER_ERROR
    return f"{type(error).__name__}: {one_line(error)[:300]}", EXIT_UNFORESEEN


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _memory_advice(cfg: CfgNode, world_size: int, training: bool) -> str:
    if not training:  # one image at a time
        return f"lower INPUT.MAX_SIZE_TEST ({cfg.INPUT.MAX_SIZE_TEST})"
    advice = []
    share = cfg.SOLVER.IMS_PER_BATCH // world_size
    if share > 1:
        advice.append(f"set SOLVER.IMS_PER_BATCH {share // 2 * world_size}")
    node = cfg.MODEL.SET_DETECTOR.ACTIVATION_CHECKPOINT
    off = [name for name, is_on in node.items() if not is_on]
    if off and cfg.MODEL.META_ARCHITECTURE in ("SetDetector", "DynamicDETR"):
        keys = ", ".join(off)
        advice.append(f"set {keys} of MODEL.SET_DETECTOR.ACTIVATION_CHECKPOINT True")
    advice.append(f"lower INPUT.MAX_SIZE_TRAIN ({cfg.INPUT.MAX_SIZE_TRAIN})")
    return ", or ".join(advice)
