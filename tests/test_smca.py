"""SMCA's encoder and decoder against loops written from the paper, and what they promise."""

import re

import numpy as np
import pytest
import torch
from helpers import batch_pyramid, defaults, random_levels, shake
from reference import smca as reference
from torch import Tensor, nn

from dynamic_detr import Prediction, Pyramid
from dynamic_detr.decoders import SMCADecoder
from dynamic_detr.decoders.spatial_prior import SpatialPrior
from dynamic_detr.encoders import SMCAEncoder

CHANNELS, HEADS, CLASSES = 8, 2, 3
STRIDES = (16, 32, 64)
SIZE = (70, 100)


def make_encoder(num_levels: int = 3, **options: object) -> SMCAEncoder:
    small = {"blocks": ["intra", "multi"], "num_heads": HEADS, "ffn_dim": 12, "dropout": 0.0}
    options = {**defaults("MODEL.SMCA_ENCODER"), **small, "checkpoint_blocks": False, **options}
    return SMCAEncoder(CHANNELS, num_levels, **options)


def make_decoder(num_levels: int = 3, **options: object) -> SMCADecoder:
    small = {"num_queries": 3, "num_layers": 2, "num_heads": HEADS, "ffn_dim": 12, "dropout": 0.0}
    small |= {"class_head": "focal", "checkpoint_layers": False}
    options = {**defaults("MODEL.SMCA_DECODER"), **small, **options}
    return SMCADecoder(CHANNELS, CLASSES, num_levels, **options)


def make_pyramid(
    num_levels: int = 3, padded: tuple[int, int] = SIZE, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], Pyramid]:
    """The levels of one image, and their pyramid with NaN in the padding."""
    strides = STRIDES[-num_levels:] if num_levels > 1 else (32,)
    levels = random_levels(SIZE, CHANNELS, strides, dtype)
    return levels, batch_pyramid([levels], [SIZE], padded, strides, garbage=float("inf"))


def arrays(levels: list[Tensor]) -> list[np.ndarray]:
    return [level.detach().numpy() for level in levels]


def numpy_weights(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in module.state_dict().items()}


def outputs(found: Pyramid | list[Prediction]) -> list[Tensor]:
    if isinstance(found, Pyramid):
        return list(found.features)
    return [tensor for p in found for tensor in (p.pred_logits, p.pred_boxes)]


ENCODERS = [
    (1, {"blocks": ["intra", "intra"]}),
    (1, {"shared": "nothing"}),
    (3, {}),
    (3, {"shared": "ffn"}),
    (3, {"shared": "attention"}),
    (2, {"shared": "nothing", "blocks": ["multi", "intra"]}),
]
DECODERS = [
    (1, {}),
    (1, {"scales": "single", "head_shared": True, "beta": 3.0}),
    (3, {}),
    (3, {"scale_selection": False, "scales": "single"}),
    (2, {"scales": "fixed", "head_shared": True}),
    (2, {"scale_selection": False, "scales": "fixed"}),
    (2, {"head_shared": True}),
]


@pytest.mark.parametrize(("num_levels", "options"), ENCODERS, ids=str)
def test_encoder_is_the_loop(num_levels, options):
    model = shake(make_encoder(num_levels, **options).double())
    levels, pyramid = make_pyramid(num_levels, (90, 128))
    with torch.no_grad():
        found = model(pyramid)
    blocks = [block.kind for block in model.blocks]
    wanted = reference.encoder(arrays(levels), numpy_weights(model), HEADS, blocks)
    for index, level in enumerate(wanted):
        features = found.features[index][0]
        np.testing.assert_allclose(
            features[:, : level.shape[1], : level.shape[2]], level, 2e-6, 2e-6
        )
        assert not features.masked_select(~found.valid_mask(index)[0]).any()


