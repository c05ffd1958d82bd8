"""Deformable convolution against a float64 loop and torchvision's operator, forward and backward:
the plain path, and the kernels (interpreted where there is no GPU)."""

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.sampling import deform_conv
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


def torchvision_deform_conv(input, offset, mask, weight, bias, stride, padding, dilation):
    """torchvision's operator; the groups follow from the weight's shape."""
    return torchvision.ops.deform_conv2d(
        input, offset, weight, bias, stride, padding, dilation, mask
    )


def gradients(out: Tensor, tensors: tuple[Tensor | None, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return list(torch.autograd.grad(out, [t for t in tensors if t is not None], upstream))


class TestDeformConv:
    @pytest.mark.parametrize("geometry", GEOMETRIES)
    @pytest.mark.parametrize("spread", [1.5, 40.0], ids=["near", "far outside"])
    def test_is_the_loop(self, geometry, spread):
        size, kernel, stride, padding, dilation, groups = geometry
        tensors = arguments(*geometry, spread=spread)
        input, offset, mask, weight, bias = tensors
        out = deform_conv2d(*tensors, stride, padding, dilation, groups)
        for image in range(2):
            expected = deform_conv(
                input[image].numpy(),
                offset[image].numpy(),
                mask[image].numpy(),
                weight.numpy(),
                bias.numpy(),
                stride,
                padding,
                dilation,
                groups,
            )
            np.testing.assert_allclose(out[image].numpy(), expected, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("geometry", GEOMETRIES)
    @pytest.mark.parametrize("with_mask", [True, False], ids=["mask", "no mask"])
    @pytest.mark.parametrize("spread", [1.5, 40.0], ids=["near", "far outside"])
    def test_is_torchvisions(self, geometry, with_mask, spread):
        _, _, stride, padding, dilation, groups = geometry
        input, offset, mask, weight, bias = (
            tensor.requires_grad_() for tensor in arguments(*geometry, spread=spread)
        )
        tensors = (input, offset, mask if with_mask else None, weight, bias)
        out = deform_conv2d(*tensors, stride, padding, dilation, groups)
        expected = torchvision_deform_conv(*tensors, stride, padding, dilation)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            gradients(out, tensors), gradients(expected, tensors), rtol=1e-9, atol=1e-9
        )

    @pytest.mark.parametrize("fraction", [0.0, 0.5])
    def test_on_and_between_pixels(self, fraction):
        """Where the gradient of the position jumps, it is that of the cell above and right of it,
        as in torchvision's operator."""
        input, offset, mask, weight, bias = arguments(spread=2.0)
        offset = offset.round() + fraction
        tensors = tuple(t.requires_grad_() for t in (input, offset, mask, weight, bias))
        out = deform_conv2d(*tensors, 1, 1)
        expected = torchvision_deform_conv(*tensors, 1, 1, 1)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradients(out, tensors), gradients(expected, tensors))

    def test_gradients_are_those_of_differences(self):
        input, offset, mask, weight, bias = arguments((4, 3), stride=2, batch=2, groups=2)
        offset = offset.floor() + 0.2 + 0.6 * torch.rand_like(offset)  # no jump within reach
        tensors = tuple(t.requires_grad_() for t in (input, offset, mask, weight, bias))
        assert torch.autograd.gradcheck(
            lambda *t: deform_conv2d(*t, stride=2, padding=1, groups=2), tensors, fast_mode=True
        )

    def test_zero_offset_is_a_convolution(self):
        input, offset, mask, weight, bias = arguments()
        out = deform_conv2d(input, offset * 0, None, weight, bias, padding=1)
        torch.testing.assert_close(out, torch.nn.functional.conv2d(input, weight, bias, padding=1))

    @pytest.mark.parametrize("needed", range(5))
    def test_gradient_of_one_argument_alone(self, needed):
        tensors = arguments()
        everything = tuple(t.clone().requires_grad_() for t in tensors)
        expected = gradients(deform_conv2d(*everything, padding=1), everything)[needed]
        tensors[needed].requires_grad_()
        found = gradients(deform_conv2d(*tensors, padding=1), (tensors[needed],))[0]
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("pack", [0, 2, 5, 6, 12, 24])
    def test_packs_of_groups_change_nothing(self, pack, monkeypatch):
        """Six groups of two channels: none in one, two, three, all of them."""
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
        """Blocks of one row, of some rows, of one image and of several images; in each, chunks of
        one position, of some, and of all."""
        tensors = tuple(t.requires_grad_() for t in arguments((7, 5), batch=3))
        whole = deform_conv2d(*tensors, padding=1)
        expected = gradients(whole, tensors)
        column = 9 * tensors[0].shape[1] * tensors[0].itemsize
        monkeypatch.setattr(plain, "_columns_bytes", lambda: columns * column)
        monkeypatch.setattr(plain, "BLOCK", block)
        parts = deform_conv2d(*tensors, padding=1)
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients(parts, tensors), expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("with_mask", [True, False])
    def test_no_images(self, with_mask):
        input, offset, mask, weight, bias = (t.requires_grad_() for t in arguments(batch=0))
        out = deform_conv2d(input, offset, mask if with_mask else None, weight, bias, padding=1)
        assert out.shape == (0, 12, 7, 5)
        out.sum().backward()
        assert not weight.grad.any()
        assert input.grad.shape == input.shape

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

    @pytest.mark.parametrize(
        ("dtype", "tolerance"),
        [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)],
    )
    def test_dtypes(self, dtype, tolerance):
        """Features of any width: positions are float32 in all of them."""
        exact = [t.to(dtype).double().requires_grad_() for t in arguments((9, 7), groups=2)]
        rounded = [t.detach().to(dtype).requires_grad_() for t in exact]
        out = deform_conv2d(*rounded, padding=1, groups=2)
        expected = deform_conv2d(*exact, padding=1, groups=2)
        assert out.dtype == dtype
        for value, wanted in [
            (out, expected),
            *zip(gradients(out, rounded), gradients(expected, exact), strict=True),
        ]:
            assert value.dtype == dtype
            error = (value.double() - wanted).abs().max() / wanted.abs().max()
            assert error < tolerance

    def test_bfloat16_gradient_adds_up_where_many_samples_meet(self):
        """Thousands of gradients in one row: summed in bfloat16, they would stop growing."""
        input = torch.ones(1, 4, 64, 64, dtype=torch.bfloat16, requires_grad=True)
        offset = torch.zeros(1, 2, 64, 64)  # every position reads the first pixel
        offset[:, 0], offset[:, 1] = -torch.arange(64)[:, None], -torch.arange(64)
        weight = torch.eye(4, dtype=torch.bfloat16)[:, :, None, None]
        deform_conv2d(input, offset, None, weight).sum().backward()
        assert input.grad[0, 0, 0, 0].item() == 64 * 64

    def test_autocast(self):
        """Under autocast features and weights become bfloat16, positions do not."""
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

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30, -1e30])
    def test_offsets_that_are_no_place(self, bad):
        """They reach no other output than their own, and no row outside the table."""
        input, offset, mask, weight, bias = (t.float() for t in arguments())
        expected = deform_conv2d(input, offset, mask, weight, bias, padding=1)
        offset[0, 0, 2, 3] = bad
        tensors = tuple(t.requires_grad_() for t in (input, offset, mask, weight, bias))
        out = deform_conv2d(*tensors, padding=1)
        out.sum().backward()
        same = torch.ones(7, 5, dtype=torch.bool)
        same[2, 3] = False
        torch.testing.assert_close(out[0][:, same], expected[0][:, same])
        torch.testing.assert_close(out[1], expected[1])
        if abs(bad) == 1e30:  # a place, but far outside: the tap reads zero
            assert out.isfinite().all()

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
        with pytest.raises(ValueError, match=rf"^deform_conv2d: .*{name}") as caught:
            deform_conv2d(**tensors, padding=1)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "value"),
        [("stride", 0), ("stride", (1, 1)), ("padding", -1), ("dilation", 0), ("groups", 0)],
    )
    def test_wrong_numbers_are_named(self, name, value):
        with pytest.raises(ValueError, match=f"^deform_conv2d: {name} is"):
            deform_conv2d(*arguments(), **{"padding": 1, name: value})

    def test_outputs_must_divide_into_the_groups(self):
        input, offset, mask, weight, _ = arguments(groups=4)
        with pytest.raises(ValueError, match="groups is 4; wants a divisor of"):
            deform_conv2d(input, offset, mask, weight[:10], padding=1, groups=4)

    @given(
        size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
        kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        stride=st.integers(1, 3),
        padding=st.integers(0, 2),
        dilation=st.integers(1, 2),
        groups=st.sampled_from([1, 2, 4]),
        batch=st.integers(0, 3),
    )
    def test_any_geometry(self, size, kernel, stride, padding, dilation, groups, batch):
        if min(out_size(size, kernel, stride, padding, dilation)) < 1:
            return
        torch.manual_seed(0)
        tensors = arguments(size, kernel, stride, padding, dilation, groups, batch)
        out = deform_conv2d(*tensors, stride, padding, dilation, groups)
        assert out.shape == (batch, 12, *out_size(size, kernel, stride, padding, dilation))
        if batch:
            expected = torchvision_deform_conv(*tensors, stride, padding, dilation)
            torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def use_kernels(patch: pytest.MonkeyPatch) -> str:
    """The device where the operator runs on its kernels: the GPU, or interpreted on the CPU."""
    if torch.cuda.is_available():
        patch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
        return "cuda"
    patch.setattr(deform_conv_module, "kernel_serves", lambda t: t.dtype != torch.float64)
    return "cpu"


