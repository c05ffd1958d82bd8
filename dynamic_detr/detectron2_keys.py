"""Valid values of the Detectron2 configuration keys that this project uses.

Their defaults and reasons are in ``detectron2/config/defaults.py``. Detectron2 checks few of them:
wrong values raise an error inside the model or hours into a run, or none at all.
"""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from detectron2 import modeling
from detectron2.config import CfgNode

from .config import CLASS_COUNTS, FLAG, NAME, Range, number, one_of, require, value_of, whole

__all__ = ["RANGES", "check_detectron2_config"]

_INFINITY = float("inf")
STAGES = ["stem", "res2", "res3", "res4", "res5"]


def listed(item: Range, least: int = 0, most: int | None = None) -> Range:
    """Return the range of the lists of `least` to `most` items, each in the range of `item`."""

    def admits(value: object) -> bool:
        if not isinstance(value, (list, tuple)) or not least <= len(value):
            return False
        return (most is None or len(value) <= most) and all(map(item.admits, value))

    length = f" of {least}" if least == most else f" of {least} or more" if least else ""
    return Range(f"a list{length}, each {item.wanted}", admits)


def either(first: Range, second: Range) -> Range:
    return Range(
        f"{first.wanted}, or {second.wanted}",
        lambda value: first.admits(value) or second.admits(value),
    )


def rising(item: Range) -> Range:
    def admits(value: object) -> bool:
        return listed(item).admits(value) and all(a < b for a, b in pairwise(value))

    return Range(f"a rising list, each {item.wanted}", admits)


NONE = Range("None", lambda value: value is None)
TEXT = Range("a string", lambda value: isinstance(value, str))
DEVICE = Range(
    "'cpu', 'cuda' or 'cuda:N'",
    lambda value: isinstance(value, str) and re.fullmatch(r"cpu|cuda(:\d+)?", value) is not None,
)
NORM = one_of("", "BN", "SyncBN", "FrozenBN", "GN", "nnSyncBN", "naiveSyncBN", "LN")
SHARE = number(0, 1)
RATE = number(0, 1e30)
SIDE = whole(1, 2**15)
COUNT = whole(1)
SEED = whole(-1, 2**31)
NUMBER = number(-1e30, 1e30)
RESULT = Range(
    '["task", "metric", expected, tolerance]',
    lambda value: (
        listed(either(NUMBER, TEXT), 4, 4).admits(value)
        and [isinstance(part, str) for part in value] == [True, True, False, False]
    ),
)

