"""Dense queries: selection compared with torchvision's NMS, anchors, and logits of the stages."""

import pytest
import torch
from helpers import batch_pyramid, defaults, random_levels, shake, small_config
from torchvision.ops import box_convert, nms

from dynamic_detr import Pyramid
from dynamic_detr.decoders import build_decoder
from dynamic_detr.decoders.dense_queries import DenseQueries
from dynamic_detr.ops import nms_mask

CHANNELS, CLASSES, STRIDES = 16, 3, (8, 16, 32)
SIZES = [(100, 136), (64, 190), (40, 40)]


def dense_queries(num_queries: int = 12, **options: object) -> DenseQueries:
    options = {**defaults("MODEL.DENSE_QUERIES"), **options}
    torch.manual_seed(0)
    return shake(DenseQueries(CHANNELS, CLASSES, num_queries=num_queries, **options), 0.1).double()


def pyramid() -> Pyramid:
    torch.manual_seed(0)
    images = [random_levels(size, CHANNELS, STRIDES) for size in SIZES]
    return batch_pyramid(images, SIZES, (128, 192), STRIDES)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("count", [1, 2, 300])
def test_mask_equals_torchvision(count, threshold):
    torch.manual_seed(count)
    low = torch.rand(3, count, 2)
    boxes = torch.cat([low, low + 0.05 + 0.5 * torch.rand(3, count, 2)], dim=-1)
    scores = torch.arange(count, 0, -1.0)
    for image, kept in zip(boxes, nms_mask(boxes, threshold), strict=True):
        assert kept.nonzero()[:, 0].tolist() == nms(image, scores, threshold).tolist()


def test_mask_follows_a_chain_of_boxes():
    """Each box overlaps only its neighbours, so every second box is kept."""
    left = torch.arange(16.0)
    boxes = torch.stack([left, 0 * left, left + 1.9, 1 + 0 * left], dim=1)
    assert nms_mask(boxes[None], 0.2)[0].tolist() == [True, False] * 8


@torch.no_grad()
@pytest.mark.parametrize("candidates", [5, 40, 1000])
@pytest.mark.parametrize("threshold", [0.05, 0.7])
def test_queries_are_the_best_distinct_predictions(candidates, threshold):
    """Kept candidates come first, then suppressed ones, each by score."""
    part = dense_queries(candidates=candidates, nms_threshold=threshold, anchor_scale=3.0)
    batch = pyramid()
    start = part(batch)
    prediction = start.dense
    for image, valid in enumerate(batch.valid_table()):
        rows = valid.nonzero()[:, 0]
        scores = prediction.pred_logits[image, rows].max(dim=-1).values
        rows = rows[scores.argsort(descending=True)][: max(candidates, 12)]
        corners = box_convert(prediction.pred_boxes[image, rows], "cxcywh", "xyxy")
        kept = nms(corners, torch.arange(len(rows), 0, -1.0, dtype=corners.dtype), threshold)
        kept = kept.tolist()
        wanted = rows[(kept + sorted(set(range(len(rows))) - set(kept)))[:12]]
        torch.testing.assert_close(start.boxes[image], prediction.pred_boxes[image, wanted])
        torch.testing.assert_close(start.logits[image], prediction.pred_logits[image, wanted])
        content = part.content_norm(part.content(batch.table()[image, wanted]))
        torch.testing.assert_close(start.content[image], content)


@torch.no_grad()
def test_boxes_are_relative_to_square_anchors():
    part = dense_queries(anchor_scale=3.0)
    part.box_deltas.weight.zero_()
    part.box_deltas.bias.zero_()
    batch = pyramid()
    prediction = part(batch).dense
    boxes = iter(prediction.pred_boxes[1])
    height, width = SIZES[1]
    for stride, (rows, columns) in zip(STRIDES, batch.shapes, strict=True):
        for row in range(rows):
            for column in range(columns):
                x, y, side = (column + 0.5) * stride, (row + 0.5) * stride, 3 * stride
                box = torch.tensor([x / width, y / height, side / width, side / height])
                torch.testing.assert_close(next(boxes).float(), box)
    assert not list(boxes)


@torch.no_grad()
def test_fewer_positions_than_queries():
    """The last queries have the box (0.5, 0.5, 0.5, 0.5), logits 0 and constant content."""
    part, size = dense_queries(num_queries=9), (40, 20)
    alone = [random_levels(size, CHANNELS, (16, 32))]
    start = part(batch_pyramid(alone, [size], size, (16, 32)))
    assert start.dense.pred_boxes.shape[1] == 6 + 2
    assert (start.boxes[0, 8] == 0.5).all() and not start.logits[0, 8].any()
    torch.testing.assert_close(start.content[0, 8], part.content_norm(part.content.bias))
    padded = part(batch_pyramid(alone, [size], (64, 64), (16, 32)))
    for name in ("content", "logits", "boxes"):
        torch.testing.assert_close(getattr(padded, name), getattr(start, name))


def test_config_reaches_the_queries():
    options = {"ANCHOR_SCALE": 3.0, "CANDIDATES": 77, "NMS_THRESHOLD": 0.4}
    cfg = small_config(
        CLASS_HEAD="softmax",
        DYNAMIC_DECODER__QUERIES="dense",
        **{f"DENSE_QUERIES__{key}": value for key, value in options.items()},
    )
    decoder = build_decoder(cfg)
    part = decoder.dense_queries
    assert (part.anchor_scale, part.candidates, part.nms_threshold) == (3.0, 77, 0.4)
    assert part.num_queries == 32 and part.class_logits.out_features == 5
    assert "query_embed.weight" not in decoder.state_dict()


def test_a_bad_option_is_one_line():
    with pytest.raises(ValueError, match=r"^MODEL\.DENSE_QUERIES\.NMS_THRESHOLD is 1\.5; .*<= 1"):
        dense_queries(nms_threshold=1.5)


@torch.no_grad()
@pytest.mark.parametrize("class_head", ["focal", "softmax"])
def test_stages_add_to_the_logits_of_the_queries(class_head):
    """The class layers are constant; "no object" starts from logit 0."""
    decoder = build_decoder(
        small_config(HIDDEN_DIM=16, CLASS_HEAD=class_head, DYNAMIC_DECODER__QUERIES="dense")
    )
    for number, stage in enumerate(decoder.stages, start=1):
        stage.class_logits.weight.zero_()
        stage.class_logits.bias.fill_(number)
    batch = pyramid()
    batch = batch.with_features([feature.float() for feature in batch.features])
    start = decoder.dense_queries(batch).logits
    dense, first, second = decoder(batch)
    assert dense.is_proposal
    for prediction, added in ((first, 1), (second, 1 + 2)):
        torch.testing.assert_close(prediction.pred_logits[..., :5], start + added)
        if class_head == "softmax":
            assert (prediction.pred_logits[..., 5] == added).all()