@pytest.fixture
def on_kernel(monkeypatch) -> str:
    return use_kernels(monkeypatch)


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
    def check(self, device, tensors, geometry, tolerance=1e-5) -> None:
        """Against the plain path in float64 on the same numbers: output and all gradients."""
        exact = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
        here = [None if t is None else t.detach().to(device).requires_grad_() for t in tensors]
        expected = deform_conv2d(*exact, *geometry)
        out = deform_conv2d(*here, *geometry)
        assert out.dtype == tensors[0].dtype
        assert out.stride() == expected.stride()
        pairs = [(out, expected)]
        pairs += zip(gradients(out, here), gradients(expected, exact), strict=True)
        for value, wanted in pairs:
            assert value.shape == wanted.shape
            assert value.isfinite().all()
            error = (value.double().cpu() - wanted).abs().max() if value.numel() else 0
            scale = wanted.abs().max().clamp(min=1) if value.numel() else 1
            assert error <= tolerance * scale

    @pytest.mark.parametrize("geometry", KERNEL_GEOMETRIES)
    @pytest.mark.parametrize("spread", [1.5, 40.0], ids=["near", "far outside"])
    def test_is_the_plain_path(self, on_kernel, geometry, spread):
        size, kernel, stride, padding, dilation, groups, channels, out_channels = geometry
        tensors = arguments(
            *(size, kernel, stride, padding, dilation, groups),
            spread=spread,
            channels=channels,
            out_channels=out_channels,
        )
        tensors = [t.float() for t in tensors]
        self.check(on_kernel, tensors, (stride, padding, dilation, groups))

    @pytest.mark.parametrize("fraction", [0.0, 0.5])
    def test_on_and_between_pixels(self, on_kernel, fraction):
        input, offset, mask, weight, bias = (t.float() for t in arguments())
        self.check(on_kernel, (input, offset.round() + fraction, mask, weight, bias), (1, 1))

    def test_neither_mask_nor_bias(self, on_kernel):
        input, offset, _, weight, _ = (t.float() for t in arguments())
        self.check(on_kernel, (input, offset, None, weight, None), (1, 1))

    def test_no_images(self, on_kernel):
        self.check(on_kernel, [t.float() for t in arguments(batch=0)], (1, 1))

    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
    )
    def test_half_precision(self, on_kernel, dtype, tolerance):
        input, offset, mask, weight, bias = (t.float() for t in arguments())
        features = (t.to(dtype) for t in (input, weight, bias))
        input, weight, bias = features
        self.check(on_kernel, (input, offset, mask, weight, bias), (1, 1), tolerance)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1e30])
    def test_offsets_that_are_no_place(self, on_kernel, bad):
        """The tap reads zero; everything else is as it was."""
        tensors = [t.float().to(on_kernel) for t in arguments()]
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

    @pytest.mark.parametrize("needed", range(5))
    def test_gradient_of_one_argument_alone(self, on_kernel, needed):
        tensors = tuple(t.float().to(on_kernel) for t in arguments())
        everything = tuple(t.clone().requires_grad_() for t in tensors)
        expected = gradients(deform_conv2d(*everything, padding=1), everything)[needed]
        tensors[needed].requires_grad_()
        found = gradients(deform_conv2d(*tensors, padding=1), (tensors[needed],))[0]
        torch.testing.assert_close(found, expected)

    @settings(max_examples=8)
    @given(
        st.tuples(*[st.integers(1, 6)] * 2),
        st.tuples(*[st.integers(1, 3)] * 2),
        st.integers(1, 2),
        st.integers(0, 2),
        st.integers(1, 2),
        st.sampled_from([1, 2, 4]),
    )
    def test_any_geometry(self, size, kernel, stride, padding, dilation, groups):
        if min(out_size(size, kernel, stride, padding, dilation)) < 1:
            return
        with pytest.MonkeyPatch.context() as patch:
            tensors = arguments(size, kernel, stride, padding, dilation, groups)
            device = use_kernels(patch)
            geometry = (stride, padding, dilation, groups)
            self.check(device, [t.float() for t in tensors], geometry)

    def test_deterministic_algorithms_take_the_plain_path(self, on_kernel, monkeypatch):
        """The kernel's gradient of the input is added up in any order."""
        tensors = [t.float().to(on_kernel).requires_grad_() for t in arguments()]
        called = []
        backward = plain.backward
        monkeypatch.setattr(plain, "backward", lambda *a: called.append(1) or backward(*a))
        torch.use_deterministic_algorithms(True)
        try:
            deform_conv2d(*tensors, padding=1).sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
        assert called


class TestOperator:
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("with_mask", [True, False], ids=["mask", "no mask"])
    def test_is_one_for_pytorch(self, with_mask, memory_format):
        """Schema, fake tensors and autograd fit together, forward and backward."""
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
        with pytest.raises(ValueError, match=r"^deform_conv2d: offset is torch.int64; wants a"):
            deform_conv2d(input, offset.long(), mask, weight, bias, padding=1)
        with pytest.raises(ValueError, match=r"^deform_conv2d: mask is on meta; wants cpu"):
            deform_conv2d(input, offset, mask.to("meta"), weight, bias, padding=1)
