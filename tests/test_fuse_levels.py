"""`fuse_levels` on both backends against the float64 reference.

The kernels run on a GPU, or in Triton's interpreter where there is none.
"""

import importlib
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import fusion as reference
from torch import Tensor

from dynamic_detr.ops import FusionWeights, fuse_levels
from dynamic_detr.ops.backend import KERNEL_DTYPES
from dynamic_detr.ops.plain import tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 0.1  # a map of one pixel has no variance
module = importlib.import_module("dynamic_detr.ops.fuse_levels")


def use_backend(patch: pytest.MonkeyPatch, name: str) -> None:
    patch.setattr(module, "kernel_serves", lambda t: name == "kernel" and t.dtype in KERNEL_DTYPES)


@pytest.fixture(params=["plain", "kernel"])
def backend(request, monkeypatch) -> str:
    """Implementation that runs."""
    if request.param == "kernel":
        pytest.importorskip("triton")
    use_backend(monkeypatch, request.param)
    return request.param


class Arguments(NamedTuple):
    same: list[Tensor]
    finer: list[Tensor]
    coarser: list[Tensor]
    sizes: list[Tensor]
    weights: FusionWeights
    num_groups: int
    eps: float = EPS

    def tensors(self) -> list[Tensor]:
        """Return all maps and parameters, which require gradients."""
        floating = [*self.same, *self.finer, *self.coarser, *self.weights]
        return [t.requires_grad_() for t in floating if t is not None]

    def map(self, function) -> "Arguments":
        """Apply a function to maps and parameters."""
        same, finer, coarser = ([function(m) for m in part] for part in self[:3])
        weights = FusionWeights(*(None if p is None else function(p) for p in self.weights))
        return Arguments(same, finer, coarser, self.sizes, weights, self.num_groups, self.eps)

    def exact(self) -> "Arguments":
        return self.map(lambda t: t.detach().double())


def arguments(
    size=(7, 10),
    channels=8,
    sizes=((7, 10), (4, 3)),
    levels=2,
    groups=1,
    scale=True,
    dyrelu=True,
    dtype=torch.float32,
    garbage=torch.nan,
    device=DEVICE,
) -> Arguments:
    """Return random arguments with garbage beyond the true sizes."""
    batch, branches = len(sizes), 3 if levels > 1 else 1
    true = torch.tensor(sizes, dtype=torch.int64).reshape(batch, 2)
    same, finer, coarser, true_sizes = [], [], [], []

    def random_map() -> Tensor:
        features = torch.randn(batch, channels, *size) + torch.randn(batch, channels, 1, 1)
        for image, (h, w) in enumerate(true.tolist()):
            features[image, :, h:] = garbage
            features[image, :, :, w:] = garbage
        return features.to(device, dtype).contiguous(memory_format=torch.channels_last)

    for level in range(levels):
        same.append(random_map())
        true_sizes.append(true.to(device))
        if level > 0:
            finer.append(random_map())
            coarser.append(random_map())
        size, true = tuple((side + 1) // 2 for side in size), (true + 1) // 2

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    weights = [random(branches, channels) for _ in range(3)]
    weights += [random(1, channels), random(1)] if scale else [None, None]
    if dyrelu:
        weights += [random(3, channels), random(3), random(4 * channels, 3), random(4 * channels)]
    return Arguments(same, finer, coarser, true_sizes, FusionWeights(*weights), groups)


SHAPES = {
    "padded": ((7, 10), ((7, 10), (4, 3), (1, 1))),
    "filled": ((6, 8), ((6, 8),)),
    "odd": ((5, 9), ((5, 9), (5, 8), (4, 9))),
    "equal halves": ((6, 8), ((6, 8), (6, 8), (5, 7), (5, 7), (5, 8))),
    "one pixel": ((1, 1), ((1, 1), (1, 1))),
    "one row": ((1, 9), ((1, 9), (1, 4))),
    "one column": ((11, 1), ((11, 1), (2, 1))),
    "several rows of programs": ((37, 5), ((37, 5), (33, 4))),
}


def results(given: Arguments, function=fuse_levels) -> list[Tensor]:
    """Return the levels and all gradients."""
    tensors = given.tensors()
    levels = function(*given)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(m.shape, generator=generator).to(m) for m in levels]
    return [*levels, *torch.autograd.grad(levels, tensors, upstream)]


def check(given: Arguments, tolerance=1e-3) -> list[Tensor]:
    """Compare the levels and all gradients with the reference in float64, and return them."""
    tensors = results(given)
    pairs = zip(tensors, results(given.exact(), reference.fuse_levels), strict=True)
    for found, exactly in pairs:
        assert found.isfinite().all()
        scale = exactly.abs().max().clamp(min=1) if exactly.numel() else 1
        torch.testing.assert_close(found.double() / scale, exactly / scale, rtol=0, atol=tolerance)
    return tensors


