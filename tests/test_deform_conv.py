"""Deformable convolution against torchvision's operator, forward and backward.

The kernels are compared with the plain path in float64; without a GPU they are interpreted.
"""

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import check_float64, gradients, runs_plain_backward, use_kernels
from torch import Tensor

from dynamic_detr.ops import deform_conv as deform_conv_module
from dynamic_detr.ops import deform_conv2d
from dynamic_detr.ops.plain import deform_conv as plain

# (height, width), kernel, stride, padding, dilation, groups
GEOMETRIES = [
    ((7, 5), (3, 3), 1, 1, 1, 1),
    ((7, 5), (3, 3), 2, 1, 1, 1),
    ((8, 8), (3, 3), 2, 1, 1, 2),
    ((9, 6), (3, 3), 1, 2, 2, 4),
    ((9, 11), (3, 3), 3, 0, 1, 1),
    ((5, 5), (1, 1), 1, 0, 1, 2),
    ((6, 4), (2, 3), 1, 1, 1, 1),
    ((1, 1), (3, 3), 1, 1, 1, 1),
    ((1, 1), (3, 3), 2, 1, 1, 4),
    ((1, 6), (3, 3), 2, 1, 1, 1),
]


ANY_GEOMETRY = st.tuples(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    *(st.integers(1, 3), st.integers(0, 2), st.integers(1, 2), st.sampled_from([1, 2, 4])),
).filter(lambda geometry: min(out_size(*geometry[:5])) > 0)


def out_size(size, kernel, stride, padding, dilation) -> tuple[int, int]:
    return tuple(
        (n + 2 * padding - dilation * (k - 1) - 1) // stride + 1
        for n, k in zip(size, kernel, strict=True)
    )


def arguments(
    size=(7, 5),
    kernel=(3, 3),
    stride=1,
    padding=1,
    dilation=1,
    groups=1,
    batch=2,
    spread=2.0,
    channels=8,
    out_channels=12,
) -> tuple[Tensor, ...]:
    """Random input, offset, mask, weight, bias in float64."""
    height, width = out_size(size, kernel, stride, padding, dilation)
    taps = kernel[0] * kernel[1]
    return (
        torch.randn(batch, channels, *size, dtype=torch.float64),
        torch.randn(batch, 2 * taps, height, width, dtype=torch.float64) * spread,
        torch.rand(batch, taps, height, width, dtype=torch.float64),
        torch.randn(out_channels, channels // groups, *kernel, dtype=torch.float64),
        torch.randn(out_channels, dtype=torch.float64),
    )


def torchvision_deform_conv(input, offset, mask, weight, bias, *geometry):
    """torchvision's operator, with its order of arguments and without groups."""
    return torchvision.ops.deform_conv2d(input, offset, weight, bias, *geometry, mask)


def check(device, tensors, geometry=(1, 1), tolerance=1e-5) -> None:
    check_float64(lambda *t: deform_conv2d(*t, *geometry), tensors, device, tolerance)


@pytest.fixture
def on_kernel(monkeypatch) -> str:
    return use_kernels(monkeypatch, deform_conv_module)


class TestBothPaths:
    @pytest.mark.parametrize("needed", range(5))
    def test_gradient_of_one_argument_alone(self, device, needed):
        tensors = tuple(t.float().to(device) for t in arguments())
        everything = tuple(t.clone().requires_grad_() for t in tensors)
        expected = gradients(deform_conv2d(*everything, padding=1), everything)[needed]
        tensors[needed].requires_grad_()
        found = gradients(deform_conv2d(*tensors, padding=1), (tensors[needed],))[0]
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize(
        ("dtype", "sampling", "tolerance"),
        [
            (torch.float32, torch.float32, 1e-5),
            (torch.bfloat16, torch.float32, 3e-2),
            (torch.bfloat16, torch.bfloat16, 3e-2),
            (torch.float16, torch.float32, 4e-3),
            (torch.float16, torch.float16, 4e-3),
        ],
    )
    def test_dtypes(self, device, dtype, sampling, tolerance):
        """Features of one dtype, offsets and modulations of another."""
        input, offset, mask, weight, bias = arguments((9, 7), groups=2)
        input, weight, bias = (t.to(dtype) for t in (input, weight, bias))
        tensors = (input, offset.to(sampling), mask.to(sampling), weight, bias)
        check(device, tensors, (1, 1, 1, 2), tolerance)

    @pytest.mark.parametrize("with_mask", [True, False])
    def test_no_images(self, device, with_mask):
        tensors = [t.float().to(device).requires_grad_() for t in arguments(batch=0)]
        input, offset, mask, weight, bias = tensors
        out = deform_conv2d(input, offset, mask if with_mask else None, weight, bias, padding=1)
        assert out.shape == (0, 12, 7, 5)
        out.sum().backward()
        assert not weight.grad.any() and not bias.grad.any()
        assert input.grad.shape == input.shape

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30, -1e30])
    def test_offsets_that_are_no_position(self, device, bad):
        """The tap reads zero; all other outputs are unchanged."""
        tensors = [t.float().to(device) for t in arguments()]
        expected = deform_conv2d(*tensors, padding=1)
        tensors[1][0, 0, 2, 3] = bad
        out = deform_conv2d(*(t.requires_grad_() for t in tensors), padding=1)
        out.sum().backward()
        same = torch.ones(7, 5, dtype=torch.bool)
        same[2, 3] = False
        torch.testing.assert_close(out[0][:, same], expected[0][:, same])
        torch.testing.assert_close(out[1], expected[1])
        assert out.isfinite().all()
        assert all(t.grad.isfinite().all() for t in tensors)


