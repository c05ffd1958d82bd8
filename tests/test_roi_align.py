"""RoIAlign over a pyramid against a float64 loop and torchvision's operator, forward and backward:
the plain path, and the kernels (interpreted where there is no GPU)."""

import importlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torchvision
from helpers import STRIDES, batch_pyramid, level_size, random_levels
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.sampling import roi_align, roi_level
from torch import Tensor

from dynamic_detr import Pyramid
from dynamic_detr.ops import assign_levels, pyramid_roi_align

roi_align_module = importlib.import_module("dynamic_detr.ops.roi_align")

CANONICAL = 25  # boxes of small images come from every level


def random_boxes(batch: int, queries: int, height: float, width: float) -> Tensor:
    """Corners, some of them beyond the image."""
    corners = torch.rand(batch, queries, 2, 2, dtype=torch.float64) * 1.4 - 0.2
    low, high = corners.amin(dim=2), corners.amax(dim=2)
    return torch.cat([low, high], dim=-1) * torch.tensor([width, height] * 2)


def pool_pyramid(pyramid: Pyramid, boxes: Tensor, *options, **named) -> Tensor:
    """The operator, of a pyramid as a decoder stage calls it."""
    geometry = (pyramid.shapes, pyramid.strides, pyramid.image_sizes)
    return pyramid_roi_align(pyramid.table(), *geometry, boxes, *options, **named)