@pytest.mark.parametrize(
    ("shape", "levels"), [(shape, 2) for shape in SHAPES] + [("padded", 1), ("padded", 3)]
)
def test_is_the_reference(backend, shape, levels):
    size, sizes = SHAPES[shape]
    images = 5 if backend == "plain" else 2  # the interpreter is slow
    check(arguments(size, 6, sizes[-images:], levels, groups=2), tolerance=1e-4)


def test_an_image_may_claim_to_be_larger_than_its_map(backend):
    given = arguments((4, 4), 4, ((4, 4),))
    large = given._replace(sizes=[sizes + 5 for sizes in given.sizes])
    torch.testing.assert_close(results(large), results(given))


def test_no_images(backend):
    given = arguments((4, 4), 4, ())
    found = results(given)
    assert [level.shape for level in found[:2]] == [(0, 4, 4, 4), (0, 4, 2, 2)]
    assert [grad.shape for grad in found[2:]] == [tensor.shape for tensor in given.tensors()]
    assert not any(grad.any() for grad in found[2:])


def test_gradients_in_float64():
    """Finite differences of the levels and of the moments, the second output of the operator."""
    given = arguments((3, 2), 2, ((3, 2), (2, 1)), garbage=0.5).exact()

    def function(*tensors):
        left = iter(tensors)
        moved = given.map(lambda _: next(left))
        *maps, weights, groups, eps = moved
        out, moments = torch.ops.dynamic_detr.fuse_levels(*maps, *weights, groups, eps)
        return *out, moments

    assert torch.autograd.gradcheck(function, given.tensors(), fast_mode=True)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
)
def test_dtypes(backend, dtype, tolerance):
    given = arguments(dtype=dtype)
    for level in check(given, tolerance)[:2]:
        assert level.dtype == dtype
        assert level.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_half_precision(dtype):
    found = results(arguments().map(lambda t: t.to(dtype)))
    assert {tensor.dtype for tensor in found} == {dtype}


def test_autocast_changes_nothing():
    """Also if the backward pass runs under it."""
    given = arguments()
    found = []
    for enabled in (False, True):
        with torch.autocast(DEVICE, torch.bfloat16, enabled):
            found.append(results(given))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_variance_of_a_large_mean(backend):
    """Without and with an outlier in a corner."""
    given = arguments((60, 40), 6, ((60, 40),), 1, groups=6)
    for corner in (0, 1000):
        features = torch.randn(1, 6, 60, 40, device=DEVICE) + 1000
        features[:, :, 0, 0] = corner
        changed = given._replace(same=[features])
        (found,), (expected,) = (
            fuse_levels(*changed),
            reference.fuse_levels(*changed.exact()),
        )
        torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("elements", [1, 50, 100, 240, 500])
def test_tiles_leave_no_seam(monkeypatch, shape, elements):
    """Tiles of two rows, several rows, one image and several images."""
    use_backend(monkeypatch, "plain")
    monkeypatch.setattr(tiles, "ELEMENTS", elements)
    size, sizes = SHAPES[shape]
    check(arguments(size, 4, sizes, 2))


@pytest.mark.parametrize("channels", [1, 64, 70])
def test_any_number_of_channels(backend, channels):
    """In channels-first memory."""
    given = arguments((4, 3), channels, ((4, 3), (3, 2)), 2)
    check(given.map(lambda t: t.contiguous()))


def test_upstream_gradients_of_any_strides(backend):
    given = arguments((4, 3), 4, ((4, 3), (3, 2)), 1)
    tensors = given.tensors()
    upstream = torch.randn(2, 4, 3, 4, device=DEVICE)
    grads = []
    for same in (upstream.transpose(2, 3), upstream.transpose(2, 3).contiguous()):
        grads.append(torch.autograd.grad(fuse_levels(*given), tensors, same))
    torch.testing.assert_close(*grads)


def test_equal_linear_functions_get_half_of_the_gradient_each(backend):
    """A ReLU at 0, as in `torch.maximum`."""
    given = arguments((2, 3), 4, ((2, 3),), 1, scale=False, dyrelu=False)
    given = given.map(torch.zeros_like)
    grads = results(given)[1:]
    upstream = torch.randn(1, 4, 2, 3, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    torch.testing.assert_close(grads[-1], upstream.sum(dim=(2, 3)) / 2)  # of the norm's bias


def test_gradient_of_one_argument_alone():
    given = arguments((4, 3), 4, ((4, 3), (3, 2)), 2)
    expected = results(given)[2:]
    for index in (0, 3, 12):  # two maps, the last parameter
        alone = given.map(lambda t: t.detach().clone())
        kept = [t for part in alone[:3] for t in part] + list(alone.weights)
        kept[index].requires_grad_()
        levels = fuse_levels(*alone)
        generator = torch.Generator().manual_seed(1)
        upstream = [torch.randn(m.shape, generator=generator).to(m) for m in levels]
        (grad,) = torch.autograd.grad(levels, kept[index], upstream)
        torch.testing.assert_close(grad, expected[index])


ANY_SHAPE = given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=2),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    channels=st.integers(2, 6),
    levels=st.integers(1, 3),
)


