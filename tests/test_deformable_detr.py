"""Deformable DETR: equality with Hugging Face's class, invariants and published weights."""

import math
import re

import convert_weights
import pytest
import torch
from conftest import ROOT
from conversions import deformable_detr as conversion
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from helpers import (
    batch_pyramid,
    defaults,
    model_without_memory,
    random_levels,
    set_criterion,
    shake,
    training_input,
)
from published import assert_close, redraw
from published import deformable_detr as published_shapes
from reference.matching import giou
from torch import nn

from dynamic_detr import Pyramid
from dynamic_detr.decoders import DeformableDecoder
from dynamic_detr.encoders import DeformableEncoder
from dynamic_detr.engine.optimizer import build_optimizer
from dynamic_detr.files.config_file import read_config

CONFIGS = ROOT / "configs" / "Deformable-DETR"


CLASSES, QUERIES, CHANNELS = 5, 12, 64
NARROW = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.LEVELS.OUT_CHANNELS", CHANNELS),
    *("MODEL.FPN.OUT_CHANNELS", CHANNELS, "MODEL.BACKBONE.FREEZE_AT", 0),
    *("MODEL.SET_DETECTOR.HIDDEN_DIM", CHANNELS, "MODEL.SET_DETECTOR.NUM_CLASSES", CLASSES),
    *("MODEL.DEFORMABLE_ENCODER.NUM_LAYERS", 2, "MODEL.DEFORMABLE_ENCODER.FFN_DIM", 48),
    *("MODEL.DEFORMABLE_DECODER.NUM_LAYERS", 3, "MODEL.DEFORMABLE_DECODER.FFN_DIM", 40),
    *("MODEL.DEFORMABLE_DECODER.NUM_QUERIES", QUERIES, "MODEL.DYNAMIC_ENCODER.NUM_GROUPS", 8),
    *("MODEL.DEFORMABLE_ENCODER.DROPOUT", 0.0, "MODEL.DEFORMABLE_DECODER.DROPOUT", 0.0),
]
STRIDES = (8, 16, 32, 64)
VARIANTS = {
    "base": {},
    "refine": {"refine_boxes": True},
    "two_stage": {"refine_boxes": True, "two_stage": True},
}


def load(name: str, *options: object) -> CfgNode:
    return read_config(str(CONFIGS / name), ["MODEL.DEVICE", "cpu", *options])


