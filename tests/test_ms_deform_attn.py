"""Multi-scale deformable attention against a float64 loop and Hugging Face's function, forward and
backward.

The kernels are compared with the plain path in float64; without a GPU they are interpreted.
"""

import functools
import importlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import check_float64, gradients, runs_plain_backward, use_kernels
from reference import sampling as reference
from torch import Tensor

from dynamic_detr.ops import ms_deform_attn

module = importlib.import_module("dynamic_detr.ops.ms_deform_attn")

Shapes = Sequence[tuple[int, int]]

PYRAMID = [(5, 8), (3, 4), (1, 2), (1, 1)]
SMALL = [(4, 3), (1, 2)]  # for the interpreter, which is slow
PYRAMIDS = [PYRAMID, [(6, 7)], [(1, 1)], [(1, 9), (4, 1)]]


def arguments(
    shapes: Shapes = PYRAMID, batch=2, queries=5, heads=3, channels=4, points=2, spread=0.3
) -> tuple[Tensor, Tensor, Tensor]:
    """Random value, locations in [-spread, 1 + spread] and weights in float64."""
    positions = sum(height * width for height, width in shapes)
    sampling = (batch, queries, heads, len(shapes), points)
    return (
        torch.randn(batch, positions, heads, channels, dtype=torch.float64),
        torch.rand(*sampling, 2, dtype=torch.float64) * (1 + 2 * spread) - spread,
        torch.rand(sampling, dtype=torch.float64),
    )


def few() -> list[Tensor]:
    """Float32 arguments on `SMALL` for one program."""
    return [t.float() for t in arguments(SMALL, queries=3, heads=2)]


def attend(tensors: Sequence[Tensor], shapes: Shapes = PYRAMID) -> Tensor:
    value, locations, weights = tensors
    return ms_deform_attn(value, shapes, locations, weights)


def loop(tensors: Sequence[Tensor], shapes: Shapes = PYRAMID) -> np.ndarray:
    value, locations, weights = (tensor.double().numpy() for tensor in tensors)
    out = np.zeros((*locations.shape[:2], value.shape[2] * value.shape[3]))
    for image, query in np.ndindex(*out.shape[:2]):
        out[image, query] = reference.ms_deform_attn(
            value[image], shapes, locations[image, query], weights[image, query]
        )
    return out


def on_grid(fraction: float) -> tuple[Shapes, tuple[Tensor, Tensor, Tensor]]:
    """Samples exactly on pixels (0) or halfway between (0.5): inside, at an edge and outside.

    Sides are powers of two, so normalised locations represent the positions exactly.
    """
    shapes = [(4, 8), (2, 2), (1, 1)]
    value, locations, weights = arguments(shapes)
    size = torch.tensor([(width, height) for height, width in shapes])[:, None]
    pixels = (torch.rand_like(locations) * (size + 3) - 2).round() + fraction
    return shapes, (value, (pixels + 0.5) / size, weights)


def check(device, tensors, shapes=SMALL, tolerance=1e-4) -> None:
    check_float64(lambda *t: attend(t, shapes), tensors, device, tolerance)


@pytest.fixture
def on_kernel(monkeypatch) -> str:
    return use_kernels(monkeypatch, module)


class TestBothPaths:
    @pytest.mark.parametrize("needed", range(3))
    def test_gradient_of_one_argument_alone(self, device, needed):
        tensors = [t.to(device) for t in few()]
        everything = [t.clone().requires_grad_() for t in tensors]
        expected = gradients(attend(everything, SMALL), everything)[needed]
        tensors[needed].requires_grad_()
        found = gradients(attend(tensors, SMALL), [tensors[needed]])[0]
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize(("batch", "queries"), [(2, 0), (0, 3), (0, 0)])
    def test_nothing_to_attend(self, device, batch, queries):
        tensors = [t.float().to(device) for t in arguments(batch=batch, queries=queries)]
        out = attend([t.requires_grad_() for t in tensors])
        assert out.shape == (batch, queries, 12)
        out.sum().backward()
        assert all(t.grad.shape == t.shape and not t.grad.any() for t in tensors)

    @pytest.mark.parametrize("sampling", [torch.float64, torch.float32, torch.bfloat16, None])
    @pytest.mark.parametrize(
        ("dtype", "tolerance"),
        [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)],
    )
    def test_dtypes(self, device, dtype, tolerance, sampling):
        """Values of one dtype, locations and weights of the same (None) or of another."""
        value, locations, weights = few()
        sampling = sampling or dtype
        if sampling == torch.bfloat16:
            tolerance = max(tolerance, torch.finfo(sampling).eps)
        tensors = (value.to(dtype), locations.to(sampling), weights.to(sampling))
        check(device, tensors, tolerance=tolerance)

    def test_bfloat16_gradient_of_many_samples_at_one_pixel(self, device):
        """A sum of ones in bfloat16 would stop at 256."""
        value = torch.randn(1, 1, 1, 2, dtype=torch.bfloat16, device=device).requires_grad_()
        center = torch.full((1, 300, 1, 1, 1, 2), 0.5, device=device)
        weights = torch.ones(1, 300, 1, 1, 1, device=device)
        ms_deform_attn(value, [(1, 1)], center, weights).sum().backward()
        assert value.grad.flatten().tolist() == [300, 300]


