"""DETR: equality with Hugging Face's class and a small reference, and published weights."""

from pathlib import Path

import convert_weights
import pytest
import torch
import torchvision
from conftest import ROOT
from conversions import detr as conversion
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from helpers import (
    batch_pyramid,
    model_without_memory,
    random_levels,
    shake,
    training_input,
)
from published import assert_close, redraw, weights_of
from published import detr as published_shapes
from reference.detr import DETR
from torch import Tensor, nn

from dynamic_detr import Prediction, Pyramid
from dynamic_detr.decoders import TransformerDecoder
from dynamic_detr.encoders import TransformerEncoder
from dynamic_detr.engine.checkpoint import SafeCheckpointer
from dynamic_detr.files.config_file import read_config

CONFIGS = ROOT / "configs" / "DETR"


CLASSES, QUERIES, CHANNELS = 5, 12, 32
NARROW = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.LEVELS.OUT_CHANNELS", CHANNELS),
    *("MODEL.FPN.OUT_CHANNELS", CHANNELS, "MODEL.BACKBONE.FREEZE_AT", 0),
    *("MODEL.SET_DETECTOR.HIDDEN_DIM", CHANNELS, "MODEL.SET_DETECTOR.NUM_CLASSES", CLASSES),
    *("MODEL.TRANSFORMER_ENCODER.NUM_LAYERS", 2, "MODEL.TRANSFORMER_ENCODER.FFN_DIM", 48),
    *("MODEL.TRANSFORMER_DECODER.NUM_LAYERS", 3, "MODEL.TRANSFORMER_DECODER.FFN_DIM", 40),
    *("MODEL.TRANSFORMER_DECODER.NUM_QUERIES", QUERIES, "MODEL.DYNAMIC_ENCODER.NUM_GROUPS", 8),
    *("MODEL.TRANSFORMER_ENCODER.DROPOUT", 0.0, "MODEL.TRANSFORMER_DECODER.DROPOUT", 0.0),
]


def load(name: str, *options: object) -> CfgNode:
    return read_config(str(CONFIGS / name), ["MODEL.DEVICE", "cpu", *options])


def hugging_face() -> nn.Module:
    """Build Hugging Face's model with the sizes of NARROW, without dropout and frozen weights."""
    transformers = pytest.importorskip("transformers")
    resnet = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32, 64, 128], out_features=["stage4"]
    )
    config = transformers.DetrConfig(
        backbone_config=resnet,
        d_model=CHANNELS,
        num_queries=QUERIES,
        num_labels=CLASSES,
        encoder_layers=2,
        encoder_ffn_dim=48,
        encoder_attention_heads=8,
        decoder_layers=3,
        decoder_ffn_dim=40,
        decoder_attention_heads=8,
        dropout=0.0,
        attn_implementation="eager",
    )
    return redraw(transformers.DetrForObjectDetection(config)).requires_grad_(True)