def gradients(out: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    return list(torch.autograd.grad(out, tensors, upstream))


class TestRoIAlign:
    @pytest.mark.parametrize("image_size", [(128, 128), (100, 136), (65, 200), (64, 3), (1, 1)])
    @pytest.mark.parametrize(("bins", "ratio"), [(7, 2), (3, 1), (1, 3)])
    def test_is_the_loop(self, image_size, bins, ratio):
        levels = random_levels(image_size, 4)
        boxes = random_boxes(1, 6, *image_size)
        canonical_size = 60  # boxes of these small images come from every level
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
        pooled = pool_pyramid(padded, box)
        torch.testing.assert_close(pooled[0], alone, rtol=1e-9, atol=1e-9)
        leaking = torchvision.ops.roi_align(
            padded.features[0], [box[0]], 7, 1 / stride, 2, aligned=True
        )
        assert (leaking.flatten(2).transpose(1, 2) - alone).abs().max() > 1

    def test_boxes_get_no_gradient_and_features_do(self):
        pyramid = batch_pyramid([random_levels((64, 64), 4)], [(64, 64)], (64, 64))
        pyramid.features[0].requires_grad_()
        boxes = random_boxes(1, 4, 30, 30).requires_grad_()
        pool_pyramid(pyramid, boxes).sum().backward()
        assert boxes.grad is None
        assert pyramid.features[0].grad.abs().sum() > 0

    @pytest.mark.parametrize(("batch", "queries"), [(2, 0), (0, 3), (0, 0)])
    def test_nothing_to_pool(self, batch, queries):
        features = [torch.randn(batch, 4, *level_size((64, 64), s)) for s in STRIDES]
        features = [feature.requires_grad_() for feature in features]
        sizes = torch.full((batch, 2), 64)
        boxes = torch.zeros(batch, queries, 4)
        pooled = pool_pyramid(Pyramid(features, STRIDES, sizes), boxes)
        assert pooled.shape == (batch, queries, 49, 4)
        pooled.sum().backward()
        assert not any(feature.grad.any() for feature in features)

    def test_gradients_are_those_of_differences(self):
        """Of two images of different size; padding gets none."""
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

    def test_memory_layout_does_not_matter(self):
        size = (40, 56)
        pyramid = batch_pyramid(
            [random_levels(size, 5), random_levels(size, 5)], [size] * 2, (64, 64)
        )
        features = [feature.requires_grad_() for feature in pyramid.features]
        boxes = random_boxes(2, 4, *size)
        expected = pool_pyramid(pyramid, boxes, canonical_size=40)
        wanted = gradients(expected, features)
        others = (
            [feature.contiguous() for feature in features],
            [torch.stack([feature, feature], dim=-1)[..., 0] for feature in features],
        )
        for same in others:
            turned = boxes.transpose(1, 2).contiguous().transpose(1, 2)
            pooled = pool_pyramid(pyramid.with_features(same), turned, canonical_size=40)
            assert pooled.is_contiguous()
            torch.testing.assert_close(pooled, expected)
            torch.testing.assert_close(gradients(pooled, features), wanted)

    @pytest.mark.parametrize(
        ("dtype", "tolerance"),
        [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)],
    )
    def test_dtypes(self, dtype, tolerance):
        rounded = [level.to(dtype) for level in random_levels((100, 136), 4)]
        exact = [level.double() for level in rounded]
        pyramid, wide = (batch_pyramid([r], [(100, 136)], (128, 192)) for r in (rounded, exact))
        boxes = random_boxes(1, 8, 100, 136).float()
        features = [[f.requires_grad_() for f in p.features] for p in (pyramid, wide)]
        pooled, wanted = pool_pyramid(pyramid, boxes), pool_pyramid(wide, boxes)
        assert pooled.dtype == dtype
        torch.testing.assert_close(pooled.double(), wanted, rtol=tolerance, atol=tolerance)
        upstream = torch.randn_like(pooled)
        found = torch.autograd.grad(pooled, features[0], upstream)
        expected = torch.autograd.grad(wanted, features[1], upstream.double())
        for grad, right in zip(found, expected, strict=True):
            assert grad.dtype == dtype
            torch.testing.assert_close(grad.double(), right, rtol=tolerance, atol=tolerance)

    def test_bfloat16_gradient_adds_up_where_many_boxes_meet(self):
        """bfloat16 sums stop growing at 256: 256 + 1 is 256."""
        feature = torch.randn(1, 2, 1, 1, dtype=torch.bfloat16).requires_grad_()
        pyramid = Pyramid((feature,), (64,), torch.tensor([[64, 64]]))
        boxes = torch.tensor([0.0, 0.0, 64.0, 64.0]).expand(1, 1000, 4)
        pool_pyramid(pyramid, boxes, 1).sum().backward()
        assert feature.grad.flatten().tolist() == [1000, 1000]

    def test_autocast_changes_nothing(self):
        """The features come as they should be; positions stay exact."""
        size = (64, 100)
        pyramid = batch_pyramid([random_levels(size, 4, dtype=torch.float32)], [size], (64, 128))
        boxes = random_boxes(1, 3, *size).float()
        expected = pool_pyramid(pyramid, boxes)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pooled = pool_pyramid(pyramid, boxes)
        assert pooled.dtype == torch.float32
        assert pooled.equal(expected)

    def test_images_larger_than_their_features_are_not_read_beyond_them(self):
        features = [torch.randn(1, 3, 8, 8), torch.randn(1, 3, 4, 4)]
        pyramid = Pyramid(features, (4, 8), torch.tensor([[32, 32]]))
        larger = Pyramid(features, (4, 8), torch.tensor([[400, 32000]]))
        boxes = random_boxes(1, 5, 32, 32).float()
        expected = pool_pyramid(pyramid, boxes, canonical_size=40)
        assert pool_pyramid(larger, boxes, canonical_size=40).equal(expected)

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
        expected = pool_pyramid(pyramid, boxes)
        boxes[0, 1] = torch.tensor(bad)
        pooled = pool_pyramid(pyramid, boxes)
        torch.testing.assert_close(pooled[0, [0, 2]], expected[0, [0, 2]])

    @pytest.mark.parametrize("shape", [(2, 3, 4), (1, 3, 5), (3, 4), (1, 4)])
    def test_wrong_shapes_are_named(self, shape):
        pyramid = batch_pyramid([random_levels((64, 64), 4)], [(64, 64)], (64, 64))
        with pytest.raises(ValueError, match="^pyramid_roi_align: boxes"):
            pool_pyramid(pyramid, torch.zeros(shape))

    def test_wrong_kinds_are_named(self):
        pyramid = batch_pyramid([random_levels((64, 64), 4)], [(64, 64)], (64, 64))
        boxes = random_boxes(1, 3, 64, 64)
        with pytest.raises(ValueError, match=r"^pyramid_roi_align: boxes is torch.int64; wants a"):
            pool_pyramid(pyramid, boxes.long())
        with pytest.raises(ValueError, match=r"^pyramid_roi_align: boxes is on meta; wants cpu"):
            pool_pyramid(pyramid, boxes.to("meta"))
        sizes = Pyramid(pyramid.features, STRIDES, pyramid.image_sizes.to("meta"))
        with pytest.raises(ValueError, match=r"^pyramid_roi_align: image_sizes is on meta"):
            pool_pyramid(sizes, boxes)
        whole = pyramid.with_features([feature.int() for feature in pyramid.features])
        with pytest.raises(ValueError, match=r"^pyramid_roi_align: table is torch.int"):
            pool_pyramid(whole, boxes)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"table": torch.zeros(1, 20, 3)}, r"table has shape .*; wants \(B, 21, C\)"),
            ({"spatial_shapes": [(4, 4), (0, 1)]}, r"spatial_shapes is .*; wants a list"),
            ({"strides": (8,)}, r"strides is \(8,\); wants one for each of the 2 levels"),
            ({"image_sizes": torch.zeros(2, 2).int()}, r"image_sizes has .*; wants \(1, 2\)"),
        ],
    )
    def test_wrong_levels_are_named(self, change, message):
        levels = {"spatial_shapes": [(4, 4), (1, 5)], "strides": (4, 8)}
        tensors = {"table": torch.zeros(1, 21, 3), "image_sizes": torch.ones(1, 2).int()}
        with pytest.raises(ValueError, match="^pyramid_roi_align: " + message):
            pyramid_roi_align(**{**levels, **tensors, "boxes": torch.zeros(1, 2, 4), **change})

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("output_size", 0),
            ("output_size", 7.0),
            ("sampling_ratio", -1),
            ("canonical_size", 0),
            ("canonical_size", torch.nan),
        ],
    )
    def test_wrong_numbers_are_named(self, name, value):
        pyramid = batch_pyramid([random_levels((64, 64), 4)], [(64, 64)], (64, 64))
        with pytest.raises(ValueError, match=f"^pyramid_roi_align: {name} is {value}; wants a"):
            pool_pyramid(pyramid, random_boxes(1, 3, 64, 64), **{name: value})

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
        pooled = pool_pyramid(pyramid, boxes, bins)
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


