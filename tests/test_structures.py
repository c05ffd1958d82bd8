"""Pyramid and Prediction: what they hold, what they refuse."""

import pytest
import torch
from helpers import STRIDES, batch_pyramid, level_size, random_levels

from dynamic_detr import Pyramid
from dynamic_detr.structures import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh

SIZES = [(100, 136), (65, 128), (128, 1)]


def pyramid(garbage: float = 1.0) -> Pyramid:
    return batch_pyramid([random_levels(s, 4) for s in SIZES], SIZES, (128, 192), garbage=garbage)


def test_true_sizes_are_rounded_up():
    batch = pyramid()
    assert len(batch) == 5
    assert batch.channels == 4
    for level, stride in enumerate(STRIDES):
        assert batch.sizes(level).tolist() == [list(level_size(size, stride)) for size in SIZES]
    assert batch.sizes(4).tolist() == [[2, 3], [2, 2], [2, 1]]


def test_valid_marks_true_pixels():
    batch = pyramid()
    for level, stride in enumerate(STRIDES):
        expected = torch.zeros(3, 1, *batch.features[level].shape[-2:], dtype=torch.bool)
        for image, size in enumerate(SIZES):
            height, width = level_size(size, stride)
            expected[image, :, :height, :width] = True
        assert torch.equal(batch.valid_mask(level), expected)
        assert not batch.is_unpadded(level)


@pytest.mark.parametrize("garbage", [1.0, float("inf")], ids=["noise", "NaN"])
def test_masked_is_zero_beyond_and_unchanged_within(garbage):
    batch = pyramid(garbage)
    masked = batch.masked()
    for level, (before, after) in enumerate(zip(batch.features, masked.features, strict=True)):
        valid = batch.valid_mask(level).expand_as(before)
        assert torch.equal(after[valid], before[valid])
        assert not after[~valid].any()
        assert after.is_contiguous(memory_format=torch.channels_last)
        assert after.dtype == before.dtype


def test_masked_does_nothing_where_there_is_no_padding():
    batch = batch_pyramid([random_levels((128, 192), 4)] * 2, [(128, 192)] * 2, (128, 192))
    assert batch.masked() is batch
    assert all(batch.is_unpadded(level) for level in range(5))


def test_gradient_of_masked_is_masked():
    batch = pyramid()
    feature = batch.features[0].requires_grad_()
    batch.masked().features[0].sum().backward()
    assert torch.equal(feature.grad, batch.valid_mask(0).expand_as(feature).to(feature.dtype))


def test_table_is_row_by_row_fine_to_coarse_and_built_once():
    batch = pyramid()
    table = batch.table()
    assert batch.table() is table
    row = 0
    for feature in batch.features:
        for y in range(feature.shape[2]):
            for x in range(feature.shape[3]):
                if (y + x) % 7 == 0:
                    assert torch.equal(table[:, row], feature[:, :, y, x])
                row += 1
    assert table.shape == (3, row, 4)


def test_with_features_keeps_sizes_and_forgets_the_table():
    batch = pyramid()
    batch.table(), batch.valid_mask(0), batch.is_unpadded(0)
    other = batch.with_features([feature + 1 for feature in batch.features])
    assert other.strides == batch.strides
    assert other.image_sizes is batch.image_sizes
    torch.testing.assert_close(other.table(), batch.table() + 1)
    assert torch.equal(other.valid_mask(0), batch.valid_mask(0))


@pytest.mark.parametrize(
    ("features", "strides", "sizes", "message"),
    [
        ([], (), (2, 2), "0 levels"),
        ([(2, 4, 8, 8)], (4, 8), (2, 2), "1 levels and 2 strides"),
        ([(2, 4, 8, 8), (2, 5, 4, 4)], (4, 8), (2, 2), "level 1 has shape"),
        ([(2, 4, 8, 8), (1, 4, 4, 4)], (4, 8), (2, 2), "level 1 has shape"),
        ([(2, 4, 8)], (4,), (2, 2), "level 0 has shape"),
        ([(2, 4, 8, 8)], (4,), (1, 2), "image_sizes"),
        ([(2, 4, 8, 8)], (4,), (2,), "image_sizes"),
    ],
)
def test_what_does_not_fit_is_named(features, strides, sizes, message):
    with pytest.raises(ValueError, match=f"^Pyramid: .*{message}") as caught:
        Pyramid([torch.zeros(s) for s in features], strides, torch.ones(sizes, dtype=torch.int64))
    assert "\n" not in str(caught.value)


def test_sizes_must_be_integers():
    with pytest.raises(ValueError, match="^Pyramid: image_sizes is torch.float32"):
        Pyramid([torch.zeros(1, 4, 8, 8)], (4,), torch.ones(1, 2))


def test_box_formats():
    corners = torch.tensor([[1.0, 2.0, 5.0, 10.0], [0.0, 0.0, 0.0, 0.0]])
    centers = torch.tensor([[3.0, 6.0, 4.0, 8.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(box_xyxy_to_cxcywh(corners), centers)
    torch.testing.assert_close(box_cxcywh_to_xyxy(centers), corners)
    boxes = torch.randn(2, 3, 4)
    torch.testing.assert_close(box_cxcywh_to_xyxy(box_xyxy_to_cxcywh(boxes)), boxes)
    assert box_cxcywh_to_xyxy(torch.zeros(0, 4)).shape == (0, 4)