class TestMsDeformAttn:
    @pytest.mark.parametrize("fraction", [0.0, 0.5], ids=["on pixels", "between pixels"])
    def test_on_and_between_pixels(self, fraction):
        shapes, tensors = on_grid(fraction)
        out = attend(tensors, shapes)
        np.testing.assert_allclose(out.numpy(), loop(tensors, shapes), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("shapes", PYRAMIDS, ids=str)
    @pytest.mark.parametrize("spread", [0.3, 20.0], ids=["near", "far outside"])
    def test_is_hugging_faces(self, shapes, spread):
        theirs = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
        tensors = [t.requires_grad_() for t in arguments(shapes, spread=spread)]
        value, locations, weights = tensors
        out = attend(tensors, shapes)
        expected = theirs.multi_scale_deformable_attention(value, shapes, locations, weights)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            gradients(out, tensors), gradients(expected, tensors), rtol=1e-9, atol=1e-9
        )

    def test_gradients_are_finite_differences(self):
        shapes = [(3, 4), (1, 2)]
        tensors = [t.requires_grad_() for t in arguments(shapes, queries=2, heads=2, channels=2)]
        assert torch.autograd.gradcheck(lambda *t: attend(t, shapes), tensors)

    @pytest.mark.parametrize("chunk", [1, 3 * 4 * 2 * 4 * 2])
    def test_chunks_leave_no_seam(self, chunk, monkeypatch):
        """One query at a time, and two of five."""
        tensors = [t.requires_grad_() for t in arguments()]
        expected = attend(tensors)
        wanted = gradients(expected, tensors)
        monkeypatch.setattr(module.plain, "CHUNK", chunk)
        out = attend(tensors)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(gradients(out, tensors), wanted)

    def test_memory_layout_does_not_matter(self):
        tensors = [t.requires_grad_() for t in arguments()]
        expected = attend(tensors)
        turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
        assert not any(t.is_contiguous() for t in turned)
        out = attend(turned)
        assert out.is_contiguous()
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(gradients(out, tensors), gradients(expected, tensors))

    def test_autocast(self):
        """Autocast converts the values to bfloat16, but not positions and weights."""
        tensors = [t.float().requires_grad_() for t in arguments()]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = attend(tensors)
        assert out.dtype == torch.bfloat16
        expected = attend(tensors)
        torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=5e-2)
        for grad, wanted in zip(gradients(out, tensors), gradients(expected, tensors), strict=True):
            assert grad.dtype == torch.float32
            assert (grad - wanted).abs().max() < 3e-2 * wanted.abs().max()

    def test_positions_are_exact_under_autocast(self):
        """bfloat16 cannot tell column 300 from 301."""
        value = torch.arange(512.0).remainder(2).view(1, 512, 1, 1)
        x = (torch.arange(512) + 0.5) / 512
        locations = torch.stack([x, torch.full_like(x, 0.5)], dim=-1).view(1, 512, 1, 1, 1, 2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = ms_deform_attn(value, [(1, 512)], locations, torch.ones(1, 512, 1, 1, 1))
        assert out.flatten().tolist() == value.flatten().tolist()

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30, -1e30])
    def test_locations_that_are_no_position(self, bad):
        """The sample is zero; all others are unchanged."""
        value, locations, weights = (t.float() for t in arguments())
        locations[0, 2, 1, 0, 0, 1] = bad
        out = attend((value, locations, weights))
        tensors = [t.requires_grad_() for t in (value, locations, weights)]
        np.testing.assert_allclose(
            out.numpy(), loop([t.detach() for t in tensors]), rtol=1e-4, atol=1e-4
        )
        attend(tensors).sum().backward()
        assert all(t.grad.isfinite().all() for t in tensors)
        assert not locations.grad[0, 2, 1, 0, 0].any()

    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("value", (2, 55, 12)),
            ("value", (2, 54, 3, 4)),
            ("value", (2, 55, 3, 0)),
            ("sampling_locations", (2, 5, 3, 4, 2)),
            ("sampling_locations", (1, 5, 3, 4, 2, 2)),
            ("sampling_locations", (2, 5, 2, 4, 2, 2)),
            ("sampling_locations", (2, 5, 3, 3, 2, 2)),
            ("sampling_locations", (2, 5, 3, 4, 0, 2)),
            ("sampling_locations", (2, 5, 3, 4, 2, 4)),
            ("attention_weights", (2, 5, 3, 4, 3)),
            ("attention_weights", (2, 5, 3, 8)),
        ],
    )
    def test_wrong_shapes_are_named(self, name, shape):
        names = ("value", "sampling_locations", "attention_weights")
        tensors = dict(zip(names, arguments(), strict=True))
        tensors[name] = torch.zeros(shape)
        with pytest.raises(ValueError, match=f"^ms_deform_attn: {name}: expected shape") as caught:
            ms_deform_attn(spatial_shapes=PYRAMID, **tensors)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "shapes",
        [[], [(5, 8), (0, 4)], [(5.0, 8)], [(5, 8, 1)], [5, 8], torch.tensor([[5, 8], [5, 3]])],
    )
    def test_wrong_levels_are_named(self, shapes):
        with pytest.raises(ValueError, match="^ms_deform_attn: spatial_shapes: expected a"):
            attend(arguments(), shapes)

    def test_wrong_kinds_are_named(self):
        value, locations, weights = arguments()
        with pytest.raises(ValueError, match="^ms_deform_attn: value: expected a floating"):
            attend((value.long(), locations, weights))
        with pytest.raises(ValueError, match="^ms_deform_attn: attention_weights: .* meta$"):
            attend((value, locations, weights.to("meta")))

    @given(
        shapes=st.lists(st.tuples(*[st.integers(1, 6)] * 2), min_size=1, max_size=4),
        batch=st.integers(0, 3),
        queries=st.integers(0, 4),
        heads=st.integers(1, 3),
        channels=st.integers(1, 5),
        points=st.integers(1, 3),
    )
    def test_any_shape(self, shapes, batch, queries, heads, channels, points):
        torch.manual_seed(0)
        tensors = arguments(shapes, batch, queries, heads, channels, points)
        np.testing.assert_allclose(
            attend(tensors, shapes).numpy(), loop(tensors, shapes), rtol=1e-10, atol=1e-10
        )


