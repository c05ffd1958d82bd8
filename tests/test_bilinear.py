"""Bilinear samples against a float64 loop, and their gradients against finite differences."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.sampling import bilinear
from torch import Tensor

from dynamic_detr.ops.plain.bilinear import BilinearSamples

POSITIONS = [-1e30, -7.0, -2.0, -1.5, -1.0, -0.25, 0.0, 0.5, 1.0, 1.75, 2.0, 3.5, 4.0, 4.25, 9.0]
SIDES = st.integers(1, 5)
COORDINATES = st.one_of(st.sampled_from(POSITIONS), st.floats(-3, 7))


def sampled(samples: BilinearSamples, image: Tensor) -> Tensor:
    """Return the samples of a (H, W) image."""
    index = samples.index(image.shape[1])
    assert index.dtype == torch.int32
    assert index.min() >= 0 and index.max() < image.numel()
    return (image.flatten()[index.long()] * samples.weight()).sum(dim=-1)


@settings(deadline=None)
@given(SIDES, SIDES, st.lists(st.tuples(COORDINATES, COORDINATES), min_size=1, max_size=6))
def test_is_the_reference(height, width, positions):
    image = torch.randn(height, width, dtype=torch.float64)
    y, x = torch.tensor(positions, dtype=torch.float64).unbind(dim=-1)
    expected = [bilinear(image[None].numpy(), *position)[0] for position in positions]
    for sizes in ((height, width), (torch.tensor(height), torch.tensor(width))):
        found = sampled(BilinearSamples(y, x, *sizes), image)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, -1e30])
def test_bad_positions_are_outside(bad):
    image = torch.ones(3, 4)
    y, x = torch.tensor([bad, 1.0, bad]), torch.tensor([1.0, bad, bad])
    samples = BilinearSamples(y, x, 3, 4)
    assert sampled(samples, image).tolist() == [0, 0, 0]
    for grad in samples.backward(torch.ones(3, 4))[:2]:
        assert grad.tolist() == [0, 0, 0]


def test_sizes_and_positions_broadcast():
    """A column of y and a row of x, on maps of two sizes in one table."""
    image = torch.randn(4, 6, dtype=torch.float64)
    y, x = torch.rand(2, 5, 1, dtype=torch.float64) * 6, torch.rand(2, 1, 3, dtype=torch.float64)
    heights, widths = torch.tensor([4, 1]).view(2, 1, 1), torch.tensor([6, 2]).view(2, 1, 1)
    samples = BilinearSamples(y, x * 8, heights, widths)
    assert samples.shape == (2, 5, 3)
    index, weight = samples.index(torch.tensor(6)), samples.weight()
    found = (image.flatten()[index.long()] * weight).sum(dim=-1)
    for which, (height, width) in enumerate(((4, 6), (1, 2))):
        crop = image[:height, :width]
        alone = BilinearSamples(*torch.broadcast_tensors(y[which], x[which] * 8), height, width)
        torch.testing.assert_close(found[which], sampled(alone, crop))


@settings(deadline=None)
@given(SIDES, SIDES, st.integers(0, 1000), st.booleans())
def test_gradients(height, width, seed, scaled):
    """Finite differences, away from pixels, where the derivative jumps."""
    generator = torch.Generator().manual_seed(seed)
    cell = torch.randint(-3, 6, (2, 8), generator=generator)
    y, x = cell + 0.1 + 0.8 * torch.rand(2, 8, generator=generator, dtype=torch.float64)
    scale = torch.rand(8, generator=generator, dtype=torch.float64) if scaled else None
    image = torch.randn(height, width, generator=generator, dtype=torch.float64)

    def value(y: Tensor, x: Tensor, scale: Tensor | None) -> Tensor:
        return sampled(BilinearSamples(y, x, height, width, scale), image)

    samples = BilinearSamples(y, x, height, width, scale)
    grad_weight = image.flatten()[samples.index(width).long()]
    grad_y, grad_x, grad_scale = samples.backward(grad_weight)
    step = 1e-6
    torch.testing.assert_close(
        grad_y, (value(y + step, x, scale) - value(y - step, x, scale)) / (2 * step)
    )
    torch.testing.assert_close(
        grad_x, (value(y, x + step, scale) - value(y, x - step, scale)) / (2 * step)
    )
    if scaled:
        torch.testing.assert_close(grad_scale, value(y, x, None))
    else:
        assert grad_scale is None


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_gradient_on_a_pixel_is_that_of_the_next_cell(size):
    """Also at the edges and outside."""
    image = torch.randn(size, 1, dtype=torch.float64)
    y = torch.arange(-3.0, size + 3, dtype=torch.float64)
    samples = BilinearSamples(y, torch.zeros_like(y), size, 1)
    grad_y, *_ = samples.backward(image.flatten()[samples.index(1).long()])
    padded = torch.cat([torch.zeros(3), image.flatten(), torch.zeros(4)])
    torch.testing.assert_close(grad_y, padded.diff())
