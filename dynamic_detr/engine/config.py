"""Configuration keys of the optimiser and the training loop, under ``SOLVER``."""

from detectron2.config import CfgNode


def add_solver_config(cfg: CfgNode) -> None:
    """Add this project's keys to ``cfg.SOLVER``; the defaults leave Detectron2's recipes alone.

    Detectron2's own configurations (Faster R-CNN, RetinaNet) therefore train with the SGD that
    they were written for; ``configs/Base-DynamicDETR.yaml`` switches to AdamW and full-model
    clipping.

    Args:
        cfg: a node that already holds Detectron2's defaults; changed in place.
    """
    solver = cfg.SOLVER
    # "SGD" (momentum and Nesterov as in Detectron2) or "ADAMW" (betas 0.9 and 0.999).
    solver.OPTIMIZER = "SGD"
    # Learning rate of the pretrained part of the backbone, as a multiple of BASE_LR: its
    # bottom-up network where it has one (an FPN's own convolutions start from scratch).
    solver.BACKBONE_MULTIPLIER = 1.0
    # The same for layers that predict sampling offsets (see OFFSET_MODULES in optimizer.py).
    solver.OFFSETS_MULTIPLIER = 1.0

    # CLIP_GRADIENTS.CLIP_TYPE also knows "full_model": the norm of all gradients together is
    # brought down to CLIP_VALUE. Detectron2's "value" and "norm" look at single parameters.

    # AMP.ENABLED is Detectron2's. "float16" scales the loss and needs a GPU; "bfloat16" does not.
    solver.AMP.DTYPE = "float16"
    # float16 skips a step whose gradients overflow; so many in a row end the training.
    solver.MAX_SKIPPED_STEPS = 20

    # Exponential moving average of the weights: evaluated, and saved as the checkpoint's "model".
    solver.EMA = CfgNode()
    solver.EMA.ENABLED = False
    solver.EMA.DECAY = 0.9998

    # How many of the periodic checkpoints stay on disk, the newest ones; 0 keeps all of them.
    # At least two, so that there is one to fall back to.
    solver.KEEP_CHECKPOINTS = 2