class TestKernel:
    @pytest.mark.parametrize("shapes", PYRAMIDS, ids=str)
    @pytest.mark.parametrize("spread", [0.3, 20.0], ids=["near", "far outside"])
    def test_is_the_plain_path(self, on_kernel, shapes, spread):
        tensors = [t.float() for t in arguments(shapes, queries=2, spread=spread)]
        check(on_kernel, tensors, shapes)

    @pytest.mark.parametrize(
        ("heads", "channels", "points"), [(1, 1, 1), (8, 32, 4), (2, 33, 3), (1, 300, 1)]
    )
    def test_heads_channels_and_points(self, on_kernel, heads, channels, points):
        tensors = arguments(SMALL, 2, 1, heads, channels, points)
        check(on_kernel, [t.float() for t in tensors])

    def test_several_programs(self, on_kernel):
        tensors = arguments(SMALL, queries=20, heads=1, channels=2, points=1)
        check(on_kernel, [t.float() for t in tensors])

    @pytest.mark.parametrize("fraction", [0.0, 0.5], ids=["on pixels", "between pixels"])
    def test_on_and_between_pixels(self, on_kernel, fraction):
        shapes, tensors = on_grid(fraction)
        check(on_kernel, [t.float() for t in tensors], shapes)

    def test_memory_layout_does_not_matter(self, on_kernel):
        turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in few()]
        check(on_kernel, turned)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1e30])
    def test_locations_that_are_no_position(self, on_kernel, bad):
        tensors = few()
        tensors[1][0, 2, 1, 0, 0, 1] = bad
        check(on_kernel, tensors)

    @settings(max_examples=6)
    @given(
        shapes=st.lists(st.tuples(*[st.integers(1, 6)] * 2), min_size=1, max_size=4),
        batch=st.integers(0, 3),
        queries=st.integers(0, 4),
        heads=st.integers(1, 3),
        channels=st.integers(1, 9),
        points=st.integers(1, 3),
    )
    def test_any_shape(self, shapes, batch, queries, heads, channels, points):
        torch.manual_seed(0)
        tensors = arguments(shapes, batch, queries, heads, channels, points)
        with pytest.MonkeyPatch.context() as patch:
            device = use_kernels(patch, module)
            check(device, [t.float() for t in tensors], shapes)

    @pytest.mark.parametrize(
        ("needed", "plain"), [(0, True), (1, False)], ids=["value", "locations"]
    )
    def test_deterministic_algorithms(self, on_kernel, monkeypatch, needed, plain):
        """The kernel sums only the gradient of the values in any order."""
        tensors = [t.to(on_kernel) for t in few()]
        tensors[needed].requires_grad_()
        run = functools.partial(attend, tensors, SMALL)
        assert runs_plain_backward(monkeypatch, module.plain, run) == plain


class TestOperator:
    def test_opcheck(self):
        """Schema, fake tensors and autograd of both operators."""
        tensors = [t.float().requires_grad_() for t in arguments()]
        sides = [side for shape in PYRAMID for side in shape]
        torch.library.opcheck(torch.ops.dynamic_detr.ms_deform_attn, (*tensors, sides))
        detached = [t.detach() for t in tensors]
        for needs in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(
                torch.ops.dynamic_detr.ms_deform_attn_backward,
                (torch.randn(2, 5, 12), *detached, sides, *needs),
                test_utils=("test_schema", "test_faketensor"),
            )

    def test_compiles_without_a_break(self):
        tensors = [t.float().requires_grad_() for t in arguments()]
        compiled = torch.compile(lambda *t: attend(t).relu(), fullgraph=True, backend="aot_eager")
        out, expected = compiled(*tensors), attend(tensors).relu()
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(gradients(out, tensors), gradients(expected, tensors))
