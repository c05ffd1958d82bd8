"""Dynamic encoder: equality with a loop over pixels, initial values, switches and precisions."""

import numpy as np
import pytest
import torch
from helpers import (
    STRIDES,
    batch_pyramid,
    dynamic_encoder,
    numpy_weights,
    random_levels,
    shake,
    small_config,
)
from reference.encoder import encoder_block
from torch import nn

from dynamic_detr import Pyramid
from dynamic_detr.encoders import ENCODER_REGISTRY, IdentityEncoder, build_encoder
from dynamic_detr.encoders.dynamic_block import DynamicEncoderBlock
from dynamic_detr.encoders.dyrelu import DyReLU

CHANNELS, GROUPS = 8, 4


def encoder(num_blocks: int = 1, offsets: str = "resized", channels: int = CHANNELS) -> nn.Module:
    """Build a float64 encoder with noise added to all parameters; offsets are about a pixel."""
    return shake(dynamic_encoder(channels, num_blocks=num_blocks, offsets=offsets).double())


@pytest.mark.parametrize(
    ("image_size", "padded_size", "strides"),
    [
        ((100, 136), (128, 192), STRIDES),
        ((100, 136), (100, 136), STRIDES),
        ((37, 50), (64, 64), STRIDES[:4]),
        ((64, 64), (64, 128), STRIDES),
        ((1, 1), (64, 64), STRIDES),
        ((33, 21), (64, 64), STRIDES[:2]),
        ((70, 60), (96, 96), (32,)),
    ],
    ids=str,
)
def test_block_equals_the_reference(image_size, padded_size, strides):
    levels = random_levels(image_size, CHANNELS, strides)
    model = encoder()
    pyramid = batch_pyramid([levels], [image_size], padded_size, strides, garbage=10.0)
    with torch.no_grad():
        out = model(pyramid)
    expected = encoder_block(
        [level.numpy() for level in levels], numpy_weights(model.blocks[0]), GROUPS
    )
    for index, wanted in enumerate(expected):
        _, height, width = wanted.shape
        found = out.features[index][0]
        np.testing.assert_allclose(found[:, :height, :width], wanted, rtol=1e-9, atol=1e-9)
        assert not (found * ~out.valid_mask(index)[0]).any()


def test_two_blocks_equal_the_reference():
    levels = random_levels((45, 70), CHANNELS, STRIDES[1:4])
    model = encoder(num_blocks=2)
    pyramid = batch_pyramid([levels], [(45, 70)], (64, 96), STRIDES[1:4])
    with torch.no_grad():
        out = model(pyramid)
    expected = [level.numpy() for level in levels]
    for block in model.blocks:
        expected = encoder_block(expected, numpy_weights(block), GROUPS)
    for found, wanted in zip(out.features, expected, strict=True):
        np.testing.assert_allclose(
            found[0, :, : wanted.shape[1], : wanted.shape[2]], wanted, rtol=1e-9, atol=1e-9
        )


SWITCHES = [
    {},
    {"scale_attention": False},
    {"spatial_attention": False},
    {"channel_attention": False},
    {"scale_attention": False, "spatial_attention": False, "channel_attention": False},
]


def ragged(levels: int, garbage: float = 0.0, dtype=torch.float64) -> Pyramid:
    """Return a padded batch of two images with zeros or noise in the padding."""
    sizes, strides = [(50, 70), (37, 96)], STRIDES[:levels]
    images = [random_levels(size, CHANNELS, strides, dtype) for size in sizes]
    return batch_pyramid(images, sizes, (64, 96), strides, garbage)


def outputs_and_gradients(forward, block: nn.Module, pyramid: Pyramid) -> list[torch.Tensor]:
    """Return the levels, and the gradients of the features and of all parameters."""
    inputs = [f.detach().requires_grad_() for f in pyramid.features]
    levels = forward(pyramid.with_features(inputs)).features
    torch.manual_seed(1)
    upstream = [torch.randn_like(level) for level in levels]
    return [*levels, *torch.autograd.grad(levels, [*inputs, *block.parameters()], upstream)]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@pytest.mark.parametrize("levels", [1, 2, 4])
def test_fused_forward_equals_plain_forward(levels, switches):
    """Levels and gradients are equal, and every parameter has a gradient."""
    num_levels = levels if levels == 1 else None
    block = DynamicEncoderBlock(CHANNELS, GROUPS, num_levels, **switches).double()
    pyramid, shaken = ragged(levels), shake(block)
    torch.testing.assert_close(
        outputs_and_gradients(shaken.forward, shaken, pyramid),
        outputs_and_gradients(shaken.plain_forward, shaken, pyramid),
        rtol=1e-8,
        atol=1e-8,
    )


