"""One table of all configuration keys added to Detectron2's: default, range and reason of each.

Defaults and ranges are written only here: `add_dynamic_detr_config` adds the keys to a config,
`check_config` checks a config, and constructors check their arguments with `check_arguments`.
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

# Nodes of MODEL that hold NUM_CLASSES, by meta-architecture. Only newer Detectron2s have FCOS.
CLASS_COUNTS = {
    "SetDetector": "SET_DETECTOR",
    "DynamicDETR": "SET_DETECTOR",
    "GeneralizedRCNN": "ROI_HEADS",
    "RetinaNet": "RETINANET",
    "FCOS": "FCOS",
}

# Nodes of MODEL that hold NUM_QUERIES, by decoder.
QUERY_COUNTS = {
    "DynamicDecoder": "DYNAMIC_DECODER",
    "TransformerDecoder": "TRANSFORMER_DECODER",
    "DeformableDecoder": "DEFORMABLE_DECODER",
    "SMCADecoder": "SMCA_DECODER",
}


@dataclass(frozen=True)
class Range:
    """The set of valid values of a key.

    Args:
        wanted: the values in words, to complete "it must be …".
        admits: function that returns whether a value is valid.
    """

    wanted: str
    admits: Callable[[Any], bool]


@dataclass(frozen=True)
class Key:
    """One configuration key.

    Args:
        name: full name, with dots.
        default: default value.
        range: valid values.
        reason: what the key does, and the source of the default.
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
    """Return the range of the numbers from low to high.

    Args:
        low: lower end.
        high: upper end.
        open_ends: "(" to exclude the lower end, ")" the upper one, "()" both.
    """
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
    """Return the range of the ascending lists of `least` to `most` lengths in pixels."""

    def admits(value: object) -> bool:
        if not isinstance(value, (list, tuple)) or not least <= len(value) <= most:
            return False
        return all(whole(1).admits(side) for side in value) and list(value) == sorted(value)

    count = f"{least}" if least == most else f"at least {least}"
    return Range(f"a list of {count} integers >= 1 in ascending order", admits)


def several_of(*choices: str) -> Range:
    """Return the range of the non-empty lists of the choices; an entry may repeat."""

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
        "Number of classes, K; --train-json sets it.",
    ),
    Key(
        _DETECTOR + "CLASS_HEAD",
        "focal",
        one_of("focal", "softmax"),
        '"focal": K sigmoids, as in Deformable DETR, whose settings the paper follows. "softmax": '
        'K classes and "no object", as in equation 14 and DETR.',
    ),
    Key(
        _DETECTOR + "IN_FEATURES",
        ["p2", "p3", "p4", "p5", "p6"],
        names(1),
        "Outputs of the backbone that form the pyramid, fine to coarse.",
    ),
    Key(
        _DETECTOR + "HIDDEN_DIM",
        256,
        whole(1),
        "Channels of the pyramid and of the queries, C. The backbone's outputs must have as many "
        "(MODEL.FPN.OUT_CHANNELS, MODEL.LEVELS.OUT_CHANNELS).",
    ),
    Key(
        _DETECTOR + "ENCODER",
        "DynamicEncoder",
        NAME,
        'A class of ENCODER_REGISTRY; "IdentityEncoder" for the decoder without encoder (Table 1).',
    ),
    Key(_DETECTOR + "DECODER", "DynamicDecoder", NAME, "A class of DECODER_REGISTRY."),
    Key(
        _DETECTOR + "LOSS.CLASS_TARGET",
        "one",
        one_of("one", "iou"),
        'Target of a matched query for the class of its object: "one" for 1, as in the papers, or '
        '"iou" for the IoU of its box with the object (varifocal loss; needs CLASS_HEAD "focal").',
    ),
    Key(_DETECTOR + "LOSS.CLASS_WEIGHT", 2.0, WEIGHT, "Weight of the class loss and cost."),
    Key(_DETECTOR + "LOSS.L1_WEIGHT", 5.0, WEIGHT, "Weight of the L1 loss and cost of the boxes."),
    Key(_DETECTOR + "LOSS.GIOU_WEIGHT", 2.0, WEIGHT, "Weight of the GIoU loss and cost."),
    Key(
        _DETECTOR + "LOSS.FOCAL_ALPHA",
        0.25,
        number(0, 1),
        "Weight of positives in the focal loss and cost; negatives have 1 minus it. The loss of "
        'matched queries with CLASS_TARGET "iou" does not use it.',
    ),
    Key(_DETECTOR + "LOSS.FOCAL_GAMMA", 2.0, WEIGHT, "Exponent of the focal loss."),
    Key(
        _DETECTOR + "LOSS.NO_OBJECT_WEIGHT",
        0.1,
        number(0, open_ends="("),
        'Weight of "no object" in the cross-entropy of the softmax head.',
    ),
    Key(
        _DETECTOR + "LOSS.L1_FORMAT",
        "cxcywh",
        one_of("cxcywh", "xyxy"),
        'Box format of the L1 loss: "cxcywh" as in DETR and Deformable DETR, or "xyxy" as in '
        "Sparse R-CNN.",
    ),
    Key(
        _DETECTOR + "ACTIVATION_CHECKPOINT.BACKBONE",
        False,
        FLAG,
        "In training, keep only the input of each ResNet stage (also below an FPN) and recompute "
        "the rest in the backward pass: less memory for a second forward pass. Losses and "
        "gradients are the same.",
    ),
    Key(_DETECTOR + "ACTIVATION_CHECKPOINT.ENCODER", False, FLAG, "The same for encoder blocks."),
    Key(_DETECTOR + "ACTIVATION_CHECKPOINT.DECODER", False, FLAG, "The same for decoder stages."),
    Key(
        _DETECTOR + "INFERENCE.CUDA_GRAPHS",
        0,
        whole(0),
        "Number of CUDA graphs of the network to keep on a GPU, one per padded size of a batch; "
        "the least recently used one is dropped first. 0 to run without. A capture runs the "
        "network several times, so graphs pay if batches have no more padded sizes than this.",
    ),
    Key(
        _DETECTOR + "INFERENCE.COMPILE",
        False,
        FLAG,
        "Compile the network with torch.compile; needs a C++ compiler on a CPU, Triton on a GPU.",
    ),
    Key(
        _DETECTOR + "INFERENCE.NMS_THRESHOLD",
        1.0,
        number(0, 1, open_ends="("),
        "Of the TEST.DETECTIONS_PER_IMAGE best detections, leave out those whose IoU with a better "
        "one of the same class is larger. 1.0: no non-maximum suppression, as in the papers.",
    ),
)

