"""Pyramid: masks, tables, sizes and argument checks."""

import pytest
import torch
from helpers import STRIDES, batch_pyramid, level_size, random_levels

from dynamic_detr import Pyramid
from dynamic_detr.layers import sine_positions

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


def test_valid_mask_marks_true_positions():
    batch = pyramid()
    for level, stride in enumerate(STRIDES):
        expected = torch.zeros(3, 1, *batch.features[level].shape[-2:], dtype=torch.bool)
        for image, size in enumerate(SIZES):
            height, width = level_size(size, stride)
            expected[image, :, :height, :width] = True
        assert torch.equal(batch.valid_mask(level), expected)
        assert not batch.is_unpadded(level)


@pytest.mark.parametrize("garbage", [1.0, float("inf")], ids=["noise", "NaN"])
@pytest.mark.parametrize("as_table", [False, True])
def test_masked_is_zero_in_the_padding_only(garbage, as_table):
    batch = pyramid(garbage)
    masked = (batch.with_table(batch.table()) if as_table else batch).masked()
    for level, (before, after) in enumerate(zip(batch.features, masked.features, strict=True)):
        valid = batch.valid_mask(level).expand_as(before)
        assert torch.equal(after[valid], before[valid])
        assert not after[~valid].any()
        assert as_table or after.is_contiguous(memory_format=torch.channels_last)
        assert after.dtype == before.dtype


def test_masked_without_padding_returns_the_pyramid():
    batch = batch_pyramid([random_levels((128, 192), 4)] * 2, [(128, 192)] * 2, (128, 192))
    assert batch.masked() is batch
    assert all(batch.is_unpadded(level) for level in range(5))


@pytest.mark.parametrize("as_table", [False, True])
def test_gradient_of_masked_is_masked(as_table):
    batch = pyramid()
    feature = batch.features[0].requires_grad_()
    batch = batch.with_table(batch.table()) if as_table else batch
    batch.masked().features[0].sum().backward()
    assert torch.equal(feature.grad, batch.valid_mask(0).expand_as(feature).to(feature.dtype))


def test_table_is_fine_to_coarse_and_built_once():
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


def test_with_features_shares_the_cache_of_the_sizes():
    batch = pyramid()
    batch.table(), batch.valid_mask(0)
    other = batch.with_features([feature + 1 for feature in batch.features])
    assert other.strides == batch.strides
    assert other.image_sizes is batch.image_sizes
    torch.testing.assert_close(other.table(), batch.table() + 1)
    assert other.valid_mask(0) is batch.valid_mask(0)
    assert sine_positions(other, 4, 1) is sine_positions(batch, 4, 1)
    assert not torch.equal(sine_positions(batch, 4, 0.5), sine_positions(batch, 4, 1))


@pytest.mark.parametrize(
    ("features", "strides", "sizes", "message"),
    [
        ([], (), (2, 2), "0 levels"),
        ([(2, 4, 8, 8)], (4, 8), (2, 2), "1 levels and 2 strides"),
        ([(2, 4, 8, 8), (2, 5, 4, 4)], (4, 8), (2, 2), "for level 1, got"),
        ([(2, 4, 8, 8), (1, 4, 4, 4)], (4, 8), (2, 2), "for level 1, got"),
        ([(2, 4, 8)], (4,), (2, 2), "for level 0, got"),
        ([(2, 4, 8, 8)], (4,), (1, 2), "image_sizes"),
        ([(2, 4, 8, 8)], (4,), (2,), "image_sizes"),
    ],
)
def test_wrong_shapes_raise_one_line(features, strides, sizes, message):
    with pytest.raises(ValueError, match=f"^Pyramid: .*{message}") as caught:
        Pyramid([torch.zeros(s) for s in features], strides, torch.ones(sizes, dtype=torch.int64))
    assert "\n" not in str(caught.value)


def test_sizes_must_be_integers():
    with pytest.raises(ValueError, match="^Pyramid: expected integer .*, got torch.float32"):
        Pyramid([torch.zeros(1, 4, 8, 8)], (4,), torch.ones(1, 2))
