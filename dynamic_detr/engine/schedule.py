"""Training schedule: scaled to the number of processes, checked, and described in one line."""

import logging

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from ..errors import UserError

logger = logging.getLogger(__name__)


def scale_schedule(cfg: CfgNode, world_size: int, scale_to: int | None = None) -> CfgNode:
    """Scale batch, learning rate and iterations as Detectron2 does for ``REFERENCE_WORLD_SIZE``.

    Args:
        cfg: configuration; not changed.
        world_size: number of processes.
        scale_to: number of processes to scale to; None for ``world_size``.

    Returns:
        The scaled configuration.

    Raises:
        UserError: the batch cannot be divided equally among the processes, or the schedule is
            empty.
    """
    solver = cfg.SOLVER
    reference = solver.REFERENCE_WORLD_SIZE
    if reference and solver.IMS_PER_BATCH % reference:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} does not divide among the "
            f"SOLVER.REFERENCE_WORLD_SIZE {reference} processes"
        )
    period = cfg.TEST.EVAL_PERIOD
    cfg = DefaultTrainer.auto_scale_workers(cfg, scale_to or world_size)
    if reference and scale_to not in (None, world_size):
        logger.info(f"The schedule stays that of the {scale_to} processes of the run's start")
    if period and not cfg.TEST.EVAL_PERIOD:  # 0 would turn evaluations off
        cfg = cfg.clone()
        cfg.defrost()
        cfg.TEST.EVAL_PERIOD = 1
    solver = cfg.SOLVER
    if solver.IMS_PER_BATCH < 1 or solver.IMS_PER_BATCH % world_size:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} does not divide among {world_size} "
            "processes"
        )
    if solver.MAX_ITER < 1:
        raise UserError(f"SOLVER.MAX_ITER is {solver.MAX_ITER}; it must be at least 1")
    if solver.CHECKPOINT_PERIOD < 1:
        raise UserError(
            f"SOLVER.CHECKPOINT_PERIOD is {solver.CHECKPOINT_PERIOD}; it must be at least 1"
        )
    reached = tuple(step for step in solver.STEPS if step < solver.MAX_ITER)
    if reached != tuple(solver.STEPS):  # Detectron2 fails on a step at MAX_ITER
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SOLVER.STEPS = reached
        logger.warning(f"SOLVER.STEPS at or after SOLVER.MAX_ITER are removed; left: {reached}")
    return cfg


def describe_schedule(cfg: CfgNode, world_size: int, seed: int, images: int = 0) -> str:
    """Return a line with length, batch size, learning rate, clipping, precision and seed.

    Args:
        cfg: configuration from :func:`scale_schedule`.
        world_size: number of processes.
        seed: seed of the run.
        images: number of training images, for the number of epochs; 0 if unknown.
    """
    solver = cfg.SOLVER
    batch = solver.IMS_PER_BATCH
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        decay = f"x{solver.GAMMA:g} at {', '.join(map(str, solver.STEPS)) or 'no iteration'}"
    else:
        decay = solver.LR_SCHEDULER_NAME
    clip = solver.CLIP_GRADIENTS
    epochs = (
        f" = {solver.MAX_ITER * batch / images:.3g} epochs of {images} images" if images else ""
    )
    return (
        f"Schedule: {solver.MAX_ITER} iterations x {batch} images "
        f"({batch // world_size} on each of {world_size} processes, {cfg.MODEL.DEVICE}){epochs} | "
        f"{solver.OPTIMIZER} lr {solver.BASE_LR:g}, {decay}, warm-up {solver.WARMUP_ITERS} | "
        f"clip {f'{clip.CLIP_TYPE} {clip.CLIP_VALUE:g}' if clip.ENABLED else 'off'} | "
        f"AMP {solver.AMP.DTYPE if solver.AMP.ENABLED else 'off'} | "
        f"EMA {solver.EMA.DECAY if solver.EMA.ENABLED else 'off'} | seed {seed}"
    )