_LEVELS = "MODEL.LEVELS."
_LEVELS_KEYS = (
    Key(
        _LEVELS + "OUT_CHANNELS",
        256,
        whole(1),
        "Channels of the levels of build_resnet_levels_backbone: 1x1 convolutions of the outputs "
        "of the ResNet (MODEL.RESNETS.OUT_FEATURES).",
    ),
    Key(
        _LEVELS + "NORM",
        "GN",
        Range("a name of a norm, or empty", lambda value: isinstance(value, str)),
        'Norm after each of these convolutions: "GN" as in Deformable DETR, "" as in DETR.',
    ),
    Key(
        _LEVELS + "NUM_EXTRA",
        0,
        whole(0),
        "Number of coarser levels, each a strided 3x3 convolution of the previous one; the first "
        "of the coarsest output of the ResNet, as Deformable DETR's C6.",
    ),
    Key(
        _LEVELS + "DC5",
        False,
        FLAG,
        "Keep res5 at stride 16 with dilated convolutions, as in DETR-DC5. The first block is not "
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
        '"resized": an offset points to the same place of the image at all levels. "legacy": the '
        "arithmetic of the published DyHead code, for its checkpoints; the results depend on the "
        "padding.",
    ),
    Key(
        _ENCODER + "SCALE_ATTENTION",
        True,
        FLAG,
        "Weigh neighbouring levels by equation 5; if False, equally. This key and the next two "
        "are the ablations of DyHead's Table 1, which does not state what replaces an attention.",
    ),
    Key(
        _ENCODER + "SPATIAL_ATTENTION",
        True,
        FLAG,
        "Sample at predicted offsets; if False, the 3x3 convolutions are plain.",
    ),
    Key(_ENCODER + "CHANNEL_ATTENTION", True, FLAG, "DyReLU activation; if False, ReLU."),
    Key(
        _ENCODER + "RESIDUAL",
        False,
        FLAG,
        "Add the output of each block, times a learned scale of each channel that starts at 0, to "
        "its input; not in the paper.",
    ),
)

