"""RoIAlign over a pyramid against a float64 loop and torchvision's operator, forward and backward.

The kernels are compared with the plain path in float64; without a GPU they are interpreted.
"""

import importlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torchvision
from helpers import STRIDES, batch_pyramid, level_size, random_levels
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import check_float64, gradients, runs_plain_backward, use_kernels
from reference.sampling import roi_align, roi_level
from torch import Tensor

from dynamic_detr import Pyramid
from dynamic_detr.ops import assign_levels, pyramid_roi_align

roi_align_module = importlib.import_module("dynamic_detr.ops.roi_align")

CANONICAL = 25  # assigns boxes of small images to every level
BAD_BOXES = [
    [torch.nan] * 4,
    [0, 0, torch.inf, torch.inf],
    [-torch.inf, 0, torch.inf, 10],
    [1e30, 1e30, 2e30, 2e30],
    [-1e30, -1e30, 1e30, 1e30],
    [50, 50, 10, 10],
    [20, 20, 20, 20],
]


def random_boxes(batch: int, queries: int, height: float, width: float) -> Tensor:
    """Return boxes (B, Q, 4) as corners, some of them outside the image."""
    corners = torch.rand(batch, queries, 2, 2, dtype=torch.float64) * 1.4 - 0.2
    low, high = corners.amin(dim=2), corners.amax(dim=2)
    return torch.cat([low, high], dim=-1) * torch.tensor([width, height] * 2)


def pool_pyramid(pyramid: Pyramid, boxes: Tensor, *options, **named) -> Tensor:
    """Call the operator as a decoder stage does."""
    geometry = (pyramid.shapes, pyramid.strides, pyramid.image_sizes)
    return pyramid_roi_align(pyramid.table(), *geometry, boxes, *options, **named)


def images_of_two_sizes(channels: int, strides: Sequence[int] = STRIDES) -> Pyramid:
    """Return a padded float32 pyramid with NaN in the padding."""
    sizes = [(50, 70), (64, 33)]
    images = [random_levels(size, channels, strides, torch.float32) for size in sizes]
    return batch_pyramid(images, sizes, (64, 80), strides, garbage=float("inf"))


def boxes_of_all_sizes() -> Tensor:
    """Return two boxes in each of two images, on four different levels with `CANONICAL`."""
    corner = torch.rand(2, 2, 2) * 40 - 5
    side = torch.tensor([[6.0, 70.0], [18.0, 35.0]])[..., None]
    boxes = torch.cat([corner, corner + side], dim=-1)
    assert assign_levels(boxes, STRIDES, CANONICAL).tolist() == [[0, 3], [1, 2]]
    return boxes


def check(device: str, pyramid: Pyramid, boxes: Tensor, *options, tolerance: float = 1e-4) -> None:
    def pool(*features: Tensor) -> Tensor:
        where, dtype = features[0].device, features[0].dtype
        here = Pyramid(features, pyramid.strides, pyramid.image_sizes.to(where))
        corners = boxes.float().to(where, torch.promote_types(dtype, torch.float32))
        return pool_pyramid(here, corners, *options)

    check_float64(pool, pyramid.features, device, tolerance)


ANY_SHAPE = given(
    sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=3),
    queries=st.integers(0, 4),
    levels=st.integers(1, 5),
    bins=st.integers(1, 3),
    channels=st.integers(1, 9),
)


def check_any_shape(device: str, sizes, queries, levels, bins, channels) -> None:
    """Compare with float64, with NaN in the padding."""
    torch.manual_seed(0)
    strides = STRIDES[:levels]
    images = [random_levels(size, channels, strides, torch.float32) for size in sizes]
    padded = tuple(max(side) for side in zip(*sizes, strict=True))
    pyramid = batch_pyramid(images, sizes, padded, strides, garbage=float("inf"))
    check(device, pyramid, random_boxes(len(sizes), queries, 90, 90), bins)


@pytest.fixture
def on_kernel(monkeypatch) -> str:
    return use_kernels(monkeypatch, roi_align_module)


