"""Sparse R-CNN: equality of the dynamic decoder with its head, and published weights."""

import convert_weights
import pytest
import torch
from conftest import ROOT
from conversions.sparse_rcnn import convert
from helpers import batch_pyramid, dynamic_decoder, model_without_memory, random_levels
from published import sparse_rcnn, sparse_rcnn_stage, weights_of
from reference.sparse_rcnn import head
from torchvision.ops import box_convert

CONFIGS = ROOT / "configs" / "Sparse-RCNN"


C, CLASSES, QUERIES, DYNAMIC, BINS, FFN, HEADS, STAGES = 16, 3, 6, 4, 3, 24, 8, 3
STRIDES, IMAGE = (4, 8, 16, 32), (128, 192)


def test_decoder_equals_the_reference():
    weights = {"init_proposal_features.weight": (QUERIES, C)}
    for number in range(STAGES):
        stage = f"head.head_series.{number}."
        weights |= sparse_rcnn_stage(stage, CLASSES, C, DYNAMIC, BINS, FFN)
    theirs = {name: tensor.double() * 0.5 for name, tensor in weights_of(weights, "cpu").items()}
    theirs["init_proposal_boxes.weight"] = 0.2 + 0.6 * torch.rand(QUERIES, 4).double()
    ours = dynamic_decoder(
        C,
        CLASSES,
        num_queries=QUERIES,
        num_stages=STAGES,
        num_heads=HEADS,
        ffn_dim=FFN,
        dynamic_dim=DYNAMIC,
        pooling_size=BINS,
    ).double()
    converted = {k.removeprefix("decoder."): v for k, v in convert(theirs).items()}
    ours.load_state_dict(converted)
    images = [random_levels(IMAGE, C, STRIDES) for _ in range(2)]
    pyramid = batch_pyramid(images, [IMAGE] * 2, IMAGE, STRIDES)
    predictions = ours(pyramid)

    for tensor in theirs.values():
        tensor.requires_grad_()
    levels = [level.contiguous() for level in pyramid.features]
    wanted = head(levels, pyramid.image_sizes.double(), theirs, HEADS, BINS)
    scale = torch.tensor([IMAGE[1], IMAGE[0]] * 2).double()
    losses = [0, 0]
    for prediction, (logits, boxes) in zip(predictions, wanted, strict=True):
        found = box_convert(prediction.pred_boxes, "cxcywh", "xyxy")
        torch.testing.assert_close(prediction.pred_logits, logits, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(found, boxes / scale, rtol=1e-8, atol=1e-8)
        losses[0] += prediction.pred_logits.square().sum() + found.square().sum()
        losses[1] += logits.square().sum() + (boxes / scale).square().sum()
    for loss in losses:
        loss.backward()
    grads = convert({name: tensor.grad for name, tensor in theirs.items()})
    for name, parameter in ours.named_parameters():
        wanted_grad = grads[f"decoder.{name}"]
        tolerance = 1e-8 * wanted_grad.abs().max().item()
        torch.testing.assert_close(parameter.grad, wanted_grad, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    ("config", "queries", "depth"),
    [("sparse_rcnn_R_50", 100, 50), ("sparse_rcnn_R_101_300", 300, 101)],
)
def test_published_weights_fit_the_model(config, queries, depth):
    model = model_without_memory(CONFIGS / f"{config}.yaml")
    published = weights_of(sparse_rcnn(queries, depth=depth))
    fitted = convert_weights.fit(convert(published), model.state_dict(), num_classes=80)
    assert len(fitted) == len(published)
    broken = {k: v for k, v in published.items() if k != "head.head_series.5.norm3.bias"}
    with pytest.raises(convert_weights.UserError, match=r"missing: decoder.stages.5.norm_ffn.bias"):
        convert_weights.fit(convert(broken), model.state_dict(), num_classes=80)


def test_converted_weights_load(tmp_path, capsys):
    config, source, target = (tmp_path / name for name in ("c.yaml", "in.pth", "out/out.pth"))
    config.write_text(
        f"_BASE_: {CONFIGS / 'sparse_rcnn_R_50.yaml'}\n"
        "MODEL: {DYNAMIC_DECODER: {NUM_STAGES: 1, NUM_QUERIES: 3, FFN_DIM: 8, POOLING_SIZE: 1}}\n"
    )
    shapes = {k: s for k, s in sparse_rcnn(3).items() if "head_series" not in k}
    shapes |= sparse_rcnn_stage("head.head_series.0.", 80, bins=1, ffn=8)
    weights = weights_of(shapes, "cpu")
    torch.save({"model": weights, "iteration": 3}, source)
    arguments = ["--from", "sparse-rcnn", "--config-file", str(config), str(source), str(target)]
    convert_weights.main(arguments)
    written = torch.load(target)["model"]
    assert f"{len(shapes)} weights" in capsys.readouterr().out
    name = "head.head_series.0.bboxes_delta.bias"
    assert torch.equal(written["decoder.stages.0.box_deltas.bias"], weights[name])

    weights["head.mystery"] = weights.pop(name)
    torch.save(weights, source)
    with pytest.raises(SystemExit) as stop:
        convert_weights.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "head.mystery is left over" in error and error.count("\n") == 1