def their_predictions(model: nn.Module, images: Tensor) -> list[dict[str, Tensor]]:
    """Return the predictions of each layer; hooks are needed because the class norms them twice."""
    states = []
    hooks = [
        layer.register_forward_hook(lambda _module, _inputs, output: states.append(output))
        for layer in model.model.decoder.layers
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    normed = [model.model.decoder.layernorm(state) for state in states]
    return [
        {
            "logits": model.class_labels_classifier(state),
            "pred_boxes": model.bbox_predictor(state).sigmoid(),
        }
        for state in normed
    ]


def their_losses(predictions: list[dict[str, Tensor]], targets: list) -> dict[str, Tensor]:
    """Return Hugging Face's unweighted losses under our names."""
    module = pytest.importorskip("transformers.loss.loss_for_object_detection")
    criterion = module.ImageLoss(
        module.HungarianMatcher(1, 5, 2), CLASSES, 0.1, ["labels", "boxes"]
    )
    targets = [{"class_labels": labels, "boxes": boxes} for labels, boxes in targets]
    names = {"loss_ce": "class", "loss_bbox": "l1", "loss_giou": "giou"}
    suffixes = [f"_{stage}" for stage in range(len(predictions) - 1)] + [""]
    return {
        f"loss_{names[name]}{suffix}": loss
        for suffix, prediction in zip(suffixes, predictions, strict=True)
        for name, loss in criterion(prediction, targets).items()
    }


def test_equals_hugging_face():
    """Logits, boxes, losses, gradients and converted names are equal."""
    theirs = hugging_face().train()
    ours = build_model(load("detr_R_50.yaml", *NARROW)).train()
    ours.load_state_dict(conversion.convert_huggingface(theirs.state_dict()))
    inputs = [
        training_input(128, 192, [[5, 5, 40, 44], [60, 20, 190, 120], [9, 80, 31, 90]], [1, 4, 0]),
        training_input(128, 192, [[100, 30, 140, 100]], [4]),
    ]
    images = ours._images(inputs).tensor
    predictions = ours._network(images, torch.tensor([[128, 192]] * 2))
    expected = their_predictions(theirs, images)
    assert len(predictions) == len(expected) == 3
    for stage, (found, wanted) in enumerate(zip(predictions, expected, strict=True)):
        assert_close(found.pred_logits, wanted["logits"], f"logits {stage}")
        assert_close(found.pred_boxes, wanted["pred_boxes"], f"boxes {stage}")
        assert wanted["logits"].std() > 0.1 and wanted["pred_boxes"].std() > 0.02

    targets = ours._targets(inputs)
    weights = {"class": 1, "l1": 5, "giou": 2}
    losses, wanted_losses = ours.criterion(predictions, targets), their_losses(expected, targets)
    assert losses.keys() == wanted_losses.keys()
    for name, loss in losses.items():
        assert_close(loss / weights[name.split("_")[1]], wanted_losses[name], name)

    sum(losses.values()).backward()
    sum(loss * weights[name.split("_")[1]] for name, loss in wanted_losses.items()).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    wanted_gradients = conversion.convert_huggingface(
        {name: p.grad for name, p in theirs.named_parameters()}
    )
    assert gradients.keys() == wanted_gradients.keys()
    # the content of the first self-attention is zero: its gradients are rounding errors
    first = "decoder.layers.0.self_attention.attention.in_proj_weight"
    assert gradients[first].abs().max() < 1e-6 > wanted_gradients[first].abs().max()
    for name, gradient in gradients.items():
        assert_close(gradient, wanted_gradients[name], name, floor=0.1 if name == first else 0)


STRIDES = (8, 16, 32)
SIZES = [(100, 136), (64, 190)]


def transformer(**options: object) -> nn.Sequential:
    """Build a small encoder and decoder with reproducible weights."""
    torch.manual_seed(0)
    small = {"num_layers": 2, "num_heads": 4, "ffn_dim": 24, "dropout": 0.0}
    small |= {"checkpoint_layers": False} | options
    encoder = TransformerEncoder(16, **small)
    decoder = TransformerDecoder(16, 3, class_head="softmax", levels=(), num_queries=6, **small)
    return shake(nn.Sequential(encoder, decoder).double(), 0.15)


def small_pyramid() -> Pyramid:
    torch.manual_seed(0)
    return batch_pyramid(
        [random_levels(size, 16, STRIDES) for size in SIZES], SIZES, (128, 192), STRIDES
    )


def outputs(predictions: list[Prediction]) -> list[Tensor]:
    return [tensor for p in predictions for tensor in (p.pred_logits, p.pred_boxes)]


def test_decoder_reads_the_selected_levels():
    whole, part = transformer()[1], transformer()[1]
    part.levels = (2, 0)
    pyramid = small_pyramid()
    coarse_and_fine = Pyramid(pyramid.features[::-2], STRIDES[::-2], pyramid.image_sizes)
    torch.testing.assert_close(outputs(part(pyramid)), outputs(whole(coarse_and_fine)))
    found, wanted = outputs(part(pyramid))[0], outputs(whole(pyramid))[0]
    assert (found - wanted).abs().max() > 1e-3


def parameters_without_gradient(cfg: CfgNode) -> list[str]:
    model = build_model(cfg).train()
    image = training_input(100, 128, [[5, 5, 40, 44], [60, 20, 120, 90]], [1, 4])
    losses = model([image, training_input(128, 90)])
    sum(losses.values()).backward()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert len(losses) == 9 and all(
        p.grad.isfinite().all() for _, p in trained if p.grad is not None
    )
    return [name for name, p in trained if p.grad is None]


@pytest.mark.parametrize(
    "name",
    [
        "detr_R_50.yaml",
        "detr_DC5_plus_R_50.yaml",
        "detr_R_50_dynamic_encoder.yaml",
        "detr_R_50_dynamic_encoder_C5.yaml",
    ],
)
def test_every_parameter_of_the_configs_gets_a_gradient(name):
    options = [*NARROW, "MODEL.RESNETS.NORM", "GN", "MODEL.RESNETS.STEM_OUT_CHANNELS", 32]
    options += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 128, "MODEL.RESNETS.WIDTH_PER_GROUP", 32]
    cfg = load(name, *options)
    assert parameters_without_gradient(cfg) == []