class TestBothPaths:
    @pytest.mark.parametrize(("batch", "queries"), [(2, 0), (0, 3), (0, 0)])
    def test_nothing_to_pool(self, device, batch, queries):
        shapes = [(batch, 4, *level_size((64, 64), s)) for s in STRIDES]
        features = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
        pyramid = Pyramid(features, STRIDES, torch.full((batch, 2), 64, device=device))
        pooled = pool_pyramid(pyramid, torch.zeros(batch, queries, 4, device=device))
        assert pooled.shape == (batch, queries, 49, 4)
        pooled.sum().backward()
        assert not any(feature.grad.any() for feature in features)

    @pytest.mark.parametrize(
        ("dtype", "tolerance"),
        [(torch.float32, 1e-4), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
    )
    def test_dtypes(self, device, dtype, tolerance):
        pyramid = images_of_two_sizes(6)
        pyramid = pyramid.with_features([feature.to(dtype) for feature in pyramid.features])
        check(device, pyramid, boxes_of_all_sizes(), 2, 2, CANONICAL, tolerance=tolerance)

    def test_bfloat16_gradient_of_many_boxes_at_one_pixel(self, device):
        """A sum of ones in bfloat16 would stop at 256."""
        feature = torch.randn(1, 2, 1, 1, dtype=torch.bfloat16, device=device).requires_grad_()
        sizes = torch.tensor([[64, 64]], device=device)
        boxes = torch.tensor([0.0, 0.0, 64.0, 64.0], device=device).expand(1, 300, 4)
        pool_pyramid(Pyramid((feature,), (64,), sizes), boxes, 1).sum().backward()
        assert feature.grad.flatten().tolist() == [300, 300]

    def test_memory_layout_does_not_matter(self, device):
        boxes = random_boxes(2, 4, 16, 20).float()
        tensors = [torch.randn(2, 20, 5), torch.tensor([[16, 20], [9, 20]]), boxes]
        results = []
        for layout in (lambda t: t, lambda t: torch.stack([t, t], dim=-1)[..., 0]):
            table, sizes, boxes = (layout(t.to(device)) for t in tensors)
            table.requires_grad_()
            pooled = pyramid_roi_align(table, [(4, 5)], (4,), sizes, boxes, 2)
            assert pooled.is_contiguous()
            results.append([pooled, *gradients(pooled, [table])])
        torch.testing.assert_close(*results)

    def test_images_larger_than_their_features_are_not_read_beyond_them(self, device):
        features = [torch.randn(1, 3, 8, 8), torch.randn(1, 3, 4, 4)]
        boxes = random_boxes(1, 5, 32, 32)
        pyramid = Pyramid(features, (4, 8), torch.tensor([[32, 32]]))
        larger = Pyramid(features, (4, 8), torch.tensor([[400, 32000]]))
        pooled = [pool_pyramid(p, boxes, canonical_size=40) for p in (pyramid, larger)]
        torch.testing.assert_close(*pooled, rtol=0, atol=0)
        check(device, larger, boxes, 2, 2, 40)


class TestRoIAlign:
    @pytest.mark.parametrize("image_size", [(128, 128), (100, 136), (65, 200), (64, 3), (1, 1)])
    @pytest.mark.parametrize(("bins", "ratio"), [(7, 2), (3, 1), (1, 3)])
    def test_is_the_loop(self, image_size, bins, ratio):
        levels = random_levels(image_size, 4)
        boxes = random_boxes(1, 6, *image_size)
        canonical_size = 60  # assigns boxes of these small images to every level
        padded = (image_size[0] + 70, image_size[1] + 13)
        pyramid = batch_pyramid([levels], [image_size], padded, garbage=100.0)
        pooled = pool_pyramid(pyramid, boxes, bins, ratio, canonical_size)
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
        pooled = pool_pyramid(pyramid, boxes, canonical_size=80)
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
        """A box across the true edge pools the same as in the unpadded image. torchvision's
        operator reads the padding."""
        image_size, stride = (50, 70), 4
        levels = random_levels(image_size, 3, strides=(stride,))
        box = torch.tensor([[[40.0, 30.0, 72.0, 52.0]]], dtype=torch.float64)

        def theirs(features: Tensor) -> Tensor:
            pooled = torchvision.ops.roi_align(features, [box[0]], 7, 1 / stride, 2, aligned=True)
            return pooled.flatten(2).transpose(1, 2)

        alone = theirs(levels[0][None])
        padded = batch_pyramid([levels], [image_size], (128, 128), (stride,), garbage=50.0)
        pooled = pool_pyramid(padded, box)
        torch.testing.assert_close(pooled[0], alone, rtol=1e-9, atol=1e-9)
        assert (theirs(padded.features[0]) - alone).abs().max() > 1

    def test_boxes_get_no_gradient_and_features_do(self):
        pyramid = batch_pyramid([random_levels((64, 64), 4)], [(64, 64)], (64, 64))
        pyramid.features[0].requires_grad_()
        boxes = random_boxes(1, 4, 30, 30).requires_grad_()
        pool_pyramid(pyramid, boxes).sum().backward()
        assert boxes.grad is None
        assert pyramid.features[0].grad.abs().sum() > 0

    def test_gradients_are_finite_differences(self):
        """Two images of different sizes; the padding gets no gradient."""
        sizes, strides = [(20, 9), (13, 16)], (4, 8)
        pyramid = batch_pyramid(
            [random_levels(s, 2, strides) for s in sizes], sizes, (24, 20), strides
        )
        boxes = random_boxes(2, 3, 16, 16)

        def pool(*features: Tensor) -> Tensor:
            return pool_pyramid(pyramid.with_features(features), boxes, 2, 2, 10)

        features = [feature.requires_grad_() for feature in pyramid.features]
        assert torch.autograd.gradcheck(pool, features)
        for level, grad in enumerate(gradients(pool(*features), features)):
            assert grad[pyramid.valid_mask(level).expand_as(grad)].any()
            assert not grad[~pyramid.valid_mask(level).expand_as(grad)].any()

    def test_autocast_changes_nothing(self):
        size = (64, 100)
        pyramid = batch_pyramid([random_levels(size, 4, dtype=torch.float32)], [size], (64, 128))
        boxes = random_boxes(1, 3, *size).float()
        expected = pool_pyramid(pyramid, boxes)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pooled = pool_pyramid(pyramid, boxes)
        assert pooled.dtype == torch.float32
        assert pooled.equal(expected)

    @pytest.mark.parametrize("bad", BAD_BOXES)
    def test_bad_boxes_leave_others_unchanged(self, bad):
        pyramid = batch_pyramid([random_levels((64, 100), 4)], [(64, 100)], (64, 128))
        boxes = random_boxes(1, 3, 64, 100)
        expected = pool_pyramid(pyramid, boxes)
        boxes[0, 1] = torch.tensor(bad)
        pooled = pool_pyramid(pyramid, boxes)
        torch.testing.assert_close(pooled[0, [0, 2]], expected[0, [0, 2]])

    def test_wrong_kinds_are_named(self):
        pyramid = batch_pyramid([random_levels((64, 64), 4)], [(64, 64)], (64, 64))
        boxes = random_boxes(1, 3, 64, 64)
        with pytest.raises(ValueError, match=r"^pyramid_roi_align: boxes: expected a floating"):
            pool_pyramid(pyramid, boxes.long())
        with pytest.raises(ValueError, match=r"^pyramid_roi_align: boxes: .* on cpu, got .* meta$"):
            pool_pyramid(pyramid, boxes.to("meta"))
        sizes = Pyramid(pyramid.features, STRIDES, pyramid.image_sizes.to("meta"))
        with pytest.raises(ValueError, match=r"^pyramid_roi_align: image_sizes: .* meta$"):
            pool_pyramid(sizes, boxes)
        whole = pyramid.with_features([feature.int() for feature in pyramid.features])
        with pytest.raises(ValueError, match=r"^pyramid_roi_align: table: .* torch.int32$"):
            pool_pyramid(whole, boxes)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"table": torch.zeros(1, 20, 3)}, r"table: expected shape \(B, 21, C\)"),
            ({"spatial_shapes": [(4, 4), (0, 1)]}, "spatial_shapes: expected a list"),
            ({"strides": (8,)}, r"strides: .* for each of 2 levels, got \(8,\)"),
            ({"boxes": torch.zeros(2, 3, 4)}, r"boxes: expected shape \(1, Q, 4\)"),
            ({"boxes": torch.zeros(1, 3, 5)}, r"boxes: expected shape \(1, Q, 4\)"),
            ({"boxes": torch.zeros(1, 4)}, r"boxes: expected shape \(1, Q, 4\)"),
            ({"image_sizes": torch.zeros(2, 2).int()}, r"image_sizes: expected shape \(1, 2\)"),
        ],
    )
    def test_wrong_shapes_are_named(self, change, message):
        levels = {"spatial_shapes": [(4, 4), (1, 5)], "strides": (4, 8)}
        tensors = {"table": torch.zeros(1, 21, 3), "image_sizes": torch.ones(1, 2).int()}
        with pytest.raises(ValueError, match="^pyramid_roi_align: " + message):
            pyramid_roi_align(**{**levels, **tensors, "boxes": torch.zeros(1, 2, 4), **change})

    @pytest.mark.parametrize(
        ("name", "value"),
        [("output_size", 0), ("output_size", 7.0), ("sampling_ratio", -1)]
        + [("canonical_size", 0), ("canonical_size", torch.nan)],
    )
    def test_wrong_numbers_are_named(self, name, value):
        pyramid = batch_pyramid([random_levels((64, 64), 4)], [(64, 64)], (64, 64))
        with pytest.raises(ValueError, match=f"^pyramid_roi_align: {name}: .* got {value}$"):
            pool_pyramid(pyramid, random_boxes(1, 3, 64, 64), **{name: value})

    @ANY_SHAPE
    def test_any_shape(self, **shape):
        check_any_shape("cpu", **shape)


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
    def test_bad_boxes_get_the_finest_level(self, box):
        assert assign_levels(torch.tensor(box), STRIDES).item() == 0