def hugging_face(variant: str) -> nn.Module:
    """Build Hugging Face's model with the sizes of NARROW, without dropout and frozen weights.

    Heads that refine are not tied.
    """
    transformers = pytest.importorskip("transformers")
    resnet = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[16, 32, 64, 128],
        out_features=["stage2", "stage3", "stage4"],
    )
    refines = variant != "base"
    config = transformers.DeformableDetrConfig(
        backbone_config=resnet,
        d_model=CHANNELS,
        num_queries=QUERIES,
        two_stage_num_proposals=QUERIES,
        num_labels=CLASSES,
        encoder_layers=2,
        encoder_ffn_dim=48,
        decoder_layers=3,
        decoder_ffn_dim=40,
        dropout=0.0,
        auxiliary_loss=True,
        class_cost=2,
        with_box_refine=refines,
        two_stage=variant == "two_stage",
        attn_implementation="eager",
    )
    model = transformers.DeformableDetrForObjectDetection(config)
    if refines:
        heads = len(model.bbox_embed)
        model.class_embed = nn.ModuleList(nn.Linear(CHANNELS, CLASSES) for _ in range(heads))
        box_head = type(model.bbox_embed[0])
        model.bbox_embed = nn.ModuleList(box_head(CHANNELS, CHANNELS, 4, 3) for _ in range(heads))
        model.model.decoder.bbox_embed = model.bbox_embed
    if variant == "two_stage":
        model.model.decoder.class_embed = model.class_embed
    return redraw(model).requires_grad_(True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_hugging_face(variant):
    """Logits, boxes, losses, gradients and converted names are equal."""
    theirs = hugging_face(variant).train()
    name = "deformable_detr_R_50" + (f"_{variant}" if variant != "base" else "")
    ours = build_model(load(f"{name}.yaml", *NARROW)).train()
    ours.load_state_dict(conversion.convert_huggingface(theirs.state_dict()))
    inputs = [
        training_input(128, 192, [[5, 5, 40, 44], [60, 20, 190, 120], [9, 80, 31, 90]], [1, 4, 0]),
        training_input(128, 192, [[100, 30, 140, 100]], [4]),
    ]
    targets = ours._targets(inputs)
    images = ours._images(inputs).tensor
    labels = [{"class_labels": labels, "boxes": boxes} for labels, boxes in targets]
    expected = theirs(images, labels=labels)

    predictions = ours._network(images, torch.tensor([[128, 192]] * 2))
    if variant == "two_stage":
        proposals = predictions[0]
        assert proposals.is_proposal
        assert_close(proposals.pred_logits, expected.enc_outputs_class, "logits of proposals")
        boxes = expected.enc_outputs_coord_logits.sigmoid()
        assert_close(proposals.pred_boxes, boxes, "boxes of proposals")
    stages = [prediction for prediction in predictions if not prediction.is_proposal]
    wanted_stages = [*expected.auxiliary_outputs, expected]
    assert len(stages) == len(wanted_stages) == 3
    for stage, (found, wanted) in enumerate(zip(stages, wanted_stages, strict=True)):
        assert_close(found.pred_logits, wanted["logits"], f"logits {stage}")
        assert_close(found.pred_boxes, wanted["pred_boxes"], f"boxes {stage}")
        assert wanted["logits"].std() > 0.1 and wanted["pred_boxes"].std() > 0.02

    losses = ours.criterion(stages, targets)
    names = {"class": ("loss_ce", 2), "l1": ("loss_bbox", 5), "giou": ("loss_giou", 2)}
    total = 0
    for name, loss in losses.items():
        _, kind, *stage = name.split("_")
        theirs_name, weight = names[kind]
        wanted_loss = expected.loss_dict["_".join([theirs_name, *stage])]
        assert_close(loss / weight, wanted_loss, name)
        total = total + weight * wanted_loss
    if variant == "two_stage":  # Hugging Face has no loss on proposals
        weight = torch.randn_like(boxes)
        total = total + (boxes * weight).mean() + expected.enc_outputs_class.square().mean()
        losses["boxes"] = (proposals.pred_boxes * weight).mean()
        losses["logits"] = proposals.pred_logits.square().mean()
    sum(losses.values()).backward()
    total.backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    wanted = conversion.convert_huggingface({n: p.grad for n, p in theirs.named_parameters()})
    assert wanted.keys() >= gradients.keys()
    for name, gradient in gradients.items():  # frozen norms have no parameters here
        assert_close(gradient, wanted[name], name)


SMALL = {"num_levels": len(STRIDES), "num_layers": 2, "ffn_dim": 24, "num_heads": 4}
SMALL |= {"num_points": 2, "dropout": 0.0, "checkpoint_layers": False}


def encoder(**options: object) -> DeformableEncoder:
    return DeformableEncoder(16, **{**defaults("MODEL.DEFORMABLE_ENCODER"), **SMALL, **options})


def decoder(variant: str = "base", **options: object) -> DeformableDecoder:
    heads = {"num_classes": 3, "num_queries": 6, "class_head": "focal"}
    options = {**SMALL, **heads, **VARIANTS[variant], **options}
    return DeformableDecoder(16, **{**defaults("MODEL.DEFORMABLE_DECODER"), **options})


def pyramid_of(
    sizes: list, padded: tuple, strides: tuple = STRIDES, dtype: torch.dtype = torch.float32
) -> Pyramid:
    images = [random_levels(size, 16, strides, dtype) for size in sizes]
    return batch_pyramid(images, sizes, padded, strides)


@torch.no_grad()
def test_own_level_is_each_level_alone():
    """Without multi_scale the levels share weights, but not features."""
    model = shake(encoder(multi_scale=False).double())
    pyramid = pyramid_of([(100, 136), (64, 120)], (128, 192), dtype=torch.float64)
    together = model(pyramid)
    for level in range(len(STRIDES)):
        alone = encoder(num_levels=1).double()
        weights = model.state_dict()
        weights["level_embed"] = weights["level_embed"][level : level + 1]
        alone.load_state_dict(weights)
        found = together.features[level]
        wanted = alone(pyramid.select([level])).features[0]
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_loss_on_proposals_by_hand():
    """Focal loss of all true positions with class 0 for objects; L1 and GIoU of matched ones."""
    model = shake(decoder("two_stage", num_levels=2, num_queries=3), 0.3).eval()
    pyramid = pyramid_of([(40, 24)], (64, 64), strides=(16, 32)).masked()
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.5, 0.9]])
    predictions = model(pyramid)
    losses = set_criterion()(predictions, [(torch.tensor([2, 1]), boxes)])
    assert list(losses)[:3] == [f"loss_{kind}_proposals" for kind in ("class", "l1", "giou")]

    valid = pyramid.valid_table()[0]
    assert valid.sum() == 3 * 2 + 2 * 1 and len(valid) == 16 + 4
    logits = predictions[0].pred_logits[0][valid].double()
    found = predictions[0].pred_boxes[0][valid].double()
    probability = logits.sigmoid()
    positive = -0.25 * (1 - probability) ** 2 * probability.log()
    negative = -0.75 * probability**2 * (1 - probability).log()
    l1 = (found[:, None] - boxes).abs().sum(-1)
    overlaps = [[giou(a, b) for b in boxes.double().tolist()] for a in found.tolist()]
    overlaps = torch.tensor(overlaps).double()
    cost = 2 * (positive - negative)[:, :1] + 5 * l1 + 2 * (1 - overlaps)
    pairs = [(i, j) for i in range(len(cost)) for j in range(len(cost)) if i != j]
    matched = list(min(pairs, key=lambda pair: cost[pair[0], 0] + cost[pair[1], 1]))
    objects = [0, 1]
    class_loss = negative.sum() + (positive - negative)[matched, 0].sum()
    wanted = {
        "class": 2 * class_loss / 2,
        "l1": 5 * l1[matched, objects].sum() / 2,
        "giou": 2 * (1 - overlaps[matched, objects]).sum() / 2,
    }
    for kind, value in wanted.items():
        found = losses[f"loss_{kind}_proposals"].double()
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)
    losses["loss_class_proposals"].backward()
    assert model.queries.class_head.weight.grad[1:].any()  # other classes are negatives