def test_parameters_of_dc5_plus():
    """41 million are published, frozen ones included."""
    model = model_without_memory(CONFIGS / "detr_DC5_plus_R_50.yaml")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(41e6, rel=0.02)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["MODEL.TRANSFORMER_ENCODER.NUM_HEADS", 7], r"ENCODER\.NUM_HEADS is 7; it must divide"),
        (["MODEL.TRANSFORMER_DECODER.NUM_HEADS", 7], r"DECODER\.NUM_HEADS is 7; it must divide"),
        (["MODEL.TRANSFORMER_DECODER.IN_FEATURES", ["p4"]], r"names \['p4'\]; .* has \['p5'\]"),
    ],
)
def test_wrong_options_raise_one_line(options, reason):
    with pytest.raises(ValueError, match=reason) as error:
        build_model(load("detr_R_50.yaml", *NARROW, *options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "depth"), [("detr_R_50.yaml", 50), ("detr_DC5_R_101.yaml", 101)])
def test_published_weights_fit_the_model(name, depth):
    shapes = published_shapes(depth)
    frozen = ("bn", "downsample.1", "body.conv1", "body.layer1")
    trained = {n: s for n, s in shapes.items() if not any(part in n for part in frozen)}
    if depth == 50:  # the number in the published training log
        assert sum(torch.Size(shape).numel() for shape in trained.values()) == 41_302_368
    weights = conversion.convert(weights_of(shapes))
    model = model_without_memory(CONFIGS / name).state_dict()
    assert len(weights) == len(shapes)
    fitted = convert_weights.fit(weights, model, num_classes=80)
    assert fitted.keys() == model.keys()


def write_config(path: Path, *options: object) -> str:
    path.write_text(load("detr_R_50.yaml", *options).dump())
    return str(path)


def test_converted_weights_give_the_same_predictions(tmp_path):
    """A file with the published names and class rows by COCO id is converted and loaded."""
    theirs = redraw(DETR(92, CHANNELS, 40, QUERIES, layers=2, width=4)).eval()
    torch.save({"model": theirs.state_dict(), "epoch": 3}, tmp_path / "published.pth")
    layers = ["MODEL.TRANSFORMER_DECODER.NUM_LAYERS", 2, "MODEL.TRANSFORMER_ENCODER.FFN_DIM", 40]
    wide = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 64, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256]
    options = [*NARROW, *layers, *wide, "MODEL.SET_DETECTOR.NUM_CLASSES", 80]
    config = write_config(tmp_path / "config.yaml", *options)
    convert_weights.convert_file("detr", tmp_path / "published.pth", tmp_path / "ours.pth", config)
    ours = build_model(load("detr_R_50.yaml", *options)).eval()
    ours.load_state_dict(torch.load(tmp_path / "ours.pth", weights_only=True)["model"])
    image = torch.randn(1, 3, 128, 96)
    with torch.no_grad():
        logits, boxes = theirs(image)
        found = ours._network(image, torch.tensor([[128, 96]]))[-1]
    assert_close(found.pred_boxes[0], boxes, "boxes")
    # person, fire hydrant, stop sign (13), toothbrush (90), no object
    rows = {0: 1, 10: 11, 11: 13, 79: 90, 80: 91}
    assert_close(found.pred_logits[0][:, list(rows)], logits[:, list(rows.values())], "logits")


@pytest.mark.parametrize("older", [False, True], ids=["newest", "older"])
def test_hugging_face_names_of_all_releases(older, tmp_path):
    theirs = hugging_face()
    weights = theirs.state_dict()
    if older:
        for old, new in (("o_proj", "out_proj"), ("mlp.fc", "fc")):
            weights = {name.replace(old, new): value for name, value in weights.items()}
        prefix = "model.backbone.conv_encoder.model."
        weights = {
            name.replace("model.backbone.model.", prefix): value for name, value in weights.items()
        }
    torch.save(weights, tmp_path / "theirs.pth")
    config = write_config(tmp_path / "config.yaml", *NARROW)
    args = tmp_path / "theirs.pth", tmp_path / "ours.pth", config
    convert_weights.convert_file("huggingface", *args)
    ours = torch.load(tmp_path / "ours.pth", weights_only=True)["model"]
    wanted = conversion.convert_huggingface(theirs.state_dict())
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], wanted[name]) for name in ours)


def test_torchvision_resnet_initialises_the_backbone(tmp_path):
    theirs = redraw(torchvision.models.resnet50(width_per_group=4))
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
    convert_weights.convert_file("torchvision", tmp_path / "resnet.pth", tmp_path / "R-50.pth")
    wide = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 64, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256]
    ours = build_model(load("detr_R_50.yaml", *NARROW, *wide))
    head = ours.decoder.class_logits.weight.clone()
    SafeCheckpointer(ours).load(str(tmp_path / "R-50.pth"))
    found, wanted = ours.backbone.bottom_up.eval(), theirs.eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for layer in list(theirs.children())[:-2]:
            wanted = layer(image if wanted is theirs else wanted)
        assert_close(found(image)["res5"], wanted, "res5")
    assert torch.equal(ours.decoder.class_logits.weight, head)