class TestKernel:
    @pytest.mark.parametrize("channels", [1, 5, 16])
    @pytest.mark.parametrize(("bins", "ratio"), [(7, 2), (3, 1), (1, 3)])
    def test_is_the_plain_path(self, on_kernel, channels, bins, ratio):
        pyramid, boxes = images_of_two_sizes(channels), boxes_of_all_sizes()
        check(on_kernel, pyramid, boxes, bins, ratio, CANONICAL)

    def test_more_channels_than_a_program_owns(self, on_kernel):
        check(on_kernel, images_of_two_sizes(300), boxes_of_all_sizes(), 2, 1, CANONICAL)

    @pytest.mark.parametrize("levels", [1, 2])
    def test_few_levels(self, on_kernel, levels):
        pyramid = images_of_two_sizes(3, STRIDES[:levels])
        check(on_kernel, pyramid, random_boxes(2, 3, 60, 60), 2, 2, 40)

    def test_one_pixel_levels(self, on_kernel):
        pyramid = batch_pyramid([random_levels((1, 1), 3, dtype=torch.float32)], [(1, 1)], (1, 1))
        check(on_kernel, pyramid, random_boxes(1, 4, 30, 30), 2)

    @pytest.mark.parametrize("shift", [0.0, 2.0], ids=["between pixels", "on pixels"])
    def test_on_and_between_pixels(self, on_kernel, shift):
        """Samples one pixel apart, up to the edge of the image and beyond."""
        pyramid = images_of_two_sizes(3, (4,))
        box = torch.tensor([0.0, 0.0, 16.0, 16.0])
        corners = [-20.0, -4.0, 0.0, 16.0, 36.0, 52.0]
        boxes = torch.stack([box + at + shift for at in corners]).expand(2, -1, 4)
        check(on_kernel, pyramid, boxes, 2, 2)

    @pytest.mark.parametrize("bad", BAD_BOXES)
    @pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, interpreting
    def test_bad_boxes(self, on_kernel, bad):
        boxes = random_boxes(2, 3, 60, 60)
        boxes[0, 1] = torch.tensor(bad)
        check(on_kernel, images_of_two_sizes(3), boxes, 2, 2, 40)

    @settings(max_examples=6)
    @ANY_SHAPE
    def test_any_shape(self, **shape):
        with pytest.MonkeyPatch.context() as patch:
            check_any_shape(use_kernels(patch, roi_align_module), **shape)

    def test_deterministic_algorithms_take_the_plain_path(self, on_kernel, monkeypatch):
        """The kernel sums the gradient in any order."""
        table = torch.randn(1, 20, 3, device=on_kernel, requires_grad=True)
        sizes, boxes = torch.tensor([[16, 20]], device=on_kernel), random_boxes(1, 2, 16, 20)
        regions = ([(4, 5)], (4,), sizes, boxes.float().to(on_kernel))
        assert runs_plain_backward(
            monkeypatch, roi_align_module.plain, lambda: pyramid_roi_align(table, *regions)
        )