class TestDeformConv:
    @pytest.mark.parametrize("geometry", GEOMETRIES)
    @pytest.mark.parametrize("with_mask", [True, False], ids=["mask", "no mask"])
    @pytest.mark.parametrize("spread", [1.5, 40.0], ids=["near", "far outside"])
    def test_is_torchvisions(self, geometry, with_mask, spread):
        tensors = [t.requires_grad_() for t in arguments(*geometry, spread=spread)]
        if not with_mask:
            tensors[2] = None
        out = deform_conv2d(*tensors, *geometry[2:])
        expected = torchvision_deform_conv(*tensors, *geometry[2:5])
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            gradients(out, tensors), gradients(expected, tensors), rtol=1e-9, atol=1e-9
        )

    @pytest.mark.parametrize("fraction", [0.0, 0.5])
    def test_on_and_between_pixels(self, fraction):
        """At integer positions, where the derivative jumps, it is the one of torchvision."""
        input, offset, mask, weight, bias = arguments(spread=2.0)
        offset = offset.round() + fraction
        tensors = tuple(t.requires_grad_() for t in (input, offset, mask, weight, bias))
        out = deform_conv2d(*tensors, 1, 1)
        expected = torchvision_deform_conv(*tensors, 1, 1, 1)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradients(out, tensors), gradients(expected, tensors))

    def test_gradients_are_finite_differences(self):
        input, offset, mask, weight, bias = arguments((4, 3), stride=2, batch=2, groups=2)
        offset = offset.floor() + 0.2 + 0.6 * torch.rand_like(offset)  # between pixels
        tensors = tuple(t.requires_grad_() for t in (input, offset, mask, weight, bias))
        assert torch.autograd.gradcheck(
            lambda *t: deform_conv2d(*t, stride=2, padding=1, groups=2), tensors, fast_mode=True
        )

    @pytest.mark.parametrize("pack", [0, 2, 5, 6, 12, 24])
    def test_packs_of_groups_change_nothing(self, pack, monkeypatch):
        """Six groups of two channels in packs of one, two, three and six."""
        monkeypatch.setattr(plain, "PACK", 0)
        tensors = tuple(t.requires_grad_() for t in arguments((4, 5), channels=12, groups=6))
        alone = deform_conv2d(*tensors, padding=1, groups=6)
        expected = gradients(alone, tensors)
        monkeypatch.setattr(plain, "PACK", pack)
        packed = deform_conv2d(*tensors, padding=1, groups=6)
        torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients(packed, tensors), expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("columns", [1, 4, 1000])
    @pytest.mark.parametrize("block", [1, 7, 15, 36, 100])
    def test_blocks_and_chunks_leave_no_seam(self, block, columns, monkeypatch):
        """Blocks of one row, several rows, one image and several images, with chunks of one
        position, several, and all."""
        tensors = tuple(t.requires_grad_() for t in arguments((7, 5), batch=3))
        whole = deform_conv2d(*tensors, padding=1)
        expected = gradients(whole, tensors)
        column = 9 * tensors[0].shape[1] * tensors[0].itemsize
        monkeypatch.setattr(plain, "_columns_bytes", lambda: columns * column)
        monkeypatch.setattr(plain, "BLOCK", block)
        parts = deform_conv2d(*tensors, padding=1)
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients(parts, tensors), expected, rtol=1e-12, atol=1e-12)

    def test_memory_layout_does_not_matter(self):
        tensors = arguments((6, 8))
        plain = tuple(t.clone().requires_grad_() for t in tensors)
        expected = deform_conv2d(*plain, padding=1)
        assert expected.is_contiguous(memory_format=torch.channels_last)
        expected_gradients = gradients(expected, plain)
        layouts = [
            lambda t: t.contiguous(memory_format=torch.channels_last),
            lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
            lambda t: torch.stack([t, t], dim=-1)[..., 0],
            lambda t: t.repeat(1, 2, 1, 1)[:, : t.shape[1]],
        ]
        for layout in layouts:
            strange = tuple(layout(t).detach().requires_grad_() for t in tensors[:4])
            strange = (*strange, tensors[4].clone().requires_grad_())
            out = deform_conv2d(*strange, padding=1)
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(gradients(out, strange), expected_gradients)

    def test_bfloat16_gradient_adds_up_where_many_samples_meet(self):
        """A sum of thousands of ones in bfloat16 would stop at 256."""
        input = torch.ones(1, 4, 64, 64, dtype=torch.bfloat16, requires_grad=True)
        offset = torch.zeros(1, 2, 64, 64)  # every position reads the first pixel
        offset[:, 0], offset[:, 1] = -torch.arange(64)[:, None], -torch.arange(64)
        weight = torch.eye(4, dtype=torch.bfloat16)[:, :, None, None]
        deform_conv2d(input, offset, None, weight).sum().backward()
        assert input.grad[0, 0, 0, 0].item() == 64 * 64

    def test_autocast(self):
        """Autocast converts features and weights to bfloat16, but not positions."""
        tensors = [t.float().requires_grad_() for t in arguments()]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = deform_conv2d(*tensors, padding=1)
        assert out.dtype == torch.bfloat16
        expected = deform_conv2d(*tensors, padding=1)
        torch.testing.assert_close(out.float(), expected, rtol=5e-2, atol=0.3)
        for value, wanted in zip(
            gradients(out, tensors), gradients(expected, tensors), strict=True
        ):
            assert value.dtype == torch.float32
            assert (value - wanted).abs().max() < 3e-2 * wanted.abs().max()

    def test_positions_are_exact_under_autocast(self):
        """bfloat16 cannot tell column 300 from 301."""
        input = torch.arange(400.0).remainder(2).expand(1, 1, 1, 400)
        offset = torch.zeros(1, 2, 1, 400)
        weight = torch.ones(1, 1, 1, 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = deform_conv2d(input, offset, None, weight)
        torch.testing.assert_close(out.float(), input)

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("input", {"input": (2, 8, 7)}),
            ("input", {"input": (2, 8, 0, 5)}),
            ("input", {"input": (2, 0, 7, 5), "weight": (12, 0, 3, 3)}),
            ("weight", {"weight": (0, 8, 3, 3)}),
            ("weight", {"weight": (12, 8, 3)}),
            ("weight", {"weight": (12, 5, 3, 3)}),
            ("offset", {"offset": (2, 9, 7, 5)}),
            ("offset", {"offset": (2, 18, 6, 5)}),
            ("offset", {"offset": (1, 18, 7, 5)}),
            ("mask", {"mask": (2, 18, 7, 5)}),
            ("mask", {"mask": (2, 9, 7, 4)}),
            ("bias", {"bias": (8,)}),
        ],
    )
    def test_wrong_shapes_are_named(self, name, change):
        names = ("input", "offset", "mask", "weight", "bias")
        tensors = dict(zip(names, arguments(), strict=True))
        for key, shape in change.items():
            tensors[key] = torch.zeros(shape, dtype=torch.float64)
        with pytest.raises(ValueError, match=rf"^deform_conv2d: {name}: ") as caught:
            deform_conv2d(**tensors, padding=1)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "value"),
        [("stride", 0), ("stride", (1, 1)), ("padding", -1), ("dilation", 0), ("groups", 0)]
        + [
            ("groups", 3),
            ("groups", 8),
        ],  # no divisor of the input channels, of the output channels
    )
    def test_wrong_numbers_are_named(self, name, value):
        with pytest.raises(ValueError, match=f"^deform_conv2d: {name}: expected an? .*, got "):
            deform_conv2d(*arguments(), **{"padding": 1, name: value})

    @given(ANY_GEOMETRY, st.integers(0, 3))
    def test_any_geometry(self, geometry, batch):
        torch.manual_seed(0)
        tensors = arguments(*geometry, batch)
        out = deform_conv2d(*tensors, *geometry[2:])
        assert out.shape == (batch, 12, *out_size(*geometry[:5]))
        if batch:
            expected = torchvision_deform_conv(*tensors, *geometry[2:5])
            torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


