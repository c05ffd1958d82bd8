"""The operators against torchvision's and against float64 loops, forward and backward."""

import numpy as np
import pytest
import torch
import torchvision
from helpers import STRIDES, batch_pyramid, level_size, random_levels
from hypothesis import given
from hypothesis import strategies as st
from reference.sampling import roi_align, roi_level
from torch import Tensor

from dynamic_detr import Pyramid
from dynamic_detr.ops import (
    assign_levels,
    dynamic_conv,
    pyramid_roi_align,
    weighted_gather,
)


def gradients(out: Tensor, tensors: tuple[Tensor | None, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return list(torch.autograd.grad(out, [t for t in tensors if t is not None], upstream))


def random_boxes(batch: int, queries: int, height: float, width: float) -> Tensor:
    """Corners, some of them beyond the image."""
    corners = torch.rand(batch, queries, 2, 2, dtype=torch.float64) * 1.4 - 0.2
    low, high = corners.amin(dim=2), corners.amax(dim=2)
    return torch.cat([low, high], dim=-1) * torch.tensor([width, height] * 2)


class TestRoIAlign:
    @pytest.mark.parametrize("image_size", [(128, 128), (100, 136), (65, 200), (64, 3), (1, 1)])
    @pytest.mark.parametrize(("bins", "ratio"), [(7, 2), (3, 1), (1, 3)])
    def test_is_the_loop(self, image_size, bins, ratio):
        levels = random_levels(image_size, 4)
        boxes = random_boxes(1, 6, *image_size)
        canonical_size = 60  # boxes of these small images come from every level
        padded = (image_size[0] + 70, image_size[1] + 13)
        pyramid = batch_pyramid([levels], [image_size], padded, garbage=100.0)
        pooled = pyramid_roi_align(pyramid, boxes, bins, ratio, canonical_size)
        assert pooled.shape == (1, 6, bins * bins, 4)
        arrays = [level.numpy() for level in levels]
        for query in range(6):
            box = boxes[0, query].numpy()
            expected = roi_align(arrays, STRIDES, box, bins, ratio, canonical_size)
            np.testing.assert_allclose(pooled[0, query].numpy(), expected, rtol=1e-9, atol=1e-9)

    def test_is_torchvisions_on_levels_without_padding(self):
        image_size, queries = (128, 192), 40
        images = [random_levels(image_size, 8) for _ in range(2)]
        pyramid = batch_pyramid(images, [image_size] * 2, image_size)
        for feature in pyramid.features:
            feature.requires_grad_()
        boxes = random_boxes(2, queries, *image_size)
        pooled = pyramid_roi_align(pyramid, boxes, canonical_size=80)
        level = assign_levels(boxes, STRIDES, 80)
        assert len(level.unique()) >= 4
        expected = torch.zeros_like(pooled)
        for index, (feature, stride) in enumerate(zip(pyramid.features, STRIDES, strict=True)):
            chosen = (level == index).nonzero()
            rois = torch.cat([chosen[:, :1], boxes[level == index]], dim=1)
            regions = torchvision.ops.roi_align(feature, rois, 7, 1 / stride, 2, aligned=True)
            expected[level == index] = regions.flatten(2).transpose(1, 2)
        torch.testing.assert_close(pooled, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            gradients(pooled, pyramid.features), gradients(expected, pyramid.features)
        )

    def test_clamps_at_the_true_edge_as_torchvision_does_without_padding(self):
        """What a box across the true edge pools is what it pools of the image alone, whatever lies
        in the padding; torchvision's operator, given the padded level, reads the padding."""
        image_size, stride = (50, 70), 4
        levels = random_levels(image_size, 3, strides=(stride,))
        box = torch.tensor([[[40.0, 30.0, 72.0, 52.0]]], dtype=torch.float64)
        alone = (
            torchvision.ops.roi_align(levels[0][None], [box[0]], 7, 1 / stride, 2, aligned=True)
            .flatten(2)
            .transpose(1, 2)
        )
        padded = batch_pyramid([levels], [image_size], (128, 128), (stride,), garbage=50.0)
        pooled = pyramid_roi_align(padded, box)
        torch.testing.assert_close(pooled[0], alone, rtol=1e-9, atol=1e-9)
        leaking = torchvision.ops.roi_align(
            padded.features[0], [box[0]], 7, 1 / stride, 2, aligned=True
        )
        assert (leaking.flatten(2).transpose(1, 2) - alone).abs().max() > 1

    def test_boxes_get_no_gradient_and_features_do(self):
        pyramid = batch_pyramid([random_levels((64, 64), 4)], [(64, 64)], (64, 64))
        pyramid.features[0].requires_grad_()
        boxes = random_boxes(1, 4, 30, 30).requires_grad_()
        pyramid_roi_align(pyramid, boxes).sum().backward()
        assert boxes.grad is None
        assert pyramid.features[0].grad.abs().sum() > 0

    @pytest.mark.parametrize(("batch", "queries"), [(2, 0), (0, 3), (0, 0)])
    def test_nothing_to_pool(self, batch, queries):
        features = [torch.randn(batch, 4, *level_size((64, 64), s)) for s in STRIDES]
        features = [feature.requires_grad_() for feature in features]
        sizes = torch.full((batch, 2), 64)
        boxes = torch.zeros(batch, queries, 4)
        pooled = pyramid_roi_align(Pyramid(features, STRIDES, sizes), boxes)
        assert pooled.shape == (batch, queries, 49, 4)
        pooled.sum().backward()

    @pytest.mark.parametrize(
        ("dtype", "tolerance"),
        [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)],
    )
    def test_dtypes(self, dtype, tolerance):
        exact = random_levels((100, 136), 4)
        boxes = random_boxes(1, 8, 100, 136).float()
        rounded = [level.to(dtype) for level in exact]
        wanted = pyramid_roi_align(
            batch_pyramid([[r.double() for r in rounded]], [(100, 136)], (128, 192)), boxes
        )
        pooled = pyramid_roi_align(batch_pyramid([rounded], [(100, 136)], (128, 192)), boxes)
        assert pooled.dtype == dtype
        torch.testing.assert_close(pooled.double(), wanted, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize(
        "bad",
        [
            [torch.nan] * 4,
            [0, 0, torch.inf, torch.inf],
            [-torch.inf, 0, torch.inf, 10],
            [1e30, 1e30, 2e30, 2e30],
            [-1e30, -1e30, 1e30, 1e30],
            [50, 50, 10, 10],
            [20, 20, 20, 20],
        ],
    )
    def test_boxes_that_are_no_region(self, bad):
        """They harm no other box, and reach no row outside the table."""
        pyramid = batch_pyramid([random_levels((64, 100), 4)], [(64, 100)], (64, 128))
        boxes = random_boxes(1, 3, 64, 100)
        expected = pyramid_roi_align(pyramid, boxes)
        boxes[0, 1] = torch.tensor(bad)
        pooled = pyramid_roi_align(pyramid, boxes)
        torch.testing.assert_close(pooled[0, [0, 2]], expected[0, [0, 2]])

    @pytest.mark.parametrize("shape", [(2, 3, 4), (1, 3, 5), (3, 4), (1, 4)])
    def test_wrong_shapes_are_named(self, shape):
        pyramid = batch_pyramid([random_levels((64, 64), 4)], [(64, 64)], (64, 64))
        with pytest.raises(ValueError, match="^pyramid_roi_align: boxes"):
            pyramid_roi_align(pyramid, torch.zeros(shape))

    @given(
        sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=3),
        queries=st.integers(0, 4),
        levels=st.integers(1, 5),
        bins=st.integers(1, 3),
    )
    def test_any_shape(self, sizes, queries, levels, bins):
        torch.manual_seed(0)
        strides = STRIDES[:levels]
        images = [random_levels(size, 2, strides) for size in sizes]
        padded = tuple(max(side) for side in zip(*sizes, strict=True))
        pyramid = batch_pyramid(images, sizes, padded, strides, garbage=1e3)
        boxes = random_boxes(len(sizes), queries, 90, 90)
        pooled = pyramid_roi_align(pyramid, boxes, bins)
        assert pooled.shape == (len(sizes), queries, bins * bins, 2)
        assert (pooled.abs() < 100).all()  # no garbage in it


class TestAssignLevels:
    def test_is_the_equation(self):
        boxes = random_boxes(1, 200, 900, 900)[0]
        boxes[::4, 2:] = boxes[::4, :2] + 10 * torch.rand(50, 2)
        found = assign_levels(boxes, STRIDES).tolist()
        assert found == [roi_level(box.numpy(), STRIDES) for box in boxes]
        assert set(found) == {0, 1, 2, 3, 4}

    def test_boundaries(self):
        sides = torch.tensor([1.0, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 896.0, 9000.0])
        boxes = torch.stack([sides * 0, sides * 0, sides, sides], dim=-1)
        assert assign_levels(boxes, STRIDES).tolist() == [0, 0, 1, 1, 2, 2, 3, 4, 4]

    @pytest.mark.parametrize(
        "box", [[torch.nan] * 4, [0, 0, torch.inf, 5], [9, 9, 1, 1], [3, 3, 3, 3]]
    )
    def test_boxes_that_are_no_region_go_to_the_finest(self, box):
        assert assign_levels(torch.tensor(box), STRIDES).item() == 0


class TestWeightedGather:
    def test_is_the_sum(self):
        table = torch.randn(6, 3, dtype=torch.float64)
        index = torch.randint(0, 6, (5, 4), dtype=torch.int32)
        weight = torch.randn(5, 4, dtype=torch.float64)
        expected = torch.zeros(5, 3, dtype=torch.float64)
        for m in range(5):
            for j in range(4):
                expected[m] += weight[m, j] * table[index[m, j]]
        torch.testing.assert_close(weighted_gather(table, index, weight), expected)

    def test_gradients(self):
        index = torch.randint(0, 6, (5, 4))
        tensors = (
            torch.randn(6, 3, dtype=torch.float64, requires_grad=True),
            torch.randn(5, 4, dtype=torch.float64, requires_grad=True),
        )
        assert torch.autograd.gradcheck(lambda t, w: weighted_gather(t, index, w), tensors)

    def test_nothing_to_gather_keeps_the_graph(self):
        table = torch.randn(6, 3, requires_grad=True)
        out = weighted_gather(table, torch.zeros(0, 4, dtype=torch.int32), torch.zeros(0, 4))
        assert out.shape == (0, 3)
        out.sum().backward()
        assert not table.grad.any()

    @pytest.mark.parametrize(
        ("shapes", "name"),
        [
            (((6,), (5, 4), (5, 4)), "table"),
            (((6, 3), (5,), (5,)), "index"),
            (((6, 3), (5, 4), (5, 3)), "weight"),
        ],
    )
    def test_wrong_shapes_are_named(self, shapes, name):
        table, index, weight = (torch.zeros(shape) for shape in shapes)
        with pytest.raises(ValueError, match=f"weighted_gather: .*{name}"):
            weighted_gather(table, index.int(), weight)


class TestDynamicConv:
    def test_every_region_has_its_own_filter(self):
        features, filters = torch.randn(2, 3, 9, 4), torch.randn(2, 3, 4, 5)
        out = dynamic_conv(features, filters)
        for image in range(2):
            for query in range(3):
                for position in range(9):
                    expected = features[image, query, position] @ filters[image, query]
                    torch.testing.assert_close(out[image, query, position], expected)

    @pytest.mark.parametrize(
        ("features", "filters"),
        [((2, 3, 9, 4), (2, 3, 5, 4)), ((2, 3, 9, 4), (2, 2, 4, 5)), ((3, 9, 4), (2, 3, 4, 5))],
    )
    def test_wrong_shapes_are_named(self, features, filters):
        with pytest.raises(ValueError, match="dynamic_conv: features .* filters"):
            dynamic_conv(torch.zeros(features), torch.zeros(filters))