@pytest.mark.parametrize(("num_levels", "options"), DECODERS, ids=str)
def test_decoder_is_the_loop(num_levels, options):
    model = shake(make_decoder(num_levels, **options).double())
    levels, pyramid = make_pyramid(num_levels, (90, 128))
    with torch.no_grad():
        found = model(pyramid)
    beta = options.get("beta", 8.0)
    logits, boxes = reference.decoder(arrays(levels), numpy_weights(model), HEADS, beta)
    assert len(found) == len(logits) == 2
    for index, prediction in enumerate(found):
        np.testing.assert_allclose(prediction.pred_logits[0], logits[index], 2e-6, 2e-6)
        np.testing.assert_allclose(prediction.pred_boxes[0], boxes[index], 2e-6, 2e-6)


def loops(model: nn.Module, levels: list[np.ndarray]) -> list[np.ndarray]:
    weights = numpy_weights(model)
    if isinstance(model, SMCAEncoder):
        return reference.encoder(levels, weights, HEADS, [block.kind for block in model.blocks])
    return list(reference.decoder(levels, weights, HEADS, 8.0))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (make_encoder, {"shared": "nothing"}),
        (make_decoder, {"num_queries": 2}),
        (make_decoder, {"num_queries": 2, "scale_selection": False, "scales": "single"}),
    ],
    ids=["encoder", "decoder", "decoder, one softmax"],
)
def test_gradients_are_those_of_the_loops(make, options):
    """Each parameter and level is moved along a random direction: the loss of the loops changes
    by what the gradient says."""
    model = shake(make(2, **options).double())
    strides = STRIDES[1:]
    levels = random_levels((40, 90), CHANNELS, strides)
    pyramid = batch_pyramid([levels], [(40, 90)], (40, 90), strides)
    for feature in pyramid.features:
        feature.requires_grad_()
    found = outputs(model(pyramid))
    if isinstance(model, SMCADecoder):
        found = [torch.cat(found[::2]), torch.cat(found[1::2])]
    weights = [torch.randn_like(output) for output in found]
    tensors = [*model.parameters(), *pyramid.features]
    grads = torch.autograd.grad(found, tensors, weights)
    step = 1e-5
    for tensor, grad in zip(tensors, grads, strict=True):
        direction = torch.randn_like(tensor)
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor.add_(direction, alpha=sign * step)
                values = loops(model, arrays([feature[0] for feature in pyramid.features]))
                tensor.add_(direction, alpha=-sign * step)
            pairs = zip(values, weights, strict=True)
            losses.append(sum((v * w.numpy().reshape(v.shape)).sum() for v, w in pairs))
        wanted = (losses[0] - losses[1]) / (2 * step)
        np.testing.assert_allclose((grad * direction).sum(), wanted, 1e-4, 1e-5)


def test_a_batch_is_its_images():
    """Whatever fills the padding, and however much of it there is."""
    sizes = [(70, 100), (128, 30), (1, 200)]
    images = [random_levels(size, CHANNELS, STRIDES) for size in sizes]
    for options in ({}, {"scale_selection": False}):
        encoder = shake(make_encoder(shared="nothing").double())
        model = nn.Sequential(encoder, shake(make_decoder(**options).double())).eval()
        with torch.no_grad():
            together = outputs(
                model(batch_pyramid(images, sizes, (128, 256), STRIDES, float("inf")))
            )
            for index, size in enumerate(sizes):
                pyramid = batch_pyramid([images[index]], [size], size, STRIDES)
                alone = outputs(model(pyramid))
                torch.testing.assert_close(
                    [t[[index]] for t in together], alone, rtol=1e-6, atol=1e-6
                )