# (height, width), kernel, stride, padding, dilation, groups, channels, output channels
KERNEL_GEOMETRIES = [
    ((7, 5), (3, 3), 1, 1, 1, 1, 8, 12),
    ((9, 11), (3, 3), 2, 1, 1, 1, 20, 33),
    ((1, 1), (3, 3), 1, 1, 1, 1, 16, 16),
    ((1, 6), (3, 3), 2, 1, 1, 1, 70, 300),
    ((9, 6), (3, 3), 1, 2, 2, 4, 8, 12),
    ((4, 4), (3, 3), 1, 1, 1, 32, 128, 128),
    ((6, 4), (2, 3), 3, 0, 1, 2, 6, 4),
    ((5, 5), (1, 1), 1, 0, 1, 2, 80, 160),
]


class TestKernel:
    @pytest.mark.parametrize("geometry", KERNEL_GEOMETRIES)
    @pytest.mark.parametrize("spread", [1.5, 40.0], ids=["near", "far outside"])
    def test_is_the_plain_path(self, on_kernel, geometry, spread):
        *geometry, channels, out_channels = geometry
        channels = {"channels": channels, "out_channels": out_channels}
        tensors = [t.float() for t in arguments(*geometry, spread=spread, **channels)]
        check(on_kernel, tensors, geometry[2:])

    @pytest.mark.parametrize("fraction", [0.0, 0.5])
    def test_on_and_between_pixels(self, on_kernel, fraction):
        input, offset, mask, weight, bias = (t.float() for t in arguments())
        check(on_kernel, (input, offset.round() + fraction, mask, weight, bias))

    def test_neither_mask_nor_bias(self, on_kernel):
        input, offset, _, weight, _ = (t.float() for t in arguments())
        check(on_kernel, (input, offset, None, weight, None))

    @settings(max_examples=8)
    @given(ANY_GEOMETRY, st.integers(0, 3))
    def test_any_geometry(self, geometry, batch):
        tensors = [t.float() for t in arguments(*geometry, batch)]
        with pytest.MonkeyPatch.context() as patch:
            check(use_kernels(patch, deform_conv_module), tensors, geometry[2:])

    def test_deterministic_algorithms_take_the_plain_path(self, on_kernel, monkeypatch):
        """The kernel sums the gradient of the input in any order."""
        tensors = [t.float().to(on_kernel).requires_grad_() for t in arguments()]
        assert runs_plain_backward(monkeypatch, plain, lambda: deform_conv2d(*tensors, padding=1))