@torch.no_grad()
def test_anchors_and_selection_of_proposals():
    """With zero box heads, the proposals are the anchors; they are sorted by score."""
    proposer = decoder("two_stage", num_queries=4, num_levels=3).queries
    proposer.class_head.weight.normal_()
    pyramid = pyramid_of([(64, 130)], (64, 192), strides=(32, 64, 128))
    queries = proposer(pyramid.masked())
    (proposals,) = queries.proposals
    levels = [(0.05, 2, 6, 5), (0.1, 1, 3, 3), (0.2, 1, 2, 2)]  # side, rows, columns, true columns
    wanted = [
        [(x + 0.5) / true, (y + 0.5) / rows, side, side] if x < true else [1.0] * 4
        for side, rows, columns, true in levels
        for y in range(rows)
        for x in range(columns)
    ]
    torch.testing.assert_close(proposals.pred_boxes[0], torch.tensor(wanted))
    valid = pyramid.valid_table()[0]
    scores = proposals.pred_logits[0, :, 0]
    assert (scores[~valid] == -1e4).all()
    best = scores.argsort(descending=True)[:4]
    torch.testing.assert_close(queries.references[0], proposals.pred_boxes[0, best])
    assert not queries.references.requires_grad


@torch.no_grad()
def test_anchors_near_the_border_ignore_the_features():
    proposer = shake(decoder("two_stage", num_levels=2, num_queries=200).queries)
    size = (16, 1200)  # the outermost centres are less than 0.01 from the edge
    pyramid = pyramid_of([size], size, strides=(8, 16))
    queries = proposer(pyramid)
    (proposals,) = queries.proposals
    center = pyramid.centers()[0]
    outside = ((center <= 0.01) | (center >= 0.99)).any(dim=-1)
    assert 4 <= outside.sum() < len(outside) / 10
    assert (proposals.pred_boxes[0, outside] == 1).all()
    assert (proposals.pred_boxes[0, ~outside] < 1).all()
    logits = proposals.pred_logits[0, outside]
    assert torch.equal(logits, logits[:1].expand_as(logits)) and logits.abs().max() < 100
    assert (queries.references[0] == 1).all(dim=-1).any()


def test_initial_values():
    first, second = encoder(), decoder("refine", num_points=3)
    attention = second.layers[0].cross_attention
    bias = attention.sampling_offsets.bias.view(4, len(STRIDES), 3, 2)
    directions = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    wanted = directions[:, None, None] * torch.tensor([1.0, 2, 3])[:, None]
    torch.testing.assert_close(bias, wanted.expand_as(bias), atol=1e-6, rtol=0)
    eight = encoder(num_heads=8).layers[0].attention.sampling_offsets.bias.view(8, 4, 2, 2)
    assert eight.abs().amax(dim=-1).allclose(torch.tensor([1.0, 2.0]).expand(8, 4, 2))
    for module in (*first.modules(), *second.modules()):
        if hasattr(module, "sampling_offsets"):
            assert not module.sampling_offsets.weight.any()
            assert not module.attention_weights.weight.any()
            assert not module.attention_weights.bias.any()
            assert not module.value_proj.bias.any() and not module.output_proj.bias.any()
    assert 0.6 < first.level_embed.std() < 1.4
    starts = {"base": [-2.0], "refine": [-2.0, 0.0], "two_stage": [0.0, 0.0]}
    for variant, biases in starts.items():
        model = decoder(variant)
        found = [head.layers[-1] for head in model.box_heads]
        assert not any(layer.weight.any() or layer.bias[:2].any() for layer in found)
        assert [layer.bias[2:].tolist() for layer in found] == [[b, b] for b in biases]
        prior = torch.full((3,), math.log(0.01 / 0.99))
        assert all(head.bias.allclose(prior) for head in model.class_heads)