def use_kernels(patch: pytest.MonkeyPatch) -> str:
    """The device where the operator runs on its kernels: the GPU, or interpreted on the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    patch.setattr(roi_align_module, "kernel_serves", lambda t: t.dtype != torch.float64)
    return "cpu"


@pytest.fixture
def on_kernel(monkeypatch) -> str:
    return use_kernels(monkeypatch)


def images_of_two_sizes(channels: int, strides: Sequence[int] = STRIDES) -> Pyramid:
    """Padded, float32, with NaN in the padding."""
    sizes = [(50, 70), (64, 33)]
    images = [random_levels(size, channels, strides, torch.float32) for size in sizes]
    return batch_pyramid(images, sizes, (64, 80), strides, garbage=float("inf"))


def moved(pyramid: Pyramid, device: str, dtype: torch.dtype) -> Pyramid:
    """A copy whose features want gradients."""
    features = [f.detach().to(device, dtype).requires_grad_() for f in pyramid.features]
    return Pyramid(features, pyramid.strides, pyramid.image_sizes.to(device))


def boxes_of_all_sizes() -> Tensor:
    """Two boxes in each of two images, each from a level of its own if `CANONICAL` is given."""
    corner = torch.rand(2, 2, 2) * 40 - 5
    side = torch.tensor([[6.0, 70.0], [18.0, 35.0]])[..., None]
    boxes = torch.cat([corner, corner + side], dim=-1)
    assert assign_levels(boxes, STRIDES, CANONICAL).tolist() == [[0, 3], [1, 2]]
    return boxes


class TestKernel:
    def check(self, device, pyramid, boxes, *options, tolerance=1e-4) -> None:
        """Against the plain path in float64 on the same numbers: output and gradient."""
        dtype = pyramid.features[0].dtype
        exact, here = moved(pyramid, "cpu", torch.float64), moved(pyramid, device, dtype)
        wanted = pool_pyramid(exact, boxes.float().double(), *options)
        pooled = pool_pyramid(here, boxes.float().to(device), *options)
        assert pooled.dtype == dtype
        assert pooled.stride() == wanted.stride()
        pairs = [(pooled, wanted)]
        pairs += zip(
            gradients(pooled, here.features), gradients(wanted, exact.features), strict=True
        )
        for value, right in pairs:
            assert value.dtype == dtype
            assert value.shape == right.shape
            assert value.isfinite().all()
            if value.numel():
                error = (value.double().cpu() - right).abs().max()
                assert error <= tolerance * right.abs().max().clamp(min=1)

    @pytest.mark.parametrize("channels", [1, 5, 16])
    @pytest.mark.parametrize(("bins", "ratio"), [(7, 2), (3, 1), (1, 3)])
    def test_is_the_plain_path(self, on_kernel, channels, bins, ratio):
        pyramid, boxes = images_of_two_sizes(channels), boxes_of_all_sizes()
        self.check(on_kernel, pyramid, boxes, bins, ratio, CANONICAL)

    def test_more_channels_than_a_program_owns(self, on_kernel):
        self.check(on_kernel, images_of_two_sizes(300), boxes_of_all_sizes(), 2, 1, CANONICAL)

    @pytest.mark.parametrize("levels", [1, 2])
    def test_few_levels(self, on_kernel, levels):
        pyramid = images_of_two_sizes(3, STRIDES[:levels])
        self.check(on_kernel, pyramid, random_boxes(2, 3, 60, 60), 2, 2, 40)

    def test_one_pixel_levels(self, on_kernel):
        pyramid = batch_pyramid([random_levels((1, 1), 3, dtype=torch.float32)], [(1, 1)], (1, 1))
        self.check(on_kernel, pyramid, random_boxes(1, 4, 30, 30), 2)

    @pytest.mark.parametrize("shift", [0.0, 2.0], ids=["between pixels", "on pixels"])
    def test_on_and_between_pixels(self, on_kernel, shift):
        """Samples a whole pixel apart, up to the edge of the image and beyond."""
        pyramid = images_of_two_sizes(3, (4,))
        box = torch.tensor([0.0, 0.0, 16.0, 16.0])
        corners = [-20.0, -4.0, 0.0, 16.0, 36.0, 52.0]
        boxes = torch.stack([box + at + shift for at in corners]).expand(2, -1, 4)
        self.check(on_kernel, pyramid, boxes, 2, 2)

    @pytest.mark.parametrize(("batch", "queries"), [(2, 0), (0, 3)])
    def test_nothing_to_pool(self, on_kernel, batch, queries):
        features = [torch.randn(batch, 4, *level_size((64, 64), s)) for s in STRIDES]
        pyramid = Pyramid(features, STRIDES, torch.full((batch, 2), 64))
        self.check(on_kernel, pyramid, torch.zeros(batch, queries, 4))

    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
    )
    def test_half_precision(self, on_kernel, dtype, tolerance):
        pyramid = moved(images_of_two_sizes(6), "cpu", dtype)
        boxes = boxes_of_all_sizes()
        self.check(on_kernel, pyramid, boxes, 2, 2, CANONICAL, tolerance=tolerance)

    def test_bfloat16_gradient_adds_up_where_many_boxes_meet(self, on_kernel):
        feature = torch.randn(1, 2, 1, 1, dtype=torch.bfloat16, device=on_kernel).requires_grad_()
        sizes = torch.tensor([[64, 64]], device=on_kernel)
        boxes = torch.tensor([0.0, 0.0, 64.0, 64.0], device=on_kernel).expand(1, 300, 4)
        pool_pyramid(Pyramid((feature,), (64,), sizes), boxes, 1).sum().backward()
        assert feature.grad.flatten().tolist() == [300, 300]

    def test_memory_layout_does_not_matter(self, on_kernel):
        pyramid, boxes = images_of_two_sizes(5), boxes_of_all_sizes()
        channels_first = pyramid.with_features([f.contiguous() for f in pyramid.features])
        turned = boxes.transpose(1, 2).contiguous().transpose(1, 2)
        sizes = torch.stack([pyramid.image_sizes] * 2, dim=-1)[..., 0]
        self.check(
            on_kernel, Pyramid(channels_first.features, STRIDES, sizes), turned, 2, 2, CANONICAL
        )

    @pytest.mark.parametrize(
        "bad",
        [
            [torch.nan] * 4,
            [0, 0, torch.inf, torch.inf],
            [-torch.inf, 0, torch.inf, 10],
            [-1e30, -1e30, 1e30, 1e30],
            [50, 50, 10, 10],
        ],
    )
    @pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, interpreting
    def test_boxes_that_are_no_region(self, on_kernel, bad):
        boxes = random_boxes(2, 3, 60, 60)
        boxes[0, 1] = torch.tensor(bad)
        self.check(on_kernel, images_of_two_sizes(3), boxes, 2, 2, 40)

    def test_images_larger_than_their_features_are_not_read_beyond_them(self, on_kernel):
        features = [torch.randn(1, 3, 8, 8), torch.randn(1, 3, 4, 4)]
        pyramid = Pyramid(features, (4, 8), torch.tensor([[400, 32000]]))
        self.check(on_kernel, pyramid, random_boxes(1, 5, 32, 32), 2, 2, 40)

    @settings(max_examples=6)
    @given(
        sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=3),
        queries=st.integers(0, 3),
        levels=st.integers(1, 5),
        bins=st.integers(1, 3),
        channels=st.integers(1, 9),
    )
    def test_any_shape(self, sizes, queries, levels, bins, channels):
        torch.manual_seed(0)
        strides = STRIDES[:levels]
        images = [random_levels(size, channels, strides, torch.float32) for size in sizes]
        padded = tuple(max(side) for side in zip(*sizes, strict=True))
        pyramid = batch_pyramid(images, sizes, padded, strides, garbage=float("inf"))
        with pytest.MonkeyPatch.context() as patch:
            device = use_kernels(patch)
            self.check(device, pyramid, random_boxes(len(sizes), queries, 90, 90), bins)

    def test_deterministic_algorithms_take_the_plain_path(self, on_kernel, monkeypatch):
        """The kernel's gradient is added up in any order."""
        pyramid = moved(images_of_two_sizes(3), on_kernel, torch.float32)
        boxes = random_boxes(2, 2, 60, 60).to(on_kernel)
        called = []
        plain = roi_align_module.plain.backward
        monkeypatch.setattr(
            roi_align_module.plain, "backward", lambda *a: called.append(1) or plain(*a)
        )
        torch.use_deterministic_algorithms(True)
        try:
            pool_pyramid(pyramid, boxes, 2).sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
        assert called