def check_any_shape(sizes, padding, channels, levels):
    torch.manual_seed(0)
    size = tuple(
        max(side) + more for side, more in zip(zip(*sizes, strict=True), padding, strict=True)
    )
    check(arguments(size, channels, sizes, levels))


@settings(max_examples=12)
@ANY_SHAPE
def test_any_shape(sizes, padding, channels, levels):
    check_any_shape(sizes, padding, channels, levels)


@settings(max_examples=3)
@ANY_SHAPE
def test_any_shape_on_kernels(sizes, padding, channels, levels):
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        use_backend(patch, "kernel")
        check_any_shape(sizes, padding, channels, levels)


def test_opcheck():
    """Schema, fake tensors and autograd of all operators."""
    levels = 2
    given = arguments((3, 5), 4, ((3, 5), (2, 2)), levels, garbage=0.5)
    given.tensors()
    *maps, weights, groups, eps = given
    namespace = torch.ops.dynamic_detr
    torch.library.opcheck(namespace.fuse_levels, (*maps, *weights, groups, eps))
    plain = [[m.detach() for m in part] for part in maps]
    upstream = [torch.randn_like(m) for m in plain[0]]
    coefficients = torch.randn(levels, 7, 2, 4, device=DEVICE)
    torch.library.opcheck(
        namespace.fuse_levels_coefficient_gradients, (upstream, *plain, coefficients)
    )
    moments = torch.rand(3, levels, 3, 2, 4, device=DEVICE)
    torch.library.opcheck(
        namespace.fuse_levels_map_gradients, (upstream, *plain, moments, moments, coefficients)
    )


def test_compiles_without_a_break():
    given = arguments((6, 7), 4, ((6, 7), (3, 4)))
    compiled = torch.compile(fuse_levels, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(given, compiled), results(given))


def with_part(given: Arguments, part: str, index: int, tensor: Tensor) -> Arguments:
    maps = list(getattr(given, part))
    maps[index] = tensor
    return given._replace(**{part: maps})


@pytest.mark.parametrize(
    ("part", "index", "tensor", "message"),
    [
        ("same", 0, torch.zeros(3, 4), r"shape \(B, C, H, W\), got \(3, 4\)"),
        ("same", 1, torch.zeros(2, 8, 4, 4), r"shape \(2, 8, 4, 5\), got \(2, 8, 4, 4\)"),
        ("same", 0, torch.zeros(2, 8, 7, 10).long(), "a floating dtype, got torch.int64"),
        ("finer", 0, torch.zeros(2, 8, 7, 9), r"shape \(2, 8, 4, 5\), got \(2, 8, 7, 9\)"),
        ("finer", 0, torch.zeros(2, 8, 4, 5).half(), "torch.float32, got torch.float16"),
        ("coarser", 0, torch.zeros(2, 8, 3, 5), r"shape \(2, 8, 4, 5\), got \(2, 8, 3, 5\)"),
        ("sizes", 0, torch.ones(2, 2), "int32 or int64, got torch.float32"),
        ("sizes", 1, torch.ones(3, 2).long(), r"shape \(2, 2\), got \(3, 2\)"),
        ("finer", 0, torch.zeros(2, 8, 4, 5).to("meta"), "a tensor on cpu, got one on meta"),
    ],
)
def test_wrong_maps_are_named(part, index, tensor, message):
    given = with_part(arguments(device="cpu"), part, index, tensor)
    message = rf"^fuse_levels: {part}\[{index}\]: expected {message}$"
    with pytest.raises(ValueError, match=message):
        fuse_levels(*given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"finer": []}, "finer: expected 1 tensors, got 0"),
        ({"same": []}, "same: expected 1 tensors, got 0"),
        ({"num_groups": 3}, "num_groups: expected a divisor of 8 channels, got 3"),
    ],
)
def test_wrong_numbers_are_named(change, message):
    with pytest.raises(ValueError, match=f"^fuse_levels: {message}"):
        fuse_levels(*arguments(device="cpu")._replace(**change))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("conv_bias", (1, 8)),
        ("norm_weight", (3, 9)),
        ("scale_weight", (8,)),
        ("reduce_bias", (4,)),
        ("expand_weight", (8, 3)),
    ],
)
def test_wrong_weights_are_named(name, shape):
    given = arguments(device="cpu")
    weights = given.weights._replace(**{name: torch.zeros(shape)})
    with pytest.raises(ValueError, match=f"^fuse_levels: {name.split('_')[0]}.*: expected shape"):
        fuse_levels(*given._replace(weights=weights))
