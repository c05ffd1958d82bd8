"""Every configuration key that this project adds to Detectron2's: its default, range and reason.

`add_dynamic_detr_config` adds the keys, `check_config` checks a whole configuration, and
`check_arguments` lets a constructor check its arguments by the range of the keys that they come
from, so that a range and a default are written here and nowhere else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode

__all__ = [
    "KEYS",
    "Key",
    "add_dynamic_detr_config",
    "check_arguments",
    "check_config",
    "class_count",
    "require",
    "set_class_count",
    "value_of",
]

# The nodes of MODEL in which meta-architectures keep their number of classes, as NUM_CLASSES. FCOS
# is in newer Detectron2s only.
CLASS_COUNTS = {
    "SetDetector": "SET_DETECTOR",
    "DynamicDETR": "SET_DETECTOR",
    "GeneralizedRCNN": "ROI_HEADS",
    "RetinaNet": "RETINANET",
    "FCOS": "FCOS",
}


@dataclass(frozen=True)
class Range:
    """The values that a key may have.

    Args:
        wanted: the values in words, to complete "it must be …".
        admits: whether a value is one of them.
    """

    wanted: str
    admits: Callable[[Any], bool]


@dataclass(frozen=True)
class Key:
    """One configuration key.

    Args:
        name: full name, with dots.
        default: its value where no configuration sets it.
        range: the values that it may have.
        reason: what it does and why the default is what it is; where the paper is silent, whose
            choice it is.
    """

    name: str
    default: Any
    range: Range
    reason: str


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def whole(least: int, most: int = 2**31 - 1) -> Range:
    bounded = f" and <= {most}" if most < 2**31 - 1 else ""
    return Range(
        f"an integer >= {least}{bounded}",
        lambda value: _is_number(value) and isinstance(value, int) and least <= value <= most,
    )


def number(low: float, high: float = float("inf"), *, open_ends: str = "") -> Range:
    """Numbers from low to high; `open_ends` holds "(" or ")" where that end is left out."""
    above = f"> {low:g}" if "(" in open_ends else f">= {low:g}"
    below = f"< {high:g}" if ")" in open_ends else f"<= {high:g}"

    def admits(value: object) -> bool:
        if not _is_number(value) or not low <= value <= high or value > 1e300:
            return False
        return not ("(" in open_ends and value == low) and not (")" in open_ends and value == high)

    return Range(f"a number {above}" + (f" and {below}" if high < float("inf") else ""), admits)


def one_of(*choices: str) -> Range:
    return Range(f"one of {list(choices)}", lambda value: value in choices)


def names(least: int) -> Range:
    def admits(value: object) -> bool:
        if not isinstance(value, (list, tuple)) or len(value) < least:
            return False
        return all(isinstance(name, str) for name in value) and len(set(value)) == len(value)

    return Range(f"a list of {f'{least} or more ' if least else ''}different names", admits)


def sides(least: int, most: float = float("inf")) -> Range:
    """Lists of so many lengths in pixels, in ascending order."""

    def admits(value: object) -> bool:
        if not isinstance(value, (list, tuple)) or not least <= len(value) <= most:
            return False
        return all(whole(1).admits(side) for side in value) and list(value) == sorted(value)

    number = f"{least}" if least == most else f"at least {least}"
    return Range(f"a list of {number} integers >= 1 in ascending order", admits)


def several_of(*choices: str) -> Range:
    """Lists of at least one entry; the same one may come again."""

    def admits(value: object) -> bool:
        if not isinstance(value, (list, tuple)) or not value:
            return False
        return all(entry in choices for entry in value)

    return Range(f"a list of at least one, each one of {list(choices)}", admits)


FLAG = Range("True or False", lambda value: isinstance(value, bool))
NAME = Range("a name", lambda value: isinstance(value, str) and value != "")
WEIGHT = number(0)
DROPOUT = number(0, 1, open_ends=")")

_DETECTOR = "MODEL.SET_DETECTOR."
_DETECTOR_KEYS = (
    Key(
        _DETECTOR + "NUM_CLASSES",
        80,
        whole(1),
        "Classes of the data; --train-json sets it.",
    ),
    Key(
        _DETECTOR + "CLASS_HEAD",
        "focal",
        one_of("focal", "softmax"),
        '"focal": K sigmoids, as Deformable DETR, whose set-up the paper follows. "softmax": K '
        'classes and "no object", as equation 14 prints it and DETR has it.',
    ),
    Key(
        _DETECTOR + "IN_FEATURES",
        ["p2", "p3", "p4", "p5", "p6"],
        names(1),
        "Outputs of the backbone that make the pyramid, fine to coarse.",
    ),
    Key(
        _DETECTOR + "HIDDEN_DIM",
        256,
        whole(1),
        "Channels of pyramid and queries; those of the backbone's outputs must be as many "
        "(MODEL.FPN.OUT_CHANNELS, MODEL.LEVELS.OUT_CHANNELS).",
    ),
    Key(
        _DETECTOR + "ENCODER",
        "DynamicEncoder",
        NAME,
        'A class of ENCODER_REGISTRY; "IdentityEncoder" leaves the decoder alone (Table 1).',
    ),
    Key(_DETECTOR + "DECODER", "DynamicDecoder", NAME, "A class of DECODER_REGISTRY."),
    Key(
        _DETECTOR + "LOSS.CLASS_WEIGHT",
        2.0,
        WEIGHT,
        "Weight of the class loss, and of the class cost that the matching minimises.",
    ),
    Key(_DETECTOR + "LOSS.L1_WEIGHT", 5.0, WEIGHT, "The same for the L1 distance of the boxes."),
    Key(_DETECTOR + "LOSS.GIOU_WEIGHT", 2.0, WEIGHT, "The same for the generalised IoU."),
    Key(
        _DETECTOR + "LOSS.FOCAL_ALPHA",
        0.25,
        number(0, 1),
        "Weight of positives in the focal loss.",
    ),
    Key(_DETECTOR + "LOSS.FOCAL_GAMMA", 2.0, WEIGHT, "Exponent of the focal loss."),
    Key(
        _DETECTOR + "LOSS.NO_OBJECT_WEIGHT",
        0.1,
        number(0, open_ends="("),
        'Weight of the class "no object" with the softmax head.',
    ),
    Key(
        _DETECTOR + "LOSS.L1_FORMAT",
        "cxcywh",
        one_of("cxcywh", "xyxy"),
        '"cxcywh" as DETR and Deformable DETR, or "xyxy" as Sparse R-CNN.',
    ),
    Key(
        _DETECTOR + "ACTIVATION_CHECKPOINT.BACKBONE",
        False,
        FLAG,
        "In training, keep only the input of each stage of a ResNet (alone or as bottom-up "
        "network) and compute the rest again in the backward pass: less memory, and the forward "
        "pass twice. Losses and gradients are the same.",
    ),
    Key(_DETECTOR + "ACTIVATION_CHECKPOINT.ENCODER", False, FLAG, "The same for encoder blocks."),
    Key(_DETECTOR + "ACTIVATION_CHECKPOINT.DECODER", False, FLAG, "The same for decoder stages."),
    Key(
        _DETECTOR + "INFERENCE.CUDA_GRAPHS",
        0,
        whole(0),
        "On a GPU, launch the whole network at once, as a CUDA graph. There is one for each "
        "padded size of a batch; this many, those that were used last, are kept. A capture runs "
        "the network several times: worth it where images have no more padded sizes than this.",
    ),
    Key(
        _DETECTOR + "INFERENCE.COMPILE",
        False,
        FLAG,
        "Compile the network with torch.compile, which needs a C++ compiler on a CPU and Triton "
        "on a GPU.",
    ),
)

_LEVELS = "MODEL.LEVELS."
_LEVELS_KEYS = (
    Key(
        _LEVELS + "OUT_CHANNELS",
        256,
        whole(1),
        "Channels of the levels that build_resnet_levels_backbone makes of the outputs of the "
        "ResNet (MODEL.RESNETS.OUT_FEATURES), a 1x1 convolution each.",
    ),
    Key(
        _LEVELS + "NORM",
        "GN",
        Range("a name of a norm, or empty", lambda value: isinstance(value, str)),
        'Norm after each of them: "GN" as Deformable DETR, "" as DETR.',
    ),
    Key(
        _LEVELS + "NUM_EXTRA",
        0,
        whole(0),
        "Further levels, by strided 3x3 convolutions: the first on the coarsest output of the "
        "ResNet itself, as Deformable DETR's C6, each further one on the one before.",
    ),
    Key(
        _LEVELS + "DC5",
        False,
        FLAG,
        "Leave res5 at stride 16 with dilated convolutions, as DETR-DC5: the first block's is not "
        "dilated, unlike with MODEL.RESNETS.RES5_DILATION.",
    ),
)

_ENCODER = "MODEL.DYNAMIC_ENCODER."
_DYNAMIC_ENCODER_KEYS = (
    Key(_ENCODER + "NUM_BLOCKS", 6, whole(1), "Blocks in the stack; Table 2 has 2, 4 and 6."),
    Key(_ENCODER + "NUM_GROUPS", 16, whole(1), "Groups of each GroupNorm, as in DyHead."),
    Key(
        _ENCODER + "OFFSETS",
        "resized",
        one_of("resized", "legacy"),
        '"resized": an offset means the same place of the image at every level. "legacy": the '
        "arithmetic of the published DyHead code, for its checkpoints; results then depend on the "
        "padding.",
    ),
    Key(
        _ENCODER + "SCALE_ATTENTION",
        True,
        FLAG,
        "Weigh neighbouring levels by equation 5; else their plain mean is taken. This and the "
        "next two are the ablations of DyHead's Table 1, which does not say what takes the place "
        "of an attention that is left out.",
    ),
    Key(
        _ENCODER + "SPATIAL_ATTENTION",
        True,
        FLAG,
        "Sample at predicted offsets; else the 3x3 convolutions are plain ones.",
    ),
    Key(_ENCODER + "CHANNEL_ATTENTION", True, FLAG, "Activate by a DyReLU; else by a ReLU."),
)

_DECODER = "MODEL.DYNAMIC_DECODER."
_DYNAMIC_DECODER_KEYS = (
    Key(_DECODER + "NUM_QUERIES", 300, whole(1), "Learned queries, and so boxes of each stage."),
    Key(_DECODER + "NUM_STAGES", 6, whole(1), "Stages, with weights of their own."),
    Key(_DECODER + "NUM_HEADS", 4, whole(1), "Heads of the self-attention; Table 2: 4 is best."),
    Key(_DECODER + "FFN_DIM", 2048, whole(1), "Hidden units of the feed-forward network."),
    Key(
        _DECODER + "DROPOUT",
        0.0,
        DROPOUT,
        "After attention, dynamic convolution and both layers of the feed-forward network.",
    ),
    Key(_DECODER + "POOLING_SIZE", 7, whole(1), "Bins on each side of the pooled region."),
    Key(_DECODER + "SAMPLING_RATIO", 2, whole(1), "Bilinear samples on each side of a bin."),
    Key(
        _DECODER + "CANONICAL_SIZE",
        224,
        number(0, open_ends="("),
        "A box with this square root of area, in pixels, is pooled from stride 16; smaller ones "
        "from finer levels.",
    ),
    Key(
        _DECODER + "DYNAMIC_FILTER",
        "bottleneck",
        one_of("bottleneck", "single"),
        '"bottleneck": two dynamic filters HIDDEN_DIM -> DYNAMIC_DIM -> HIDDEN_DIM, as Sparse '
        'R-CNN. "single": one HIDDEN_DIM -> HIDDEN_DIM, as equation 11 prints it, at twice the '
        "parameters.",
    ),
    Key(_DECODER + "DYNAMIC_DIM", 64, whole(1), "Width of the bottleneck."),
    Key(
        _DECODER + "QUERIES",
        "learned",
        one_of("learned", "dense"),
        'The first queries and boxes. "learned": the same for all images, as in the paper. '
        '"dense": the best distinct predictions of a dense head (MODEL.DENSE_QUERIES), which many '
        "positions teach, as in DDQ (arXiv 2303.12776).",
    ),
    Key(
        _DECODER + "INITIAL_BOXES",
        "image",
        one_of("image", "grid"),
        'The first boxes of learned queries. "image": the whole image, as the paper; "grid": '
        "spread over the image, each twice as large as their distance, which learns in fewer steps "
        "where training is short.",
    ),
    Key(
        _DECODER + "LEARN_INITIAL_BOXES",
        True,
        FLAG,
        "Whether they are parameters, as in the paper, or stay where they start.",
    ),
)

_DENSE_QUERIES = "MODEL.DENSE_QUERIES."
_DENSE_QUERIES_KEYS = (
    Key(
        _DENSE_QUERIES + "ANCHOR_SCALE",
        8.0,
        number(0, open_ends="("),
        "Side of the square that a position's box is predicted relative to, in strides of its "
        "level: 32 to 512 pixels on P2 to P6, as Detectron2's Faster R-CNN.",
    ),
    Key(
        _DENSE_QUERIES + "CANDIDATES",
        1000,
        whole(1),
        "Best positions of an image, before non-maximum suppression leaves the distinct ones. "
        "Where it is less than the number of queries, that counts.",
    ),
    Key(
        _DENSE_QUERIES + "NMS_THRESHOLD",
        0.7,
        number(0, 1),
        "IoU above which the better of two candidates suppresses the other, whatever their "
        "classes; DDQ's.",
    ),
)

_TRANSFORMER_ENCODER = "MODEL.TRANSFORMER_ENCODER."
_TRANSFORMER_ENCODER_KEYS = (
    Key(_TRANSFORMER_ENCODER + "NUM_LAYERS", 6, whole(1), "Layers, as in DETR."),
    Key(_TRANSFORMER_ENCODER + "NUM_HEADS", 8, whole(1), "Heads of the self-attention."),
    Key(
        _TRANSFORMER_ENCODER + "FFN_DIM",
        2048,
        whole(1),
        "Hidden units of the feed-forward network.",
    ),
    Key(
        _TRANSFORMER_ENCODER + "DROPOUT",
        0.1,
        DROPOUT,
        "Of attention weights, after attention, and after both layers of the feed-forward network.",
    ),
)

_TRANSFORMER_DECODER = "MODEL.TRANSFORMER_DECODER."
_TRANSFORMER_DECODER_KEYS = (
    Key(
        _TRANSFORMER_DECODER + "NUM_QUERIES",
        100,
        whole(1),
        "Learned queries, and so boxes of each layer; DETR-DC5+ has 300.",
    ),
    Key(_TRANSFORMER_DECODER + "NUM_LAYERS", 6, whole(1), "Layers; each predicts."),
    Key(_TRANSFORMER_DECODER + "NUM_HEADS", 8, whole(1), "Heads of self- and cross-attention."),
    Key(
        _TRANSFORMER_DECODER + "FFN_DIM",
        2048,
        whole(1),
        "Hidden units of the feed-forward network.",
    ),
    Key(
        _TRANSFORMER_DECODER + "DROPOUT",
        0.1,
        DROPOUT,
        "Of attention weights, after attention, and after both layers of the feed-forward network.",
    ),
    Key(
        _TRANSFORMER_DECODER + "IN_FEATURES",
        [],
        names(0),
        "Those of MODEL.SET_DETECTOR.IN_FEATURES that the queries look at; all of them if empty. "
        "The paper's Table 1 does not say which DETR's decoder reads behind a dynamic encoder. The "
        "encoder must reach all other levels from these (a dynamic block reaches one further), "
        "or what makes those is not trained.",
    ),
)

_DEFORMABLE_ENCODER = "MODEL.DEFORMABLE_ENCODER."
_DEFORMABLE_ENCODER_KEYS = (
    Key(_DEFORMABLE_ENCODER + "NUM_LAYERS", 6, whole(1), "Layers in the stack."),
    Key(_DEFORMABLE_ENCODER + "NUM_HEADS", 8, whole(1), "Heads of the deformable attention."),
    Key(
        _DEFORMABLE_ENCODER + "NUM_POINTS",
        4,
        whole(1),
        "Points that a head samples on each level, K in the paper; its Table 2 has 1 and 4.",
    ),
    Key(
        _DEFORMABLE_ENCODER + "FFN_DIM",
        1024,
        whole(1),
        "Hidden units of the feed-forward networks; the released code's.",
    ),
    Key(
        _DEFORMABLE_ENCODER + "DROPOUT",
        0.1,
        DROPOUT,
        "After attention and both layers of the feed-forward networks.",
    ),
    Key(
        _DEFORMABLE_ENCODER + "MULTI_SCALE",
        True,
        FLAG,
        'Whether a position samples all levels. False, "without multi-scale attention" in the '
        "paper's Table 2: its own level alone, with weights that the levels share. What the "
        "decoder does there is not said; it reads all levels here.",
    ),
)

_DEFORMABLE_DECODER = "MODEL.DEFORMABLE_DECODER."
_DEFORMABLE_DECODER_KEYS = (
    Key(_DEFORMABLE_DECODER + "NUM_QUERIES", 300, whole(1), "Queries, and so boxes of each layer."),
    Key(_DEFORMABLE_DECODER + "NUM_LAYERS", 6, whole(1), "Layers, each of which predicts."),
    Key(_DEFORMABLE_DECODER + "NUM_HEADS", 8, whole(1), "Heads of both attentions of a layer."),
    Key(
        _DEFORMABLE_DECODER + "NUM_POINTS",
        4,
        whole(1),
        "Points that a head samples on each level, K in the paper; its Table 2 has 1 and 4.",
    ),
    Key(
        _DEFORMABLE_DECODER + "FFN_DIM",
        1024,
        whole(1),
        "Hidden units of the feed-forward networks; the released code's.",
    ),
    Key(
        _DEFORMABLE_DECODER + "DROPOUT",
        0.1,
        DROPOUT,
        "Of attention weights, after attention and both layers of the feed-forward networks.",
    ),
    Key(
        _DEFORMABLE_DECODER + "REFINE_BOXES",
        False,
        FLAG,
        "Each layer refines the boxes of the one before, with heads of its own: iterative "
        "bounding box refinement. False: all layers predict from the same reference points, with "
        "the same heads.",
    ),
    Key(
        _DEFORMABLE_DECODER + "TWO_STAGE",
        False,
        FLAG,
        "The first boxes and queries are the best of proposals that every position of the pyramid "
        "makes. It needs REFINE_BOXES, and more than one level.",
    ),
)

_SMCA_ENCODER = "MODEL.SMCA_ENCODER."
_SMCA_ENCODER_KEYS = (
    Key(
        _SMCA_ENCODER + "BLOCKS",
        ["intra", "intra", "multi", "intra", "intra"],
        several_of("intra", "multi"),
        'Kind of each block: with "intra" a position attends to its own level, with "multi" to all '
        "levels. SMCA names no embedding of the level, and there is none here: sine positions are "
        "those of each level.",
    ),
    Key(
        _SMCA_ENCODER + "SHARED",
        "all",
        one_of("all", "ffn", "attention", "nothing"),
        "What the levels share of the weights of a block; what is not shared has a copy for each "
        "level, in both kinds of blocks (the parameters that SMCA reports fit that). A norm goes "
        "with what precedes it.",
    ),
    Key(_SMCA_ENCODER + "NUM_HEADS", 8, whole(1), "Heads of the self-attention."),
    Key(
        _SMCA_ENCODER + "FFN_DIM",
        1024,
        whole(1),
        "Hidden units of the feed-forward network, half of DETR's.",
    ),
    Key(
        _SMCA_ENCODER + "DROPOUT",
        0.1,
        DROPOUT,
        "As in DETR's encoder; SMCA follows DETR where it is silent.",
    ),
)

_SMCA_DECODER = "MODEL.SMCA_DECODER."
_SMCA_DECODER_KEYS = (
    Key(_SMCA_DECODER + "NUM_QUERIES", 300, whole(1), "Learned queries; DETR has 100."),
    Key(
        _SMCA_DECODER + "NUM_LAYERS",
        6,
        whole(1),
        "Layers, with weights of their own but for norm and heads of their outputs, as DETR.",
    ),
    Key(_SMCA_DECODER + "NUM_HEADS", 8, whole(1), "Heads of self-attention and co-attention."),
    Key(
        _SMCA_DECODER + "FFN_DIM",
        1024,
        whole(1),
        "Hidden units of the feed-forward network: 1024 with several levels, 2048 with one.",
    ),
    Key(_SMCA_DECODER + "DROPOUT", 0.1, DROPOUT, "As in DETR's decoder."),
    Key(
        _SMCA_DECODER + "SCALES",
        "independent",
        one_of("independent", "single", "fixed"),
        'Scales of the spatial prior: "independent" ones of x and y, a "single" one for both, or '
        '"fixed" at 1. As the released code has it, their squares multiply squared distances, '
        "where equation 4 divides: a larger scale is a narrower prior. SMCA does not say what "
        "scales, offsets and reference points are predicted from: as in that code, from the norm "
        "of the content that enters a layer plus the query's position, the reference points in "
        "the first layer alone. Scales start at 1, and offsets at 0, which is our choice.",
    ),
    Key(
        _SMCA_DECODER + "HEAD_SHARED",
        False,
        FLAG,
        "One spatial prior for all heads, as in equation 5, not one for each (equation 6).",
    ),
    Key(
        _SMCA_DECODER + "SCALE_SELECTION",
        True,
        FLAG,
        "With several levels, a query attends to each of them and weighs the results (equations 7 "
        "to 9). SMCA does not say what happens without: here, one softmax over the positions of "
        "all levels. Either way all levels share the projections of keys and values; equation 8 "
        "speaks of separate ones, but the 39.5 M parameters that SMCA reports are those of shared "
        "ones. Nothing is left to select on one level.",
    ),
    Key(
        _SMCA_DECODER + "BETA",
        8.0,
        number(0, open_ends="("),
        "Bandwidth of the spatial prior: what squared distances, in cells of the level, are "
        "divided by; value and unit of the released code, which has one level.",
    ),
)

# The defaults leave Detectron2's own recipes (SGD for Faster R-CNN, RetinaNet) alone;
# configs/Base-DynamicDETR.yaml switches to AdamW and full-model clipping. CLIP_GRADIENTS.CLIP_TYPE,
# a key of Detectron2's, also knows "full_model" here: the norm of all gradients together is brought
# down to CLIP_VALUE.
_SOLVER_KEYS = (
    Key(
        "SOLVER.OPTIMIZER",
        "SGD",
        one_of("SGD", "ADAMW"),
        '"SGD" with momentum and Nesterov as in Detectron2, or "ADAMW" with betas 0.9 and 0.999.',
    ),
    Key(
        "SOLVER.BACKBONE_MULTIPLIER",
        1.0,
        WEIGHT,
        "Learning rate of the pretrained part of the backbone, as a multiple of BASE_LR: its "
        "bottom-up network where it has one (an FPN's own convolutions start from scratch).",
    ),
    Key(
        "SOLVER.OFFSETS_MULTIPLIER",
        1.0,
        WEIGHT,
        "The same for layers that predict sampling offsets and reference points.",
    ),
    Key(
        "SOLVER.AMP.DTYPE",
        "float16",
        one_of("float16", "bfloat16"),
        '"float16" scales the loss and needs a GPU; "bfloat16" does neither.',
    ),
    Key(
        "SOLVER.MAX_SKIPPED_STEPS",
        20,
        whole(1),
        "float16 skips a step whose gradients overflow; so many in a row end the training.",
    ),
    Key(
        "SOLVER.EMA.ENABLED",
        False,
        FLAG,
        "Exponential moving average of the weights: evaluated, and saved as the checkpoint's "
        '"model".',
    ),
    Key("SOLVER.EMA.DECAY", 0.9998, number(0, 1, open_ends=")"), "Share that a step keeps of it."),
    Key(
        "SOLVER.KEEP_CHECKPOINTS",
        2,
        Range("an integer >= 2, or 0 for all", lambda value: value == 0 or whole(2).admits(value)),
        "How many of the periodic checkpoints stay on disk, the newest ones. At least two, so "
        "that there is one to fall back to.",
    ),
    Key(
        "SOLVER.HANG_SECONDS",
        1800,
        whole(0),
        "A run ends where a process has made no progress for so long: no step, no image "
        "evaluated. Longer than the longest of start, saving and COCO's scoring; 0 is for ever, "
        "and for debuggers.",
    ),
)

_CROP_BRANCH = "INPUT.CROP_BRANCH."
_INPUT_KEYS = (
    Key(
        _CROP_BRANCH + "ENABLED",
        False,
        FLAG,
        "In training, with a probability of 1/2, resize the shortest side of an image to one of "
        "RESIZE and cut out a region with sides drawn from SIZE, before it is resized as "
        "MIN_SIZE_TRAIN says: DETR's random crops, for those who trained as it did.",
    ),
    Key(
        _CROP_BRANCH + "RESIZE",
        [400, 500, 600],
        sides(1),
        "Lengths of the shortest side, in pixels; DETR's.",
    ),
    Key(
        _CROP_BRANCH + "SIZE",
        [384, 600],
        sides(2, 2),
        "Least and greatest side of the region, in pixels; DETR's.",
    ),
)

KEYS: tuple[Key, ...] = (
    *_DETECTOR_KEYS,
    *_LEVELS_KEYS,
    *_DYNAMIC_ENCODER_KEYS,
    *_DYNAMIC_DECODER_KEYS,
    *_DENSE_QUERIES_KEYS,
    *_DEFORMABLE_ENCODER_KEYS,
    *_DEFORMABLE_DECODER_KEYS,
    *_TRANSFORMER_ENCODER_KEYS,
    *_TRANSFORMER_DECODER_KEYS,
    *_SMCA_ENCODER_KEYS,
    *_SMCA_DECODER_KEYS,
    *_SOLVER_KEYS,
    *_INPUT_KEYS,
)
_BY_NAME = {key.name: key for key in KEYS}


def add_dynamic_detr_config(cfg: CfgNode) -> None:
    """Adds all keys, with their defaults, to Detectron2's.

    Nothing of Detectron2's own defaults changes, so that its configs run as they always do.
    """
    for key in KEYS:
        *parents, name = key.name.split(".")
        node = cfg
        for parent in parents:
            if parent not in node:
                node[parent] = CfgNode()
            node = node[parent]
        node[name] = list(key.default) if isinstance(key.default, list) else key.default


def check_config(cfg: CfgNode) -> None:
    """Checks the value of every key of `KEYS`.

    Raises:
        ValueError: a value is out of its range; the line names key, value and range.
    """
    for key in KEYS:
        require(key.name, value_of(cfg, key.name), key.range)


def class_count(cfg: CfgNode) -> int | None:
    """The number of classes of the configured detector; None for one that is not known here."""
    node = CLASS_COUNTS.get(cfg.MODEL.META_ARCHITECTURE)
    return None if node is None else cfg.MODEL[node].NUM_CLASSES


def set_class_count(cfg: CfgNode, classes: int) -> None:
    """Sets the number of classes of all detectors that are known here."""
    for node in set(CLASS_COUNTS.values()):
        if node in cfg.MODEL:
            cfg.MODEL[node].NUM_CLASSES = classes


def check_arguments(node: str, **arguments: Any) -> None:
    """Checks arguments of a constructor by the ranges of the keys that they come from.

    Args:
        node: of the keys, for example "MODEL.DYNAMIC_DECODER".
        arguments: named like their keys, in lower case.

    Raises:
        ValueError: a value is out of its range; the line names key, value and range.
    """
    for name, value in arguments.items():
        key = _BY_NAME[f"{node}.{name.upper()}"]
        require(key.name, value, key.range)


def value_of(cfg: CfgNode, name: str) -> Any:
    """The value of the key with this full name; `...` if there is no such key.

    Raises:
        ValueError: what the key is in is no group of keys.
    """
    value = cfg
    parts = name.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(value, dict):
            raise ValueError(f"{'.'.join(parts[:depth])} is {value!r}; it must be a group of keys.")
        value = value.get(part, ...)
        if value is ...:
            break
    return value


def require(name: str, value: Any, wanted: Range) -> None:
    """See that a key's value is in a range.

    Raises:
        ValueError: it is not; the line names key, value and range.
    """
    if not wanted.admits(value):
        text = f"{value!r}"
        text = f"{text[:100]} ... {text[-20:]}" if len(text) > 150 else text
        raise ValueError(f"{name} is {text}; it must be {wanted.wanted}.")
