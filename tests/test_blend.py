"""The operators around the deformable convolutions, on every backend, against the float64
reference; the kernels through Triton's interpreter where there is no GPU."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import blend as reference
from torch import Tensor

from dynamic_detr.ops import blend_dyrelu, masked_moments
from dynamic_detr.ops.backend import KERNEL_DTYPES
from dynamic_detr.ops.plain import tiles as level_bands

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODULES = [
    importlib.import_module(f"dynamic_detr.ops.{name}")
    for name in ("masked_moments", "blend_dyrelu")
]


def use_backend(patch: pytest.MonkeyPatch, name: str) -> None:
    for module in MODULES:
        patch.setattr(
            module, "kernel_serves", lambda t: name == "kernel" and t.dtype in KERNEL_DTYPES
        )


@pytest.fixture(params=["plain", "kernel"])
def backend(request, monkeypatch) -> str:
    """Which implementation runs."""
    if request.param == "kernel":
        pytest.importorskip("triton")
    use_backend(monkeypatch, request.param)
    return request.param


def arguments(
    size=(7, 10),
    channels=8,
    sizes=((7, 10), (4, 3)),
    neighbours="both",
    dtype=torch.float32,
    garbage=torch.nan,
    device=DEVICE,
) -> tuple[tuple, Tensor]:
    """(same, finer, coarser, sizes) with garbage beyond the true sizes, and coefficients."""
    height, width = size
    batch = len(sizes)
    sizes = torch.tensor(sizes, dtype=torch.int64).reshape(batch, 2)

    def random_map(height: int, width: int, sizes: Tensor) -> Tensor:
        features = torch.randn(batch, channels, height, width)
        features += torch.randn(batch, channels, 1, 1)
        for image, (h, w) in enumerate(sizes.tolist()):
            features[image, :, h:] = garbage
            features[image, :, :, w:] = garbage
        return features.to(device, dtype).contiguous(memory_format=torch.channels_last)

    same = random_map(height, width, sizes)
    finer = random_map(height, width, sizes) if neighbours in ("both", "finer") else None
    coarser = None
    if neighbours in ("both", "coarser"):
        coarser = random_map((height + 1) // 2, (width + 1) // 2, (sizes + 1) // 2)
    return (same, finer, coarser, sizes.to(device)), torch.randn(7, batch, channels, device=device)


def exact(tensors: tuple) -> tuple:
    return tuple(
        t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors
    )


def leaves(maps: tuple, coefficients: Tensor) -> list[Tensor]:
    tensors = [m for m in maps[:3] if m is not None] + [coefficients]
    return [t.requires_grad_() for t in tensors]


def block(maps: tuple, coefficients: Tensor, expected: bool = False) -> tuple[Tensor, Tensor]:
    """Moments and level, where the level depends on the moments as in an encoder block."""
    if expected:
        moments = reference.moments(*maps)
        return moments, reference.blend(*maps, _attend(moments, coefficients))
    moments, measured = masked_moments(*maps)
    return moments, blend_dyrelu(measured, _attend(moments, coefficients))


def _attend(moments: Tensor, coefficients: Tensor) -> Tensor:
    mean, variance, upsampled_mean = moments
    gains = coefficients[:3] * torch.rsqrt(variance + 0.1)
    lines = coefficients[3:] + (upsampled_mean * gains - mean).sum(dim=0)
    return torch.cat([gains, lines])


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


def check(maps: tuple, coefficients: Tensor, through: str = "both", tolerance=1e-3) -> None:
    """Moments, level and all gradients against the reference on the same numbers in float64."""
    results = []
    for tensors, expected in (
        ((maps, coefficients), False),
        ((exact(maps), coefficients.double()), True),
    ):
        wanted = leaves(*tensors)
        moments, out = block(*tensors, expected=expected)
        torch.manual_seed(1)
        dtype = maps[0].dtype
        losses = [(m * torch.randn(m.shape).to(dtype).to(m)).sum() for m in (moments, out)]
        loss = {"moments": losses[0], "level": losses[1], "both": sum(losses)}[through]
        grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        results.append([moments, out, *grads])
    for found, exactly in zip(*results, strict=True):
        assert found.isfinite().all()
        scale = exactly.abs().max().clamp(min=1) if exactly.numel() else 1
        torch.testing.assert_close(found.double() / scale, exactly / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("shape", "neighbours"),
    [(shape, "both") for shape in SHAPES]
    + [("padded", neighbours) for neighbours in ("finer", "coarser", "none")],
)
def test_is_the_reference(backend, shape, neighbours):
    size, sizes = SHAPES[shape]
    check(*arguments(size, 5, sizes, neighbours), tolerance=1e-4)


@pytest.mark.parametrize("through", ["moments", "level"])
def test_gradients_of_one_result_alone(backend, through):
    check(*arguments((3, 5), 4, ((3, 5), (2, 2))), through)


def test_an_image_may_claim_to_be_larger_than_its_map(backend):
    maps, coefficients = arguments((4, 4), 4, ((4, 4),))
    large = (*maps[:3], maps[3] + 5)
    torch.testing.assert_close(block(large, coefficients), block(maps, coefficients))


def test_no_images(backend):
    maps, coefficients = arguments((4, 4), 4, ())
    wanted = leaves(maps, coefficients)
    moments, out = block(maps, coefficients)
    assert moments.shape == (3, 3, 0, 4)
    assert out.shape == (0, 4, 4, 4)
    grads = torch.autograd.grad(out.sum() + moments.sum(), wanted)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in wanted]


@pytest.mark.parametrize("neighbours", ["both", "none"])
def test_gradients_in_float64(neighbours):
    """Through coefficients that do and do not depend on the moments."""
    maps, coefficients = arguments((4, 5), 2, ((4, 5), (3, 2)), neighbours)
    maps, coefficients = exact(maps), coefficients.double()
    true = tuple(None if m is None else m.nan_to_num(0.5) for m in maps[:3])
    wanted = leaves(true, coefficients)

    def function(*tensors):
        tensors = list(tensors)
        given = [None if m is None else tensors.pop(0) for m in true]
        return block((*given, maps[3]), tensors[0])

    def independent(*tensors):
        tensors = list(tensors)
        given = [None if m is None else tensors.pop(0) for m in true]
        return blend_dyrelu(masked_moments(*given, maps[3])[1], tensors[0])

    assert torch.autograd.gradcheck(function, wanted)
    assert torch.autograd.gradcheck(independent, wanted)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
def test_dtypes(backend, dtype, tolerance):
    """The results are of the dtypes and in the memory that fake tensors promise."""
    maps, coefficients = arguments(dtype=dtype)
    check(maps, coefficients, tolerance=tolerance)
    moments, out = block(maps, coefficients)
    assert (moments.dtype, out.dtype) == (torch.float32, dtype)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_autocast_changes_nothing(backend):
    """Not even where the backward pass runs under it."""
    maps, coefficients = arguments()
    wanted = leaves(maps, coefficients)
    results = []
    for enabled in (False, True):
        with torch.autocast(DEVICE, torch.bfloat16, enabled):
            moments, out = block(maps, coefficients)
            results.append([moments, out, *torch.autograd.grad(out.sum(), wanted)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_large_mean_does_not_drown_the_variance(backend):
    """Nor does an outlier, or a corner that differs from all else."""
    features = torch.randn(1, 5, 60, 40, device=DEVICE) + 1000
    features[:, :, 0, 0] = 0
    sizes = torch.tensor([[60, 40]], device=DEVICE)
    moments, _ = masked_moments(features, None, None, sizes)
    expected = reference.moments(features.double(), None, None, sizes)
    torch.testing.assert_close(moments.double(), expected, rtol=1e-5, atol=1e-5)
    features[:, :, 0, 0] = 1000
    moments, _ = masked_moments(features, None, None, sizes)
    expected = reference.moments(features.double(), None, None, sizes)
    torch.testing.assert_close(moments.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("numbers", [1, 50, 100, 240, 500])
def test_bands_leave_no_seam(monkeypatch, shape, numbers):
    """Bands of two rows, of several, of whole images and of several images."""
    use_backend(monkeypatch, "plain")
    monkeypatch.setattr(level_bands, "NUMBERS", numbers)
    size, sizes = SHAPES[shape]
    check(*arguments(size, 4, sizes))


@pytest.mark.parametrize("channels", [1, 64, 70])
def test_any_number_of_channels(backend, channels):
    """From channels-first memory."""
    maps, coefficients = arguments((4, 3), channels, ((4, 3), (3, 2)))
    check(tuple(m.contiguous() for m in maps), coefficients)


def test_upstream_gradients_of_any_strides(backend):
    maps, coefficients = arguments((4, 3), 4, ((4, 3), (3, 2)))
    wanted = leaves(maps, coefficients)
    upstream = torch.randn(2, 4, 3, 4, device=DEVICE)
    grads = []
    for same in (upstream.transpose(2, 3), upstream.transpose(2, 3).contiguous()):
        grads.append(torch.autograd.grad(block(maps, coefficients)[1], wanted, same))
    torch.testing.assert_close(*grads)


def test_where_the_lines_meet_each_gets_half(backend):
    maps, _ = arguments((2, 3), 4, ((2, 3),), "none")
    coefficients = torch.zeros(7, 1, 4, device=DEVICE)
    coefficients[0] = 1
    coefficients[3], coefficients[5] = 2, 2
    wanted = leaves(maps, coefficients)
    out = blend_dyrelu(masked_moments(*maps)[1], coefficients)
    grad_map, grad = torch.autograd.grad(out.sum(), wanted)
    torch.testing.assert_close(grad_map, torch.full_like(grad_map, 2.0))
    torch.testing.assert_close(grad[4], torch.full_like(grad[4], 3.0))
    torch.testing.assert_close(grad[6], torch.full_like(grad[6], 3.0))


def test_no_graph_without_gradients(backend):
    maps, coefficients = arguments()
    moments, measured = masked_moments(*maps)
    assert measured.relays is None
    assert not moments.requires_grad
    first, second = blend_dyrelu(measured, coefficients), blend_dyrelu(measured, coefficients)
    assert torch.equal(first, second)


ANY_SHAPE = given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=2),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    channels=st.integers(1, 6),
    neighbours=st.sampled_from(["both", "finer", "coarser", "none"]),
)


def check_any_shape(sizes, padding, channels, neighbours):
    torch.manual_seed(0)
    size = tuple(
        max(side) + more for side, more in zip(zip(*sizes, strict=True), padding, strict=True)
    )
    check(*arguments(size, channels, sizes, neighbours))


@ANY_SHAPE
def test_any_shape(sizes, padding, channels, neighbours):
    check_any_shape(sizes, padding, channels, neighbours)


@settings(max_examples=4)
@ANY_SHAPE
def test_any_shape_on_kernels(sizes, padding, channels, neighbours):
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        use_backend(patch, "kernel")
        check_any_shape(sizes, padding, channels, neighbours)


@pytest.mark.parametrize("neighbours", ["both", "none"])
def test_operators_are_registered_as_they_should_be(neighbours):
    maps, coefficients = arguments((3, 5), 4, ((3, 5), (2, 2)), neighbours, garbage=0.5)
    leaves(maps, coefficients)
    namespace = torch.ops.dynamic_detr
    plain = tuple(None if m is None else m.detach() for m in maps)
    torch.library.opcheck(namespace.masked_moments.default, (*maps, True))
    torch.library.opcheck(namespace.masked_moments.default, (*plain, False))
    moments, measured = masked_moments(*maps)
    relays = tuple(relay.detach() for relay in measured.relays)
    torch.library.opcheck(namespace.blend_dyrelu.default, (*maps, coefficients, *relays))
    torch.library.opcheck(namespace.blend_dyrelu.default, (*maps, coefficients, None, None))
    upstream = torch.randn_like(plain[0])
    coefficients, moments = coefficients.detach(), moments.detach()
    torch.library.opcheck(namespace.blend_dyrelu_backward.default, (upstream, *plain, coefficients))
    torch.library.opcheck(
        namespace.masked_moments_backward.default,
        (*plain, moments, torch.randn_like(moments), upstream, coefficients),
    )


def test_compiles_without_a_break():
    maps, coefficients = arguments((6, 7), 4, ((6, 7), (3, 4)))
    wanted = leaves(maps, coefficients)
    grads = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        moments, out = function(maps, coefficients)
        grads.append(torch.autograd.grad(out.square().sum() + moments.sum(), wanted))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3, 4)}, r"same is torch.float32 \(3, 4\); wants floating point \(B, C"),
        ({0: torch.zeros(2, 8, 7, 10, dtype=torch.int64)}, "same is torch.int64"),
        ({1: torch.zeros(2, 8, 7, 9)}, r"finer is .*\(2, 8, 7, 9\); wants .*\(2, 8, 7, 10\)"),
        ({1: torch.zeros(2, 8, 7, 10).half()}, "finer is torch.float16 .*; wants torch.float32"),
        ({2: torch.zeros(2, 8, 3, 5)}, r"coarser is .*\(2, 8, 3, 5\); wants .*\(2, 8, 4, 5\)"),
        ({3: torch.ones(2, 2)}, r"sizes is torch.float32 \(2, 2\); wants int32 or int64 \(2, 2\)"),
        ({3: torch.ones(3, 2).long()}, r"sizes is torch.int64 \(3, 2\); wants .*\(2, 2\)"),
        ({1: torch.zeros(2, 8, 7, 10, device="meta")}, "finer is on meta; wants cpu, as same"),
    ],
)
def test_wrong_maps_are_named(change, message):
    maps, _ = arguments(device="cpu")
    maps = [change.get(index, m) for index, m in enumerate(maps)]
    with pytest.raises(ValueError, match=f"^masked_moments: {message}"):
        masked_moments(*maps)


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        (torch.zeros(7, 2, 9), r"coefficients is torch.float32 \(7, 2, 9\); wants .*\(7, 2, 8\)"),
        (torch.zeros(7, 2, 8).long(), "coefficients is torch.int64"),
        (torch.zeros(7, 2, 8, device="meta"), "coefficients is on meta; wants cpu, as the maps"),
    ],
)
def test_wrong_coefficients_are_named(coefficients, message):
    maps, _ = arguments(device="cpu")
    with pytest.raises(ValueError, match=f"^blend_dyrelu: {message}"):
        blend_dyrelu(masked_moments(*maps)[1], coefficients)


def test_maps_are_blended_once():
    maps, coefficients = arguments()
    leaves(maps, coefficients)
    _, measured = masked_moments(*maps)
    blend_dyrelu(measured, coefficients)
    with pytest.raises(ValueError, match="^blend_dyrelu: maps were blended before"):
        blend_dyrelu(measured, coefficients)