_DECODER = "MODEL.DYNAMIC_DECODER."
_DYNAMIC_DECODER_KEYS = (
    Key(_DECODER + "NUM_QUERIES", 300, whole(1), "Queries, each with one box per stage."),
    Key(_DECODER + "NUM_STAGES", 6, whole(1), "Stages; they share no weights."),
    Key(_DECODER + "NUM_HEADS", 4, whole(1), "Heads of the self-attention; Table 2: 4 is best."),
    Key(_DECODER + "FFN_DIM", 2048, whole(1), "Hidden units of the feed-forward network."),
    Key(
        _DECODER + "DROPOUT",
        0.0,
        DROPOUT,
        "After attention, dynamic filters and both layers of the feed-forward network.",
    ),
    Key(_DECODER + "POOLING_SIZE", 7, whole(1), "Bins on each side of the pooled region."),
    Key(_DECODER + "SAMPLING_RATIO", 2, whole(1), "Bilinear samples on each side of a bin."),
    Key(
        _DECODER + "CANONICAL_SIZE",
        224,
        whole(1),
        "Square root of the area, in pixels, of boxes that are pooled from stride 16; smaller "
        "boxes are pooled from finer levels.",
    ),
    Key(
        _DECODER + "DYNAMIC_FILTER",
        "bottleneck",
        one_of("bottleneck", "residual", "single"),
        '"bottleneck": two dynamic filters HIDDEN_DIM -> DYNAMIC_DIM -> HIDDEN_DIM, as in Sparse '
        'R-CNN. "residual": the same, added to the region, which learns faster from random '
        'weights; not in the paper. "single": one HIDDEN_DIM -> HIDDEN_DIM, as in equation 11, '
        "with twice the parameters.",
    ),
    Key(_DECODER + "DYNAMIC_DIM", 64, whole(1), "Hidden channels of the bottleneck filters."),
    Key(
        _DECODER + "CLASSIFY_TRUE_BOXES",
        False,
        FLAG,
        "In training, each stage also classifies the regions of the true boxes, which does not "
        "depend on the predicted boxes; not in the paper.",
    ),
    Key(
        _DECODER + "NOISED_BOXES",
        0,
        whole(0),
        "Noised copies per image, shared among its true boxes, which each stage refines in "
        "training, after DN-DETR; not in the paper.",
    ),
    Key(
        _DECODER + "INITIAL_BOXES",
        "image",
        one_of("image", "grid"),
        'Initial boxes. "image": the whole image, as in the paper. "grid": '
        "squares on a grid, twice as wide as its cells, which learn faster in short training.",
    ),
    Key(
        _DECODER + "LEARN_INITIAL_BOXES",
        True,
        FLAG,
        "Whether the initial boxes are parameters, as in the paper, or constant.",
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
        "Learned queries, each with one box per layer; DETR-DC5+ has 300.",
    ),
    Key(_TRANSFORMER_DECODER + "NUM_LAYERS", 6, whole(1), "Layers, each with a prediction."),
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
        "Levels of MODEL.SET_DETECTOR.IN_FEATURES that the queries attend to; all if empty. The "
        "paper's Table 1 does not state which levels DETR's decoder reads after a dynamic encoder. "
        "These levels must depend on all others through the encoder (a dynamic block mixes "
        "adjacent levels); otherwise some parameters get no gradient.",
    ),
)

_DEFORMABLE_ENCODER = "MODEL.DEFORMABLE_ENCODER."
_DEFORMABLE_ENCODER_KEYS = (
    Key(_DEFORMABLE_ENCODER + "NUM_LAYERS", 6, whole(1), "Layers."),
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
        "True if a position samples all levels. False if it samples only its own level, with "
        'weights shared by the levels: "without multi-scale attention" in the paper\'s Table 2. '
        "The paper does not state what the decoder reads in this case; here it reads all levels.",
    ),
)

_DEFORMABLE_DECODER = "MODEL.DEFORMABLE_DECODER."
_DEFORMABLE_DECODER_KEYS = (
    Key(
        _DEFORMABLE_DECODER + "NUM_QUERIES",
        300,
        whole(1),
        "Queries, each with one box per layer.",
    ),
    Key(_DEFORMABLE_DECODER + "NUM_LAYERS", 6, whole(1), "Layers, each with a prediction."),
    Key(_DEFORMABLE_DECODER + "NUM_HEADS", 8, whole(1), "Heads of self- and cross-attention."),
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
        "Iterative bounding box refinement: each layer has its own heads and refines the boxes of "
        "the previous layer. If False, all layers share the reference points and the heads.",
    ),
    Key(
        _DEFORMABLE_DECODER + "TWO_STAGE",
        False,
        FLAG,
        "The initial queries and boxes are the best proposals of all positions of the pyramid. "
        "Needs REFINE_BOXES, more than one level and CLASS_HEAD focal.",
    ),
)