def test_stages_pass_boxes_without_gradient():
    model = shake(decoder("refine"), 0.1)
    pyramid = pyramid_of([(64, 64)], (64, 64))
    model(pyramid)[1].pred_boxes.sum().backward()
    assert all(p.grad is None for p in model.box_heads[0].parameters())
    assert model.box_heads[1].layers[0].weight.grad.any()
    assert model.queries.embed.weight.grad.any()
    model.zero_grad()
    model(pyramid)[0].pred_boxes.sum().backward()
    assert model.queries.reference_points.weight.grad.any()


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (encoder, {"num_heads": 3}, "DEFORMABLE_ENCODER.NUM_HEADS is 3; it must divide"),
        (decoder, {"num_heads": 5}, "DEFORMABLE_DECODER.NUM_HEADS is 5; it must divide"),
        (encoder, {"num_points": 0}, "DEFORMABLE_ENCODER.NUM_POINTS is 0"),
        (decoder, {"two_stage": True}, "REFINE_BOXES is False; it must be True with TWO_STAGE"),
        (decoder, {"variant": "two_stage", "num_levels": 1}, "must be False with one level"),
        (decoder, {"class_head": "sigmoid"}, "CLASS_HEAD is 'sigmoid'"),
        (decoder, {"variant": "two_stage", "class_head": "softmax"}, "must be 'focal' with .*TWO_"),
    ],
)
def test_wrong_options_raise_one_line(make, options, reason):
    with pytest.raises(ValueError, match=reason) as error:
        make(**options)
    assert "\n" not in str(error.value)


def test_learning_rates_and_weight_decay():
    """Offsets, reference points and the pretrained backbone have a tenth of the learning rate."""
    cfg = load("deformable_detr_R_50.yaml", *NARROW)
    model = build_model(cfg)
    groups = build_optimizer(cfg, model).param_groups
    rates = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        slow = ("backbone.bottom_up.", "sampling_offsets", "reference_points")
        factor = 0.1 if any(part in name for part in slow) else 1
        assert rates[parameter] == pytest.approx(2e-4 * factor), name
    assert {group["weight_decay"] for group in groups} == {1e-4}


@pytest.mark.parametrize(
    ("config", "variant", "levels", "millions"),
    [
        ("R_50", "base", 4, 40.07),  # 40 M in the paper
        ("R_50_refine", "refine", 4, 40.83),
        ("R_50_two_stage", "two_stage", 4, 41.16),
        ("single_scale_R_50", "base", 1, 34.06),
    ],
)
def test_published_weights_fit_the_model(config, variant, levels, millions):
    model = model_without_memory(CONFIGS / f"deformable_detr_{config}.yaml")
    shapes = published_shapes(variant, levels)
    weights = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    fitted = convert_weights.fit(conversion.convert(weights), model.state_dict(), num_classes=80)
    assert fitted.keys() == model.state_dict().keys()
    total = sum(p.numel() for p in model.parameters())
    assert total / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_conversions_agree(variant):
    """Hugging Face's weights under the published names convert to the same weights."""
    theirs = hugging_face(variant).state_dict()
    theirs = {name: weight for name, weight in theirs.items() if ".backbone." not in name}
    renamed = {}
    for name, weight in theirs.items():
        if name.endswith(("q_proj.weight", "q_proj.bias")):
            parts = [theirs[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            name, weight = name.replace("q_proj.", "in_proj_"), torch.cat(parts)
        elif re.search("[kv]_proj", name):
            continue
        for old, new in (
            (r"^model\.(?=encoder|decoder|level|reference|enc_|pos_)", "transformer."),
            (r"^model\.input_proj", "input_proj"),
            (r"^model\.query_position_embeddings", "query_embed"),
            (r"mlp\.fc", "linear"),
            (r"self_attn\.o_proj", "self_attn.out_proj"),
            (r"(encoder\.layers\.\d\.)self_attn_layer_norm", r"\1norm1"),
            (r"(encoder\.layers\.\d\.)final_layer_norm", r"\1norm2"),
            (r"(decoder\.layers\.\d\.)self_attn_layer_norm", r"\1norm2"),
            (r"encoder_attn_layer_norm", "norm1"),
            (r"(decoder\.layers\.\d\.)final_layer_norm", r"\1norm3"),
            (r"encoder_attn", "cross_attn"),
        ):
            name = re.sub(old, new, name)
        renamed[name] = weight
    assert renamed.keys() < published_shapes(variant).keys()
    found, wanted = conversion.convert(renamed), conversion.convert_huggingface(theirs)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    # a file may hold the heads once
    once = {name: weight for name, weight in theirs.items() if ".decoder.bbox_embed" not in name}
    assert conversion.convert_huggingface(once).keys() == wanted.keys()
