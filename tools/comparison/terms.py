"""Equal terms: settings that all detectors of a comparison share.

The first configuration, with the keys of the command line, sets

- data, input size, augmentation and the order of images (``DATASETS``, ``INPUT``, ``DATALOADER``);
- batch size, iterations, warm-up, the decay steps of the learning rate as shares of the
  iterations, mixed precision and the moving average of the weights;
- evaluation (``TEST``) and the number of classes;
- the initial weights of the backbone and the settings that they require, for each detector with a
  ResNet of the same size. If they are the weights of a trained detector, only those of its backbone
  are used.

Each detector keeps its non-maximum suppression, and its optimiser with weight decay, gradient
clipping and multipliers of the learning rate. The learning rate of its recipe is scaled from the
recipe's batch size to that of the comparison: linearly for SGD, by the square root for AdamW.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.config import CfgNode
from torch import nn

from dynamic_detr.config import class_count, set_class_count
from dynamic_detr.engine.checkpoint import SafeCheckpointer
from dynamic_detr.errors import UserError
from dynamic_detr.files.config_file import find_config, read_config

__all__ = ["Terms", "compose", "read_first", "scaled_rate"]

_NODES = ("DATASETS", "DATALOADER", "INPUT", "TEST")
_SCHEDULE = (
    *("IMS_PER_BATCH", "REFERENCE_WORLD_SIZE", "MAX_ITER", "STEPS", "GAMMA", "LR_SCHEDULER_NAME"),
    *("WARMUP_ITERS", "WARMUP_FACTOR", "WARMUP_METHOD", "BASE_LR_END", "NUM_DECAYS"),
    *("RESCALE_INTERVAL", "CHECKPOINT_PERIOD", "KEEP_CHECKPOINTS", "AMP", "EMA"),
)
_RESNET_SIZE = ("DEPTH", "NUM_GROUPS", "WIDTH_PER_GROUP", "STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS")
_WITH_WEIGHTS = (  # settings that the weights require
    *("WEIGHTS", "PIXEL_MEAN", "PIXEL_STD", "BACKBONE.FREEZE_AT"),
    *("RESNETS.NORM", "RESNETS.STRIDE_IN_1X1"),
)
_GIVEN = {  # keys that flags of compare.py set
    "SOLVER.MAX_ITER": "--iterations",
    "SOLVER.STEPS": "--iterations",
    "TEST.EVAL_PERIOD": "--evaluations",
    "OUTPUT_DIR": "--output",
    "SEED": "--seeds",
}
LONGEST_WARMUP = 0.1  # share of the iterations


@dataclass(frozen=True)
class Terms:
    """The terms of one detector.

    Args:
        optimizer: "SGD" or "ADAMW".
        recipe_rate: learning rate of its configuration.
        recipe_batch: batch size of its configuration.
        rate: learning rate in the comparison.
        rule: formula of `rate`.
        clip: gradient clipping.
        start: source of the initial weights of the backbone.
    """

    optimizer: str
    recipe_rate: float
    recipe_batch: int
    rate: float
    rule: str
    clip: str
    start: str


def scaled_rate(rate: float, recipe_batch: int, batch: int, optimizer: str) -> float:
    """Scale a learning rate to a batch size: linearly for SGD, by the square root for AdamW."""
    ratio = batch / recipe_batch
    return rate * (ratio if optimizer == "SGD" else math.sqrt(ratio))


def read_first(
    config_file: str, keys: list[str], iterations: int | None, evaluations: int, folder: Path
) -> CfgNode:
    """Read the configuration that sets the shared terms.

    Args:
        config_file: path, or name in Detectron2's model zoo.
        keys: keys and values of the command line, alternating.
        iterations: iterations of each run; None for those of the configuration.
        evaluations: number of evaluations at equal intervals, the last one at the end.
        folder: folder of the comparison; the shared backbone of a trained detector is written
            there.

    Raises:
        UserError: the configuration does not exist or is invalid, or a flag sets one of the keys.
    """
    for key in keys[::2]:
        if key in _GIVEN:
            raise UserError(f"{key} is set by {_GIVEN[key]} in a comparison; omit the key")
    cfg = read_config(find_config(config_file), keys)
    solver = cfg.SOLVER
    length = solver.MAX_ITER if iterations is None else iterations
    solver.STEPS = tuple(round(step / solver.MAX_ITER * length) for step in solver.STEPS)
    solver.WARMUP_ITERS = min(solver.WARMUP_ITERS, round(LONGEST_WARMUP * length))
    solver.MAX_ITER, solver.REFERENCE_WORLD_SIZE = length, 0
    cfg.TEST.EVAL_PERIOD = -(-length // evaluations)
    cfg.TEST.EXPECTED_RESULTS, cfg.TEST.AUG.ENABLED = [], False
    solver.CHECKPOINT_PERIOD = min(solver.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD)
    if cfg.MODEL.WEIGHTS:
        cfg.MODEL.WEIGHTS = _start(cfg.MODEL.WEIGHTS, folder)
    return cfg


def _start(weights: str, folder: Path) -> str:
    """Return initial weights to share; of a trained detector, a file of its backbone.

    Raises:
        UserError: the weights cannot be read, or belong to a detector without a shareable backbone.
    """
    model = SafeCheckpointer(nn.Module()).read(weights)["model"]
    if not any(name.startswith("backbone.") for name in model):
        return weights
    prefix = "backbone.bottom_up."
    shared = {k.removeprefix(prefix): v for k, v in model.items() if k.startswith(prefix)}
    if not shared:
        raise UserError(f"{weights} has no {prefix}*: its backbone cannot be shared")
    path = folder / f"backbone_of_{Path(weights).stem}.pth"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": shared, "matching_heuristics": True}, path)
    return str(path)


def compose(config_file: str, first: CfgNode, keys: list[str]) -> tuple[CfgNode, Terms]:
    """Put a detector's configuration on the shared terms.

    Args:
        config_file: path, or name in Detectron2's model zoo.
        first: result of `read_first`; not changed.
        keys: keys and values for every detector, alternating.

    Returns:
        The configuration and its terms.

    Raises:
        UserError: the configuration does not exist or is invalid.
    """
    path = find_config(config_file)
    recipe = read_config(path, []).SOLVER
    # `first` already has the weights of this key, for detectors that can share them.
    pairs = zip(keys[::2], keys[1::2], strict=True)
    keys = [word for pair in pairs if pair[0] != "MODEL.WEIGHTS" for word in pair]
    cfg = read_config(path, keys)
    own_format = cfg.INPUT.FORMAT
    for node in _NODES:
        cfg[node] = first[node].clone()
    for key in _SCHEDULE:
        if key in first.SOLVER:
            value = first.SOLVER[key]
            cfg.SOLVER[key] = value.clone() if isinstance(value, CfgNode) else value
    if (classes := class_count(first)) is not None:
        set_class_count(cfg, classes)
    if shared := _same_backbone(cfg, first):
        _take_weights(cfg, first)
    else:
        cfg.INPUT.FORMAT = own_format
    if not cfg.MODEL.WEIGHTS:  # the multiplier is for pretrained weights
        cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    optimizer = cfg.SOLVER.OPTIMIZER
    if optimizer != recipe.OPTIMIZER and "SOLVER.BASE_LR" not in keys[::2]:
        raise UserError(
            f"{path} has a learning rate for {recipe.OPTIMIZER}; with {optimizer}, set "
            "SOLVER.BASE_LR too"
        )
    batch = cfg.SOLVER.IMS_PER_BATCH
    cfg.SOLVER.BASE_LR = scaled_rate(recipe.BASE_LR, recipe.IMS_PER_BATCH, batch, optimizer)
    cfg.merge_from_list(keys)
    ratio = f"{batch}/{recipe.IMS_PER_BATCH}"
    rule = f"{recipe.BASE_LR:g} x {ratio if optimizer == 'SGD' else f'sqrt({ratio})'}"
    if "SOLVER.BASE_LR" in keys[::2]:
        rule = "as given"
    clip = cfg.SOLVER.CLIP_GRADIENTS
    return cfg, Terms(
        optimizer=cfg.SOLVER.OPTIMIZER,
        recipe_rate=recipe.BASE_LR,
        recipe_batch=recipe.IMS_PER_BATCH,
        rate=cfg.SOLVER.BASE_LR,
        rule=rule,
        clip=f"{clip.CLIP_TYPE} {clip.CLIP_VALUE:g}" if clip.ENABLED else "off",
        start=("shared: " if shared else "own: ") + (Path(cfg.MODEL.WEIGHTS).name or "random"),
    )


def _same_backbone(cfg: CfgNode, first: CfgNode) -> bool:
    """Return whether both backbones are ResNets of the same shapes."""
    return all("resnet" in c.MODEL.BACKBONE.NAME for c in (cfg, first)) and all(
        cfg.MODEL.RESNETS[key] == first.MODEL.RESNETS[key] for key in _RESNET_SIZE
    )


def _take_weights(cfg: CfgNode, first: CfgNode) -> None:
    for name in _WITH_WEIGHTS:
        *node, key = name.split(".")
        source, target = first.MODEL, cfg.MODEL
        for part in node:
            source, target = source[part], target[part]
        target[key] = source[key]