_SMCA_ENCODER = "MODEL.SMCA_ENCODER."
_SMCA_ENCODER_KEYS = (
    Key(
        _SMCA_ENCODER + "BLOCKS",
        ["intra", "intra", "multi", "intra", "intra"],
        several_of("intra", "multi"),
        'Kind of each block: "intra" attends within each level, "multi" to all levels. As in SMCA, '
        "there is no level embedding; the sine embeddings are those of each level.",
    ),
    Key(
        _SMCA_ENCODER + "SHARED",
        "all",
        one_of("all", "ffn", "attention", "nothing"),
        "Weights of a block that the levels share. The others, and the norms after them, have a "
        "copy for each level, in both kinds of blocks; this matches the number of parameters that "
        "SMCA reports.",
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
        "As in DETR's encoder; the SMCA paper does not state it.",
    ),
)

_SMCA_DECODER = "MODEL.SMCA_DECODER."
_SMCA_DECODER_KEYS = (
    Key(_SMCA_DECODER + "NUM_QUERIES", 300, whole(1), "Learned queries; DETR has 100."),
    Key(
        _SMCA_DECODER + "NUM_LAYERS",
        6,
        whole(1),
        "Layers; they share only the final norm and the heads, as in DETR.",
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
        'Scales of the spatial prior: "independent" for x and y, "single" for both, or "fixed" at '
        "1. As in the released code, squared scales multiply the squared distances, where equation "
        "4 divides them: a larger scale is a narrower prior. The paper does not state the input of "
        "the layers that predict scales, offsets and reference points; as in the released code, it "
        "is the layer norm of the content plus position of the query, and only the first layer "
        "predicts reference points, with three linear layers where equation 3 has two. Initial "
        "scales of 1 and offsets of 0 are our choice.",
    ),
    Key(
        _SMCA_DECODER + "HEAD_SHARED",
        False,
        FLAG,
        "One spatial prior for all heads (equation 5) instead of one per head (equation 6).",
    ),
    Key(
        _SMCA_DECODER + "SCALE_SELECTION",
        True,
        FLAG,
        "With several levels, attend to each level and sum the results with predicted weights "
        "(equations 7 to 9). If False, one softmax over the positions of all levels, which the "
        "paper does not state. The levels share the projections of keys and values: equation 8 has "
        "separate ones, but the reported 39.5 M parameters are those of shared ones. No effect "
        "with one level.",
    ),
    Key(
        _SMCA_DECODER + "BETA",
        8.0,
        number(0, open_ends="("),
        "Bandwidth of the spatial prior: divisor of squared distances in cells of the level. Value "
        "and unit of the released code, which has one level.",
    ),
)

# The defaults do not change the recipes of Detectron2's own configs (SGD for Faster R-CNN and
# RetinaNet); configs/Base-DynamicDETR.yaml sets AdamW and full-model clipping. Detectron2's key
# CLIP_GRADIENTS.CLIP_TYPE has the additional value "full_model" here, which clips the norm of all
# gradients together.
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
        "Learning rate of the pretrained part of the backbone as a multiple of BASE_LR. With an "
        "FPN, that is the bottom-up network, without the FPN's own convolutions.",
    ),
    Key(
        "SOLVER.OFFSETS_MULTIPLIER",
        1.0,
        WEIGHT,
        "The same for layers of deformable attention that predict sampling offsets and reference "
        "points.",
    ),
    Key(
        "SOLVER.AMP.DTYPE",
        "float16",
        one_of("float16", "bfloat16"),
        '"float16" needs a GPU and loss scaling; "bfloat16" needs neither.',
    ),
    Key(
        "SOLVER.MAX_SKIPPED_STEPS",
        20,
        whole(1),
        "With float16, a step with overflowing gradients is skipped; training fails after this "
        "many in a row.",
    ),
    Key(
        "SOLVER.EMA.ENABLED",
        False,
        FLAG,
        "Keep an exponential moving average of the weights; it is evaluated, and saved as the "
        'checkpoint\'s "model".',
    ),
    Key("SOLVER.EMA.DECAY", 0.9998, number(0, 1, open_ends=")"), "Decay of the average per step."),
    Key(
        "SOLVER.KEEP_CHECKPOINTS",
        2,
        Range("an integer >= 2, or 0 for all", lambda value: value == 0 or whole(2).admits(value)),
        "Number of periodic checkpoints to keep, the newest ones. At least two, so that a damaged "
        "one can be replaced by the previous one.",
    ),
    Key(
        "SOLVER.HANG_SECONDS",
        1800,
        whole(0),
        "Training ends if a process makes no progress (no step, no evaluated image) for so many "
        "seconds. It must exceed the longest of start, saving and COCO's scoring. 0 for no limit, "
        "for example in a debugger.",
    ),
)

