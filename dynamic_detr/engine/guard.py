"""What training does when a loss or a gradient is not finite: name the place, keep the weights.

Every process looks at the same reduced numbers before its optimiser steps, so all of them stop at
the same iteration and the weights in memory are still those of the iteration before.
"""

import math
import re

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

_STAGE_SUFFIX = re.compile(r"_(\d+)$")


def stage_of(name: str, names: list[str]) -> int | None:
    """The decoder stage, from 1, that a loss belongs to.

    Args:
        name: ``loss_giou_2`` is the third stage; ``loss_giou`` the last one.
        names: every loss's name; without numbered ones among them there are no stages.
    """
    numbers = [int(m.group(1)) for m in map(_STAGE_SUFFIX.search, names) if m]
    if not numbers or not name.startswith("loss_"):
        return None
    match = _STAGE_SUFFIX.search(name)
    return int(match.group(1)) + 1 if match else max(numbers) + 2


def where(losses: dict[str, float]) -> str:
    """Name the losses that are not finite, the earliest stage first; empty if all are finite."""
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
    """The file of the first image or annotation in a batch that is not finite; else empty."""
    for record in batch:
        tensors = {"image": record.get("image")}
        if "instances" in record and record["instances"].has("gt_boxes"):
            tensors["boxes"] = record["instances"].gt_boxes.tensor
        for what, tensor in tensors.items():
            if tensor is not None and not torch.isfinite(tensor).all():
                return f"the {what} of {record.get('file_name', 'an image')} are not finite numbers"
    return ""


def _has_random_frozen_norm(cfg: CfgNode) -> bool:
    return not cfg.MODEL.WEIGHTS and cfg.MODEL.RESNETS.NORM == "FrozenBN"


def likely_cause(cfg: CfgNode, model: nn.Module, batch: list[dict], iteration: int) -> str:
    """Look for the cause of a non-finite loss or gradient and say what to try.

    Must be called on every process: what one of them finds in its part of the batch, all report.

    Args:
        cfg: the configuration of the run.
        model: with its weights from before the step.
        batch: this process's part of the batch.
        iteration: from 0.
    """
    found = next((text for text in comm.all_gather(_bad_input(batch)) if text), "")
    if found:
        return f"bad data: {found}"
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            return f"bad weights: {name} is not finite already; check MODEL.WEIGHTS"
    if iteration < cfg.SOLVER.WARMUP_ITERS and _has_random_frozen_norm(cfg):
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a GPU or of the machine is used up."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def what_fits(cfg: CfgNode, world_size: int, training: bool = True) -> str:
    """Advice for a run that is out of memory.

    Args:
        cfg: the configuration of the run.
        world_size: how many processes share each batch.
        training: rather than evaluating, where a batch is one image.
    """
    if not training:
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