RANGES: dict[str, Range] = {
    "OUTPUT_DIR": TEXT,
    "SEED": SEED,
    "VIS_PERIOD": whole(0),
    "CUDNN_BENCHMARK": FLAG,
    "MODEL.DEVICE": DEVICE,
    "MODEL.WEIGHTS": TEXT,
    "MODEL.META_ARCHITECTURE": NAME,
    "MODEL.LOAD_PROPOSALS": FLAG,
    "MODEL.MASK_ON": FLAG,
    "MODEL.KEYPOINT_ON": FLAG,
    "MODEL.PIXEL_MEAN": listed(NUMBER, 1),
    "MODEL.PIXEL_STD": listed(number(0, 1e30, open_ends="("), 1),
    "MODEL.BACKBONE.NAME": NAME,
    "MODEL.BACKBONE.FREEZE_AT": whole(0, 5),
    "MODEL.FPN.IN_FEATURES": listed(NAME),
    "MODEL.FPN.OUT_CHANNELS": COUNT,
    "MODEL.FPN.NORM": NORM,
    "MODEL.FPN.FUSE_TYPE": one_of("sum", "avg"),
    "MODEL.RESNETS.DEPTH": Range("18, 34, 50, 101 or 152", lambda v: v in (18, 34, 50, 101, 152)),
    "MODEL.RESNETS.OUT_FEATURES": listed(one_of(*STAGES), 1),
    "MODEL.RESNETS.NUM_GROUPS": COUNT,
    "MODEL.RESNETS.WIDTH_PER_GROUP": COUNT,
    "MODEL.RESNETS.NORM": NORM,
    "MODEL.RESNETS.STRIDE_IN_1X1": FLAG,
    "MODEL.RESNETS.RES5_DILATION": whole(1, 2),
    "MODEL.RESNETS.RES2_OUT_CHANNELS": COUNT,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": COUNT,
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": listed(FLAG, 4, 4),
    "MODEL.RESNETS.DEFORM_MODULATED": FLAG,
    "MODEL.RESNETS.DEFORM_NUM_GROUPS": COUNT,
    "MODEL.ROI_HEADS.NUM_CLASSES": COUNT,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": COUNT,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": SHARE,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": SHARE,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": SHARE,
    "MODEL.RETINANET.NUM_CLASSES": COUNT,
    "MODEL.RETINANET.NUM_CONVS": whole(0),
    "MODEL.RETINANET.PRIOR_PROB": number(0, 1, open_ends="()"),
    "MODEL.RETINANET.SCORE_THRESH_TEST": SHARE,
    "MODEL.RETINANET.NMS_THRESH_TEST": SHARE,
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": COUNT,
    "MODEL.RPN.NMS_THRESH": SHARE,
    "MODEL.RPN.POSITIVE_FRACTION": SHARE,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": COUNT,
    "INPUT.MIN_SIZE_TRAIN": listed(SIDE, 1),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": one_of("choice", "range"),
    "INPUT.MAX_SIZE_TRAIN": SIDE,
    "INPUT.MIN_SIZE_TEST": whole(0, 2**15),
    "INPUT.MAX_SIZE_TEST": SIDE,
    "INPUT.RANDOM_FLIP": one_of("none", "horizontal", "vertical"),
    "INPUT.CROP.ENABLED": FLAG,
    "INPUT.CROP.TYPE": one_of("relative", "relative_range", "absolute", "absolute_range"),
    "INPUT.CROP.SIZE": listed(number(0, 2**15, open_ends="("), 2, 2),
    "INPUT.FORMAT": one_of("RGB", "BGR", "L", "YUV-BT.601"),
    "INPUT.MASK_FORMAT": one_of("polygon", "bitmask"),
    "DATASETS.TRAIN": listed(NAME),
    "DATASETS.TEST": listed(NAME),
    "DATASETS.PROPOSAL_FILES_TRAIN": listed(NAME),
    "DATASETS.PROPOSAL_FILES_TEST": listed(NAME),
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": COUNT,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": COUNT,
    "DATALOADER.NUM_WORKERS": whole(0, 1024),
    "DATALOADER.ASPECT_RATIO_GROUPING": FLAG,
    "DATALOADER.SAMPLER_TRAIN": one_of("TrainingSampler", "RepeatFactorTrainingSampler"),
    "DATALOADER.REPEAT_THRESHOLD": SHARE,
    "DATALOADER.REPEAT_SQRT": FLAG,
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": FLAG,
    "SOLVER.LR_SCHEDULER_NAME": one_of(
        "WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"
    ),
    "SOLVER.MAX_ITER": COUNT,
    "SOLVER.BASE_LR": number(0, 1e30, open_ends="("),
    "SOLVER.BASE_LR_END": RATE,
    "SOLVER.MOMENTUM": number(0, 1, open_ends=")"),
    "SOLVER.NESTEROV": FLAG,
    "SOLVER.WEIGHT_DECAY": RATE,
    "SOLVER.WEIGHT_DECAY_NORM": either(RATE, NONE),
    "SOLVER.WEIGHT_DECAY_BIAS": either(RATE, NONE),
    "SOLVER.BIAS_LR_FACTOR": RATE,
    "SOLVER.GAMMA": number(0, 1, open_ends="("),
    "SOLVER.STEPS": rising(COUNT),
    "SOLVER.NUM_DECAYS": COUNT,
    "SOLVER.RESCALE_INTERVAL": FLAG,
    "SOLVER.WARMUP_FACTOR": SHARE,
    "SOLVER.WARMUP_ITERS": whole(0),
    "SOLVER.WARMUP_METHOD": one_of("linear", "constant"),
    "SOLVER.CHECKPOINT_PERIOD": COUNT,
    "SOLVER.IMS_PER_BATCH": COUNT,
    "SOLVER.REFERENCE_WORLD_SIZE": whole(0),
    "SOLVER.CLIP_GRADIENTS.ENABLED": FLAG,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of("value", "norm", "full_model"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": number(0, 1e30, open_ends="("),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": either(
        number(1), Range("infinity", lambda value: value == _INFINITY)
    ),
    "SOLVER.AMP.ENABLED": FLAG,
    "TEST.EVAL_PERIOD": whole(0),
    "TEST.DETECTIONS_PER_IMAGE": COUNT,
    "TEST.EXPECTED_RESULTS": listed(RESULT),
    "TEST.KEYPOINT_OKS_SIGMAS": listed(number(0, 1e30, open_ends="(")),
    "TEST.AUG.ENABLED": FLAG,
    "TEST.AUG.MIN_SIZES": listed(SIDE, 1),
    "TEST.AUG.MAX_SIZE": SIDE,
    "TEST.AUG.FLIP": FLAG,
    "TEST.PRECISE_BN.ENABLED": FLAG,
    "TEST.PRECISE_BN.NUM_ITER": COUNT,
}

# Registries of detectron2.modeling that hold the values of these keys.
_REGISTERED = {
    "MODEL.META_ARCHITECTURE": "META_ARCH_REGISTRY",
    "MODEL.BACKBONE.NAME": "BACKBONE_REGISTRY",
}


def check_detectron2_config(cfg: CfgNode) -> None:
    """Check the values of the keys in ``RANGES``, registered names, and dependent keys.

    Raises:
        ValueError: a value is out of range; the message names key, value and range.
    """
    for name, wanted in RANGES.items():
        value = value_of(cfg, name)
        if value is not ...:  # older versions do not have all keys
            require(name, value, wanted)
    for name, registry in _REGISTERED.items():
        known = sorted(entry for entry, _ in getattr(modeling, registry))
        require(name, value_of(cfg, name), one_of(*known))
    for name, wanted in _dependent(cfg).items():
        require(name, value_of(cfg, name), wanted)


def _dependent(cfg: CfgNode) -> dict[str, Range]:
    """Return the ranges that depend on the values of other keys, by key."""
    ranges = {}
    model, inputs, solver = cfg.MODEL, cfg.INPUT, cfg.SOLVER

    def when(condition: bool, name: str, wanted: str, admits: Callable[[Any], bool]) -> None:
        if condition:
            ranges[name] = Range(wanted, admits)

    when(
        inputs.CROP_BRANCH.ENABLED,
        "INPUT.CROP.ENABLED",
        "False with INPUT.CROP_BRANCH.ENABLED",
        lambda value: not value,
    )
    for name in ("MODEL.MASK_ON", "MODEL.KEYPOINT_ON"):
        is_set = CLASS_COUNTS.get(model.META_ARCHITECTURE) == "SET_DETECTOR"
        wanted = f"False with MODEL.META_ARCHITECTURE {model.META_ARCHITECTURE}"
        when(is_set, name, wanted, lambda value: not value)
    channels = 1 if inputs.FORMAT == "L" else 3
    for name in ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"):
        wanted = f"a list of length {channels} with INPUT.FORMAT {inputs.FORMAT}"
        when(True, name, wanted, lambda value: len(value) == channels)
    when(
        inputs.MIN_SIZE_TRAIN_SAMPLING == "range",
        "INPUT.MIN_SIZE_TRAIN",
        "least and greatest size with MIN_SIZE_TRAIN_SAMPLING range",
        lambda value: len(value) == 2 and value[0] <= value[1],
    )
    crop = inputs.CROP
    when(
        crop.ENABLED and crop.TYPE.startswith("relative"),
        "INPUT.CROP.SIZE",
        f"2 numbers up to 1 with INPUT.CROP.TYPE {crop.TYPE}",
        lambda value: max(value) <= 1,
    )
    when(
        crop.ENABLED and crop.TYPE.startswith("absolute"),
        "INPUT.CROP.SIZE",
        f"2 integers with INPUT.CROP.TYPE {crop.TYPE}, rising in a range",
        lambda value: (
            all(isinstance(v, int) for v in value)
            and (crop.TYPE == "absolute" or value[0] <= value[1])
        ),
    )
    when(
        solver.EMA.ENABLED,
        "TEST.PRECISE_BN.ENABLED",
        "False with SOLVER.EMA.ENABLED, which averages the statistics of batch norms itself",
        lambda value: not value,
    )
    when(
        model.LOAD_PROPOSALS,
        "DATASETS.PROPOSAL_FILES_TRAIN",
        "as many files as DATASETS.TRAIN has data sets, with MODEL.LOAD_PROPOSALS",
        lambda value: len(value) == len(cfg.DATASETS.TRAIN),
    )
    when(
        model.RESNETS.DEPTH in (18, 34),
        "MODEL.RESNETS.RES2_OUT_CHANNELS",
        f"64 with MODEL.RESNETS.DEPTH {model.RESNETS.DEPTH}",
        lambda value: value == 64,
    )
    when(
        solver.OPTIMIZER == "SGD" and solver.NESTEROV,
        "SOLVER.MOMENTUM",
        "more than 0 with SOLVER.NESTEROV",
        lambda value: value > 0,
    )
    when(
        "BASE_LR_END" in solver,
        "SOLVER.BASE_LR_END",
        "no more than SOLVER.BASE_LR",
        lambda value: value <= solver.BASE_LR,
    )
    return ranges