def test_switches_are_the_ablations():
    """Without the three attentions, one level is a convolution, a norm and a ReLU."""
    block = DynamicEncoderBlock(CHANNELS, GROUPS, 1, False, False, False).double()
    (feature,) = random_levels((40, 60), CHANNELS, (8,))
    pyramid = batch_pyramid([[feature]], [(40, 60)], (40, 60), (8,))
    expected = block.same.norm(block.same.conv(feature[None])).relu()
    torch.testing.assert_close(block(pyramid).features[0], expected)


def test_legacy_differs_only_where_offsets_do():
    """Both have the same parameters; with one level there are no neighbours, so no difference."""
    resized, legacy = encoder(), encoder(offsets="legacy")
    legacy.load_state_dict(resized.state_dict())
    single = batch_pyramid([random_levels((64, 64), CHANNELS, (8,))], [(64, 64)], (64, 64), (8,))
    several = batch_pyramid([random_levels((64, 64), CHANNELS)], [(64, 64)], (64, 64))
    with torch.no_grad():
        torch.testing.assert_close(resized(single).features, legacy(single).features)
        difference = resized(several).features[1] - legacy(several).features[1]
    assert difference.abs().max() > 0.1


@pytest.mark.parametrize("direction", [(1.0, 0.0), (0.0, -1.0), (0.6, 0.8)])
def test_an_offset_points_to_the_same_place_at_all_levels(direction):
    """The features are the pixels' positions in the image, and all offsets are d pixels.

    All three convolutions then read values that differ by d · stride from those without offsets.
    """
    strides, level = (8, 16, 32), 1
    distance = 1.0
    block = DynamicEncoderBlock(4, 1).double()
    with torch.no_grad():
        for branch in (block.coarser, block.same, block.finer):
            branch.conv.weight.zero_()
            branch.conv.weight[:, :, 1, 1] = torch.eye(4)
        block.offset.bias[0:18:2] = distance * direction[0]
        block.offset.bias[1:18:2] = distance * direction[1]
        block.offset.bias[18:] = 100.0  # modulation 1
    features = []
    for stride in strides:
        # pixel centres in pixels of the image
        place = (torch.arange(512 // stride, dtype=torch.float64) + 0.5) * stride
        y, x = torch.meshgrid(place, place, indexing="ij")
        features.append(torch.stack([y, x, y, x]))
    pyramid = batch_pyramid([features], [(512, 512)], (512, 512), strides)

    with torch.no_grad():
        sampling = block._sampling(pyramid, level)
        read = {name: getattr(block, name).convolve(*given) for name, given in sampling.items()}
    shift = distance * torch.tensor(direction * 2, dtype=torch.float64) * strides[level]
    # the stride-2 convolution is centred at the upper left pixel of each 2×2 block
    sources = {"finer": features[0][:, ::2, ::2], "same": features[1], "coarser": features[2]}
    for name, source in sources.items():
        moved = (read[name][0] - source)[:, 4:-4, 4:-4]
        torch.testing.assert_close(moved, shift[:, None, None].expand_as(moved))


def test_initial_values():
    block = DynamicEncoderBlock(CHANNELS, GROUPS)
    assert not block.offset.weight.any()
    assert not block.offset.bias.any()
    bound = 1 / (9 * CHANNELS) ** 0.5
    for branch in (block.coarser, block.same, block.finer):
        assert branch.conv.weight.abs().max() <= bound
        assert branch.conv.weight.std() > bound / 3
        assert not branch.conv.bias.any()
    scale = DynamicEncoderBlock(1024, GROUPS).scale
    assert 0.008 < scale.weight.std() < 0.012 and not scale.bias.any()


def test_size_of_a_block():
    """1.92 M parameters at 256 channels: three convolutions and norms, offsets, scale, DyReLU."""
    parameters = sum(p.numel() for p in DynamicEncoderBlock(256, 16).parameters())
    convolutions = 3 * (256 * 256 * 9 + 256 + 2 * 256)
    offsets, scale = 27 * 256 * 9 + 27, 256 + 1
    dyrelu = 256 * 64 + 64 + 64 * 1024 + 1024
    assert parameters == convolutions + offsets + scale + dyrelu == 1_917_276


def test_shapes_and_memory_are_kept():
    pyramid = batch_pyramid(
        [random_levels((50, 70), CHANNELS, dtype=torch.float32)], [(50, 70)], (64, 128)
    )
    out = dynamic_encoder(CHANNELS, num_blocks=2)(pyramid)
    assert out.strides == pyramid.strides
    assert torch.equal(out.image_sizes, pyramid.image_sizes)
    for found, given in zip(out.features, pyramid.features, strict=True):
        assert found.shape == given.shape
        assert found.dtype == given.dtype
        assert found.is_contiguous(memory_format=torch.channels_last)


def test_residual_blocks_are_added_to_their_input():
    levels = random_levels((45, 70), CHANNELS, STRIDES[:3])
    pyramid = batch_pyramid([levels], [(45, 70)], (64, 96), STRIDES[:3], garbage=10.0)
    model = dynamic_encoder(CHANNELS, num_blocks=2, residual=True).double()
    shaken = shake(model.blocks)
    for found, wanted in zip(model(pyramid).features, pyramid.masked().features, strict=True):
        torch.testing.assert_close(found, wanted)  # the scales are 0 at first
    expected = pyramid.masked()
    for scale, block in zip(model.residual_scales, shaken, strict=True):
        torch.nn.init.uniform_(scale)
        added = block(expected).features
        scale = scale[:, None, None]
        expected = expected.with_features(
            [x + scale * y for x, y in zip(expected.features, added, strict=True)]
        )
    out = model(pyramid)
    for found, wanted in zip(out.features, expected.features, strict=True):
        torch.testing.assert_close(found, wanted)
    sum(feature.sum() for feature in out.features).backward()
    assert all(scale.grad.any() for scale in model.residual_scales)


def test_checkpointed_residual_blocks_keep_no_outputs():
    kept = {}
    for residual in (False, True):
        model = dynamic_encoder(CHANNELS, num_blocks=2, residual=residual, checkpoint_blocks=True)
        levels = random_levels((64, 64), CHANNELS, STRIDES[:3], torch.float32)
        pyramid = batch_pyramid([levels], [(64, 64)], (64, 64), STRIDES[:3])
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
            model.train()(pyramid)
        kept[residual] = len(saved)
    assert kept[True] <= kept[False]


def test_identity_encoder_only_masks():
    levels = random_levels((40, 50), CHANNELS)
    out = IdentityEncoder()(batch_pyramid([levels], [(40, 50)], (64, 64), garbage=5.0))
    expected = batch_pyramid([levels], [(40, 50)], (64, 64))
    torch.testing.assert_close(out.features, expected.features, rtol=0, atol=0)


def test_config_reaches_the_encoder():
    cfg = small_config(
        DYNAMIC_ENCODER__NUM_BLOCKS=3,
        DYNAMIC_ENCODER__NUM_GROUPS=8,
        DYNAMIC_ENCODER__OFFSETS="legacy",
    )
    model = build_encoder(cfg)
    assert len(model.blocks) == 3
    assert model.blocks[0].same.norm.num_groups == 8
    assert not model.masks_padding
    assert isinstance(build_encoder(small_config(ENCODER="IdentityEncoder")), IdentityEncoder)
    assert set(ENCODER_REGISTRY._obj_map) >= {"DynamicEncoder", "IdentityEncoder"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offsets": "cropped"}, "ENCODER.OFFSETS is 'cropped'"),
        ({"channels": 24}, "NUM_GROUPS is 16; it must divide the number of channels, 24"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        dynamic_encoder(**{"channels": 32, "num_groups": 16, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_half_precision(dtype):
    """Norms and scale weights are computed in float32."""
    model = shake(dynamic_encoder(CHANNELS, num_blocks=2), 0.1).to(dtype)
    levels = [random_levels((50, 70), CHANNELS, dtype=dtype)]
    out = model(batch_pyramid(levels, [(50, 70)], (64, 128))).features
    exact = [[level.float() for level in levels[0]]]
    expected = model.float()(batch_pyramid(exact, [(50, 70)], (64, 128))).features
    for found, wanted in zip(out, expected, strict=True):
        assert found.dtype == dtype
        error = (found.float() - wanted).square().mean().sqrt()
        assert error < 0.1 * wanted.square().mean().sqrt()


def test_statistics_are_accurate_with_a_large_mean():
    """Mean 1000, standard deviation 1: a sum of squares in float32 would lose the deviation."""
    block = shake(DynamicEncoderBlock(CHANNELS, GROUPS))
    with torch.no_grad():
        for branch in (block.coarser, block.same, block.finer):
            branch.conv.weight.zero_()
            branch.conv.weight[:, :, 1, 1] = torch.eye(CHANNELS)
    levels = [[level + 1000 for level in random_levels((50, 70), CHANNELS, dtype=torch.float32)]]
    with torch.no_grad():
        out = block(batch_pyramid(levels, [(50, 70)], (64, 128))).features
        exact = [[level.double() for level in levels[0]]]
        expected = block.double()(batch_pyramid(exact, [(50, 70)], (64, 128))).features
    for found, wanted in zip(out, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=1e-2)


def test_dyrelu_starts_near_relu():
    """With zero coefficients, the slopes are 1 and 0 and the intercepts 0."""
    layer = DyReLU(CHANNELS)
    nn.init.zeros_(layer.expand.weight)
    nn.init.zeros_(layer.expand.bias)
    features = torch.randn(2, CHANNELS, 3, 4)
    out = layer(features, features.mean(dim=(2, 3)))
    torch.testing.assert_close(out, features.relu())