class TestOperator:
    def test_opcheck(self):
        """Schema, fake tensors and autograd of both operators."""
        table = torch.randn(2, 15, 3, requires_grad=True)
        boxes, sizes = random_boxes(2, 4, 16, 12).float(), torch.tensor([[16, 12], [13, 9]])
        regions = (boxes, sizes, [4, 3, 3, 1], [4, 8], 2, 2, 20.0)
        torch.library.opcheck(torch.ops.dynamic_detr.pyramid_roi_align, (table, *regions))
        torch.library.opcheck(
            torch.ops.dynamic_detr.pyramid_roi_align_backward, (torch.randn(2, 4, 4, 3), *regions)
        )

    def test_compiles_without_a_break(self):
        levels = random_levels((50, 70), 3, dtype=torch.float32)
        pyramid = batch_pyramid([levels], [(50, 70)], (64, 80))
        features = [feature.requires_grad_() for feature in pyramid.features]
        boxes = random_boxes(1, 4, 50, 70).float()

        def pool(boxes: Tensor) -> Tensor:
            return pool_pyramid(pyramid, boxes, 3, canonical_size=40).relu()

        expected = pool(boxes)
        pooled = torch.compile(pool, fullgraph=True, backend="aot_eager")(boxes)
        torch.testing.assert_close(pooled, expected)
        torch.testing.assert_close(gradients(pooled, features), gradients(expected, features))
