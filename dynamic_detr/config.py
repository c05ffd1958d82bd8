"""Every configuration key of the project that Detectron2 does not have, its default, and why."""

from detectron2.config import CfgNode

__all__ = ["add_dynamic_detr_config"]


def add_dynamic_detr_config(cfg: CfgNode) -> None:
    """Adds the keys of `MODEL.DYNAMIC_DETR`, and those of the trainer under `SOLVER`.

    The defaults are the paper's; where it is silent, those of the closest published relative.
    Nothing of Detectron2's own defaults changes, so that its configs run as they always do.
    """
    from .engine.config import add_solver_config

    cfg.MODEL.DYNAMIC_DETR = node = CfgNode()
    node.NUM_CLASSES = 80
    # Channels of pyramid and queries; MODEL.FPN.OUT_CHANNELS must be the same.
    node.HIDDEN_DIM = 256
    node.NUM_QUERIES = 300
    # "focal": K sigmoids, as Deformable DETR, whose set-up the paper follows.
    # "softmax": K classes and "no object", as equation 14 prints it and DETR has it.
    node.CLASS_HEAD = "focal"
    # Levels of the backbone that become the pyramid, fine to coarse.
    node.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]

    node.ENCODER = CfgNode()
    node.ENCODER.NAME = "DynamicEncoder"  # or "IdentityEncoder": the decoder alone (Table 1)
    node.ENCODER.NUM_BLOCKS = 6
    node.ENCODER.NUM_GROUPS = 16  # of each GroupNorm
    # "resized": an offset means the same place of the image at every level.
    # "legacy": the arithmetic of the published DyHead code, for its checkpoints.
    node.ENCODER.OFFSETS = "resized"

    node.DECODER = CfgNode()
    node.DECODER.NAME = "DynamicDecoder"
    node.DECODER.NUM_STAGES = 6
    node.DECODER.NUM_HEADS = 4
    node.DECODER.FFN_DIM = 2048
    node.DECODER.DROPOUT = 0.0
    node.DECODER.POOLING_SIZE = 7
    node.DECODER.SAMPLING_RATIO = 2
    # Boxes of this size, in pixels, are pooled from stride 16; smaller ones from finer levels.
    node.DECODER.CANONICAL_SIZE = 224
    # "bottleneck": two dynamic filters HIDDEN_DIM -> DYNAMIC_DIM -> HIDDEN_DIM.
    # "single": one HIDDEN_DIM -> HIDDEN_DIM, as equation 11 prints it, at twice the parameters.
    node.DECODER.DYNAMIC_FILTER = "bottleneck"
    node.DECODER.DYNAMIC_DIM = 64
    # The first boxes. "image": the whole image, as the paper; "grid": spread over the image, each
    # twice as large as their distance, which learns in fewer steps where training is short.
    node.DECODER.INITIAL_BOXES = "image"
    # Whether they are parameters, as in the paper, or stay where they start.
    node.DECODER.LEARN_INITIAL_BOXES = True

    node.LOSS = CfgNode()
    # Weights of the losses, and of the costs that the matching minimises.
    node.LOSS.CLASS_WEIGHT = 2.0
    node.LOSS.L1_WEIGHT = 5.0
    node.LOSS.GIOU_WEIGHT = 2.0
    node.LOSS.FOCAL_ALPHA = 0.25  # the share of what should say yes, in 0 to 1
    node.LOSS.FOCAL_GAMMA = 2.0
    node.LOSS.NO_OBJECT_WEIGHT = 0.1  # of the "no object" class with the softmax head
    # L1 of "cxcywh", as DETR and Deformable DETR, or of "xyxy", as Sparse R-CNN.
    node.LOSS.L1_FORMAT = "cxcywh"

    # Activation checkpointing: in training, keep only the input of each part and compute the rest
    # again in the backward pass: less memory, and the forward pass of that part twice. Losses and
    # gradients are the same.
    node.CHECKPOINT = CfgNode()
    node.CHECKPOINT.ENCODER_BLOCKS = False
    node.CHECKPOINT.DECODER_STAGES = False
    node.CHECKPOINT.BACKBONE_STAGES = False  # of a ResNet, res2 to res5, alone or under an FPN

    # Neither changes the results; what is set up for a size makes its first images slow.
    node.INFERENCE = CfgNode()
    # On a GPU, launch the whole network at once, as a CUDA graph. There is one for each padded size
    # of a batch, and this many, those that were used last, are kept; 0: none. A capture runs
    # the network several times: worth it where images have no more padded sizes than this.
    node.INFERENCE.CUDA_GRAPHS = 0
    # Compile the network with torch.compile, which needs a C++ compiler on a CPU, and Triton on a
    # GPU.
    node.INFERENCE.COMPILE = False

    add_solver_config(cfg)
