"""Names and shapes of the published weights of other projects."""

import torch
import torchvision
from torch import Tensor, nn

Shapes = dict[str, tuple[int, ...]]
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def weights_of(shapes: Shapes, device: str = "meta") -> dict[str, Tensor]:
    """Return random tensors, or tensors without data on the device "meta"."""
    return {name: torch.randn(shape, device=device) for name, shape in shapes.items()}


def redraw(model: nn.Module) -> nn.Module:
    """Draw all parameters and norm statistics at random."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            is_norm = "norm" in name.lower() or "bn" in name
            if name.endswith("running_var") or (tensor.dim() == 1 and is_norm):
                tensor.uniform_(0.5, 1.5)
            elif tensor.dim() > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5)
            elif tensor.is_floating_point():
                tensor.normal_(std=0.5)
    return model


def assert_close(found: Tensor, wanted: Tensor, name: str, floor: float = 0.0) -> None:
    """Compare to 1e-4 of the largest entry, or of the floor."""
    scale = max(wanted.abs().max().item(), floor)
    assert (found - wanted).abs().max().item() <= 1e-4 * scale, name


def layer(name: str, *shape: int, bias: bool = True) -> Shapes:
    shapes = {f"{name}.weight": shape}
    return {**shapes, f"{name}.bias": shape[:1]} if bias else shapes


def norm(name: str, channels: int) -> Shapes:
    """Return the shapes of a frozen batch norm."""
    return {f"{name}.{n}": (channels,) for n in ("weight", "bias", "running_mean", "running_var")}


def detectron2_resnet(prefix: str, depth: int = 50) -> Shapes:
    def conv(name: str, *shape: int) -> Shapes:
        return {f"{name}.weight": shape, **norm(f"{name}.norm", shape[0])}

    shapes, channels = conv(f"{prefix}stem.conv1", 64, 3, 7, 7), 64
    for stage, blocks in enumerate(BLOCKS[depth]):
        width, out = 64 * 2**stage, 256 * 2**stage
        for block in range(blocks):
            name = f"{prefix}res{stage + 2}.{block}"
            if block == 0:
                shapes |= conv(f"{name}.shortcut", out, channels, 1, 1)
            shapes |= conv(f"{name}.conv1", width, channels, 1, 1)
            shapes |= conv(f"{name}.conv2", width, width, 3, 3)
            shapes |= conv(f"{name}.conv3", out, width, 1, 1)
            channels = out
    return shapes


def detectron2_fpn(prefix: str, levels: tuple[int, ...] = (2, 3, 4, 5)) -> Shapes:
    shapes: Shapes = {}
    for level in levels:
        shapes |= layer(f"{prefix}fpn_lateral{level}", 256, 64 * 2**level, 1, 1)
        shapes |= layer(f"{prefix}fpn_output{level}", 256, 256, 3, 3)
    return shapes


def sparse_rcnn(queries: int = 100, classes: int = 80, depth: int = 50) -> Shapes:
    shapes = {
        **detectron2_resnet("backbone.bottom_up.", depth),
        **detectron2_fpn("backbone."),
        "init_proposal_features.weight": (queries, 256),
        "init_proposal_boxes.weight": (queries, 4),
    }
    for number in range(6):
        shapes |= sparse_rcnn_stage(f"head.head_series.{number}.", classes)
    return shapes


def sparse_rcnn_stage(
    stage: str, classes: int, c: int = 256, dynamic: int = 64, bins: int = 7, ffn: int = 2048
) -> Shapes:
    return {
        f"{stage}self_attn.in_proj_weight": (3 * c, c),
        f"{stage}self_attn.in_proj_bias": (3 * c,),
        **layer(f"{stage}self_attn.out_proj", c, c),
        **layer(f"{stage}inst_interact.dynamic_layer", 2 * c * dynamic, c),
        **layer(f"{stage}inst_interact.norm1", dynamic),
        **layer(f"{stage}inst_interact.norm2", c),
        **layer(f"{stage}inst_interact.out_layer", c, bins * bins * c),
        **layer(f"{stage}inst_interact.norm3", c),
        **layer(f"{stage}linear1", ffn, c),
        **layer(f"{stage}linear2", c, ffn),
        **layer(f"{stage}norm1", c),
        **layer(f"{stage}norm2", c),
        **layer(f"{stage}norm3", c),
        **layer(f"{stage}cls_module.0", c, c, bias=False),
        **layer(f"{stage}cls_module.1", c),
        **layer(f"{stage}reg_module.0", c, c, bias=False),
        **layer(f"{stage}reg_module.1", c),
        **layer(f"{stage}reg_module.3", c, c, bias=False),
        **layer(f"{stage}reg_module.4", c),
        **layer(f"{stage}reg_module.6", c, c, bias=False),
        **layer(f"{stage}reg_module.7", c),
        **layer(f"{stage}class_logits", classes, c),
        **layer(f"{stage}bboxes_delta", 4, c),
    }


def dyhead_block(block: str, c: int = 256) -> Shapes:
    shapes: Shapes = {}
    for index in range(3):
        shapes |= layer(f"{block}DyConv.{index}.conv", c, c, 3, 3)
        shapes |= layer(f"{block}DyConv.{index}.bn", c)
    return {
        **shapes,
        **layer(f"{block}AttnConv.1", 1, c, 1, 1),
        **layer(f"{block}relu.fc.0", c // 4, c),
        **layer(f"{block}relu.fc.2", 4 * c, c // 4),
        **layer(f"{block}offset", 27, c, 3, 3),
    }


def dyhead_faster_rcnn() -> Shapes:
    rpn, heads = "proposal_generator.rpn_head.", "roi_heads."
    shapes = {
        **detectron2_resnet("backbone.backbone.bottom_up."),
        **detectron2_fpn("backbone.backbone."),
        **layer(f"{rpn}conv", 256, 256, 3, 3),
        **layer(f"{rpn}objectness_logits", 3, 256, 1, 1),
        **layer(f"{rpn}anchor_deltas", 12, 256, 1, 1),
        **layer(f"{heads}box_head.fc1", 1024, 49 * 256),
        **layer(f"{heads}box_head.fc2", 1024, 1024),
        **layer(f"{heads}box_predictor.cls_score", 81, 1024),
        **layer(f"{heads}box_predictor.bbox_pred", 320, 1024),
    }
    for number in range(6):
        shapes |= dyhead_block(f"backbone.dyhead_tower.{number}.")
    return shapes


def dyhead_retinanet() -> Shapes:
    shapes = {
        **detectron2_resnet("backbone.backbone.bottom_up."),
        **detectron2_fpn("backbone.backbone.", (3, 4, 5)),
        **layer("backbone.backbone.top_block.p6", 256, 256, 3, 3),
        **layer("backbone.backbone.top_block.p7", 256, 256, 3, 3),
        **layer("head.cls_score", 720, 256, 3, 3),
        **layer("head.bbox_pred", 36, 256, 3, 3),
        "pixel_mean": (3, 1, 1),
    }
    for number in range(6):
        shapes |= dyhead_block(f"backbone.dyhead_tower.{number}.")
    for branch in ("cls_subnet", "bbox_subnet"):
        for index in (0, 2, 4, 6):
            shapes |= layer(f"head.{branch}.{index}", 256, 256, 3, 3)
    return shapes


def torchvision_resnet(prefix: str, depth: int = 50) -> Shapes:
    with torch.device("meta"):
        weights = torchvision.models.get_model(f"resnet{depth}").state_dict()
    return {
        f"{prefix}{name}": tuple(weight.shape)
        for name, weight in weights.items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }


def self_attention(name: str) -> Shapes:
    return {
        f"{name}.in_proj_weight": (768, 256),
        f"{name}.in_proj_bias": (768,),
        **layer(f"{name}.out_proj", 256, 256),
    }


def detr(depth: int = 50, queries: int = 100, rows: int = 92) -> Shapes:
    """Return the weights of DETR, with `rows` rows in the class head."""
    shapes = torchvision_resnet("backbone.0.body.", depth)
    shapes |= layer("input_proj", 256, 2048, 1, 1) | layer("class_embed", rows, 256)
    shapes |= {"query_embed.weight": (queries, 256), **layer("transformer.decoder.norm", 256)}
    for number in range(6):
        for part, attentions in (
            ("encoder", ["self_attn"]),
            ("decoder", ["self_attn", "multihead_attn"]),
        ):
            name = f"transformer.{part}.layers.{number}"
            shapes |= layer(f"{name}.linear1", 2048, 256) | layer(f"{name}.linear2", 256, 2048)
            shapes |= layer(f"{name}.norm{len(attentions) + 1}", 256)
            for index, kind in enumerate(attentions):
                shapes |= self_attention(f"{name}.{kind}") | layer(f"{name}.norm{index + 1}", 256)
    for index, out in enumerate((256, 256, 4)):
        shapes |= layer(f"bbox_embed.layers.{index}", out, 256)
    return shapes


def smca() -> Shapes:
    """Return the weights of single-scale SMCA, as far as the names are known."""
    shapes = detr(queries=300, rows=91)
    for number in range(6):
        name = f"transformer.decoder.layers.{number}"
        shapes |= layer(f"{name}.norm4", 256)
        shapes |= layer(f"{name}.point2", 16, 256) | layer(f"{name}.point3", 16, 256)
    for index, out in enumerate((256, 256, 2)):
        shapes |= layer(f"transformer.decoder.layers.0.point1.layers.{index}", out, 256)
    return shapes


def deformable_detr(variant: str, levels: int = 4) -> Shapes:
    """Return the weights of Deformable DETR with ResNet-50 and 91 rows in the class heads.

    Args:
        variant: "base", "refine" or "two_stage".
        levels: 4, or 1 for the single-scale system.
    """
    shapes = torchvision_resnet("backbone.0.body.")
    for index, channels in enumerate((512, 1024, 2048, 2048) if levels > 1 else (2048,)):
        kernel = 3 if index == 3 else 1
        shapes |= layer(f"input_proj.{index}.0", 256, channels, kernel, kernel)
        shapes |= layer(f"input_proj.{index}.1", 256)
    transformer = "transformer."
    shapes[f"{transformer}level_embed"] = (levels, 256)
    for number in range(6):
        for part, attention in (("encoder", "self_attn"), ("decoder", "cross_attn")):
            name = f"{transformer}{part}.layers.{number}."
            shapes |= layer(f"{name}{attention}.sampling_offsets", 64 * levels, 256)
            shapes |= layer(f"{name}{attention}.attention_weights", 32 * levels, 256)
            shapes |= layer(f"{name}{attention}.value_proj", 256, 256)
            shapes |= layer(f"{name}{attention}.output_proj", 256, 256)
            shapes |= layer(f"{name}linear1", 1024, 256) | layer(f"{name}linear2", 256, 1024)
            for index in (1, 2, 3) if part == "decoder" else (1, 2):
                shapes |= layer(f"{name}norm{index}", 256)
        shapes |= self_attention(f"{name}self_attn")
    if variant == "two_stage":
        shapes |= layer(f"{transformer}enc_output", 256, 256)
        shapes |= layer(f"{transformer}enc_output_norm", 256)
        shapes |= layer(f"{transformer}pos_trans", 512, 512)
        shapes |= layer(f"{transformer}pos_trans_norm", 512)
    else:
        shapes["query_embed.weight"] = (300, 512)
        shapes |= layer(f"{transformer}reference_points", 2, 256)
    heads: Shapes = {}
    for number in range(7 if variant == "two_stage" else 6):
        heads |= layer(f"class_embed.{number}", 91, 256)
        for index, rows in enumerate((256, 256, 4)):
            heads |= layer(f"bbox_embed.{number}.layers.{index}", rows, 256)
    twice = {"base": (), "refine": ("bbox",), "two_stage": ("bbox", "class")}[variant]
    kept = {f"{transformer}decoder.{n}": s for n, s in heads.items() if n.startswith(twice)}
    return shapes | heads | kept