class TestOperator:
    def test_is_one_for_pytorch(self):
        """Schema, fake tensors and autograd fit together, forward and backward."""
        table = torch.randn(2, 15, 3, requires_grad=True)
        boxes, sizes = random_boxes(2, 4, 16, 12).float(), torch.tensor([[16, 12], [13, 9]])
        regions = (boxes, sizes, [4, 3, 3, 1], [4, 8], 2, 2, 20.0)
        torch.library.opcheck(torch.ops.dynamic_detr.pyramid_roi_align, (table, *regions))
        torch.library.opcheck(
            torch.ops.dynamic_detr.pyramid_roi_align_backward, (torch.randn(2, 4, 4, 3), *regions)
        )

    def test_compiles_without_a_break(self):
        pyramid = moved(
            batch_pyramid([random_levels((50, 70), 3)], [(50, 70)], (64, 80)), "cpu", torch.float32
        )
        boxes = random_boxes(1, 4, 50, 70).float()

        def pool(boxes: Tensor) -> Tensor:
            return pool_pyramid(pyramid, boxes, 3, canonical_size=40).relu()

        expected = pool(boxes)
        wanted = gradients(expected, [pyramid.table()])
        compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
        pooled = compiled(boxes)
        torch.testing.assert_close(pooled, expected)
        torch.testing.assert_close(gradients(pooled, [pyramid.table()]), wanted)