class TestOperator:
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("with_mask", [True, False], ids=["mask", "no mask"])
    def test_opcheck(self, with_mask, memory_format):
        """Schema, fake tensors and autograd of both operators."""
        input, offset, mask, weight, bias = (t.float() for t in arguments())
        weight = weight.contiguous(memory_format=memory_format)
        input, offset, mask, weight, bias = (
            t.requires_grad_() for t in (input, offset, mask, weight, bias)
        )
        tensors = (input, offset, mask if with_mask else None, weight, bias)
        torch.library.opcheck(torch.ops.dynamic_detr.deform_conv2d, (*tensors, 1, 1, 1, 1))
        detached = [None if t is None else t.detach() for t in tensors[:4]]
        upstream = torch.randn(2, 12, 7, 5)
        torch.library.opcheck(
            torch.ops.dynamic_detr.deform_conv2d_backward,
            (upstream, *detached, 1, 1, 1, 1, True, True, True),
        )

    def test_compiles_without_a_break(self):
        tensors = tuple(t.float().requires_grad_() for t in arguments())
        compiled = torch.compile(
            lambda *t: deform_conv2d(*t, padding=1).relu(), fullgraph=True, backend="aot_eager"
        )
        out, expected = compiled(*tensors), deform_conv2d(*tensors, padding=1).relu()
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(gradients(out, tensors), gradients(expected, tensors))

    def test_wrong_kinds_are_named(self):
        input, offset, mask, weight, bias = arguments()
        with pytest.raises(ValueError, match=r"^deform_conv2d: offset: expected a floating"):
            deform_conv2d(input, offset.long(), mask, weight, bias, padding=1)
        with pytest.raises(ValueError, match=r"^deform_conv2d: mask: .* on cpu, got .* meta$"):
            deform_conv2d(input, offset, mask.to("meta"), weight, bias, padding=1)