_CROP_BRANCH = "INPUT.CROP_BRANCH."
_INPUT_KEYS = (
    Key(
        _CROP_BRANCH + "ENABLED",
        False,
        FLAG,
        "DETR's random crops: in training, with a probability of 1/2, resize the shortest side of "
        "an image to one of RESIZE and crop a region with sides from SIZE, before the resize to "
        "MIN_SIZE_TRAIN.",
    ),
    Key(
        _CROP_BRANCH + "RESIZE",
        [400, 500, 600],
        sides(1),
        "Lengths of the shortest side in pixels, as in DETR.",
    ),
    Key(
        _CROP_BRANCH + "SIZE",
        [384, 600],
        sides(2, 2),
        "Smallest and largest side of the region in pixels, as in DETR.",
    ),
)

KEYS: tuple[Key, ...] = (
    *_DETECTOR_KEYS,
    *_LEVELS_KEYS,
    *_DYNAMIC_ENCODER_KEYS,
    *_DYNAMIC_DECODER_KEYS,
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
    """Add all keys with their defaults to Detectron2's, in place.

    Detectron2's own defaults do not change, so its configs run as without this project.
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
    """Check the values of all `KEYS`.

    Raises:
        ValueError: a value is out of range; the message names key, value and range.
    """
    for key in KEYS:
        require(key.name, value_of(cfg, key.name), key.range)


def class_count(cfg: CfgNode) -> int | None:
    """Return the number of classes of the detector; None if not in `CLASS_COUNTS`."""
    node = CLASS_COUNTS.get(cfg.MODEL.META_ARCHITECTURE)
    return None if node is None else cfg.MODEL[node].NUM_CLASSES


def set_class_count(cfg: CfgNode, classes: int) -> None:
    """Set the number of classes of all detectors in `CLASS_COUNTS`."""
    for node in set(CLASS_COUNTS.values()):
        if node in cfg.MODEL:
            cfg.MODEL[node].NUM_CLASSES = classes


def detection_limits(cfg: CfgNode) -> dict[str, int]:
    """Return the keys that limit how many objects are detected in an image, with their values."""
    limits = {"TEST.DETECTIONS_PER_IMAGE": cfg.TEST.DETECTIONS_PER_IMAGE}
    node = QUERY_COUNTS.get(cfg.MODEL.SET_DETECTOR.DECODER)
    if node and CLASS_COUNTS.get(cfg.MODEL.META_ARCHITECTURE) == "SET_DETECTOR":
        limits[f"MODEL.{node}.NUM_QUERIES"] = cfg.MODEL[node].NUM_QUERIES
    return limits


def check_arguments(node: str, **arguments: Any) -> None:
    """Check the arguments of a constructor by the ranges of their keys.

    Args:
        node: node of the keys, for example "MODEL.DYNAMIC_DECODER".
        arguments: values by the name of the key in lower case.

    Raises:
        ValueError: a value is out of range; the message names key, value and range.
    """
    for name, value in arguments.items():
        key = _BY_NAME[f"{node}.{name.upper()}"]
        require(key.name, value, key.range)


def value_of(cfg: CfgNode, name: str) -> Any:
    """Return the value of a key by its full name; `...` if there is no such key.

    Raises:
        ValueError: a parent of the key is not a node.
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
    """Check that the value of a key is in a range.

    Raises:
        ValueError: it is not; the message names key, value and range.
    """
    if not wanted.admits(value):
        text = f"{value!r}"
        text = f"{text[:100]} ... {text[-20:]}" if len(text) > 150 else text
        raise ValueError(f"{name} is {text}; it must be {wanted.wanted}.")