@pytest.mark.parametrize("num_levels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_parameter_learns(num_levels, dtype):
    """Also with activation checkpoints, which change nothing, and under autocast."""
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        encoder = make_encoder(num_levels, dropout=0.1, checkpoint_blocks=recompute)
        decoder = make_decoder(num_levels, dropout=0.1, checkpoint_layers=recompute)
        model = nn.Sequential(encoder, decoder).train()
        with torch.no_grad():  # the first step leaves what predicts offsets and scales at work
            shake(model, 0.1)
        _, pyramid = make_pyramid(num_levels, (90, 128), torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            predictions = model(pyramid)
        assert all(p.pred_boxes.dtype == torch.float32 for p in predictions)
        sum(output.square().sum() for output in outputs(predictions)).backward()
        named = dict(model.named_parameters())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in named.values())
        assert [name for name, p in named.items() if not p.grad.any()] == []
        grads.append([p.grad for p in named.values()])
    torch.testing.assert_close(*grads)


def test_priors_of_all_heads_start_alike():
    """Around the shared centre, with scale 1."""
    _, pyramid = make_pyramid(2, (128, 128))
    prior = SpatialPrior(CHANNELS, HEADS, "independent", beta=8.0)
    with torch.no_grad():
        found = prior(torch.randn(1, 4, CHANNELS), torch.full((1, 4, 2), 0.5), pyramid)
    for level, (log_prior, largest) in enumerate(found):
        rows, columns = pyramid.sizes(level)[0].tolist()
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        wanted = -((x - columns / 2) ** 2 + (y - rows / 2) ** 2) / 8
        valid = pyramid.valid_mask(level)[0, 0].flatten()
        for head in range(HEADS):
            log_weight = log_prior[0, head, 0] + largest[0, head, 0]
            torch.testing.assert_close(log_weight[valid], wanted.flatten())
            assert log_weight[~valid].isneginf().all()


def test_centres_far_away_leave_finite_softmaxes():
    """In half precision, on every level and over all of them."""
    _, pyramid = make_pyramid(3, (128, 128), torch.float32)
    prior = SpatialPrior(CHANNELS, HEADS, "independent", beta=8.0)
    with torch.no_grad():
        prior.offsets.bias.fill_(3e4)
        found = prior(torch.randn(1, 4, CHANNELS), torch.rand(1, 4, 2), pyramid)
    for log_prior, _ in found:
        assert log_prior.amax(dim=-1).eq(0).all()
        assert log_prior.half().softmax(dim=-1).isfinite().all()
    with torch.no_grad():
        layer = make_decoder(scale_selection=False, num_layers=1)
        layer.layers[0].co_attention.prior.offsets.bias.fill_(3e4)
        assert all(output.isfinite().all() for output in outputs(layer(pyramid)))


def test_compiled_is_the_same():
    """As one graph, with its gradients."""
    torch.compiler.reset()
    model = shake(nn.Sequential(make_encoder(2), make_decoder(2, num_layers=1)), 0.1).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    _, pyramid = make_pyramid(2, (90, 128), torch.float32)
    results = []
    for run in (compiled, model):
        model.zero_grad()
        fresh = Pyramid(pyramid.features, pyramid.strides, pyramid.image_sizes)
        found = outputs(run(fresh))
        sum(output.square().sum() for output in found).backward()
        results.append((found, [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (make_encoder, {"blocks": []}, "MODEL.SMCA_ENCODER.BLOCKS is []; it must be a list of at"),
        (make_encoder, {"blocks": ["inter"]}, "MODEL.SMCA_ENCODER.BLOCKS is ['inter']; it must be"),
        (make_encoder, {"shared": "some"}, "MODEL.SMCA_ENCODER.SHARED is 'some'; it must be one"),
        (make_encoder, {"num_heads": 3}, "MODEL.SMCA_ENCODER.NUM_HEADS is 3; it must divide"),
        (make_decoder, {"num_heads": 3}, "MODEL.SMCA_DECODER.NUM_HEADS is 3; it must divide"),
        (make_decoder, {"scales": "none"}, "MODEL.SMCA_DECODER.SCALES is 'none'; it must be one"),
        (make_decoder, {"beta": 0}, "MODEL.SMCA_DECODER.BETA is 0; it must be a number > 0"),
    ],
)
def test_wrong_arguments_are_one_line(make, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [make_encoder, make_decoder])
def test_another_number_of_levels_is_refused(make):
    with pytest.raises(ValueError, match="got 2 levels; wants num_levels, 3"):
        make(3).double()(make_pyramid(2)[1])
