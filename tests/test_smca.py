"""SMCA: encoder and decoder against loops written from the paper, and the released names."""

import re

import convert_weights
import numpy as np
import pytest
import torch
from conftest import ROOT
from conversions import smca as conversion
from helpers import (
    batch_pyramid,
    defaults,
    model_without_memory,
    numpy_weights,
    random_levels,
    shake,
)
from published import smca as published_shapes
from published import weights_of
from reference import smca as reference
from torch import Tensor, nn

from dynamic_detr import Prediction, Pyramid
from dynamic_detr.decoders import SMCADecoder
from dynamic_detr.decoders.smca_layer import SMCADecoderLayer
from dynamic_detr.decoders.spatial_prior import SpatialPrior
from dynamic_detr.encoders import SMCAEncoder
from dynamic_detr.files.config_file import read_config

CONFIGS = ROOT / "configs" / "SMCA"


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
    """Return the levels of one image, and their pyramid with NaN in the padding."""
    strides = STRIDES[-num_levels:] if num_levels > 1 else (32,)
    levels = random_levels(SIZE, CHANNELS, strides, dtype)
    return levels, batch_pyramid([levels], [SIZE], padded, strides, garbage=float("inf"))


def arrays(levels: list[Tensor]) -> list[np.ndarray]:
    return [level.detach().numpy() for level in levels]


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
def test_encoder_equals_the_reference(num_levels, options):
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
def test_decoder_equals_the_reference(num_levels, options):
    model = shake(make_decoder(num_levels, **options).double())
    levels, pyramid = make_pyramid(num_levels, (90, 128))
    with torch.no_grad():
        found = model(pyramid.masked())
    beta = options.get("beta", 8.0)
    logits, boxes = reference.decoder(arrays(levels), numpy_weights(model), HEADS, beta)
    assert len(found) == len(logits) == 2
    for index, prediction in enumerate(found):
        np.testing.assert_allclose(prediction.pred_logits[0], logits[index], 2e-6, 2e-6)
        np.testing.assert_allclose(prediction.pred_boxes[0], boxes[index], 2e-6, 2e-6)


def run_reference(model: nn.Module, levels: list[np.ndarray]) -> list[np.ndarray]:
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
def test_gradients_equal_finite_differences_of_the_reference(make, options):
    """Each parameter and each level is moved along a random direction."""
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
                values = run_reference(model, arrays([feature[0] for feature in pyramid.features]))
                tensor.add_(direction, alpha=-sign * step)
            pairs = zip(values, weights, strict=True)
            losses.append(sum((v * w.numpy().reshape(v.shape)).sum() for v, w in pairs))
        wanted = (losses[0] - losses[1]) / (2 * step)
        np.testing.assert_allclose((grad * direction).sum(), wanted, 1e-4, 1e-5)


def test_initial_priors_of_all_heads_are_equal():
    """They have the shared centre and scale 1."""
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


def test_centres_far_outside_give_finite_softmaxes():
    """In half precision, for each level and for all levels together."""
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
        assert all(output.isfinite().all() for output in outputs(layer(pyramid.masked())))


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
def test_wrong_arguments_raise_one_line(make, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "millions"),
    [  # Tables 3 and 4
        ("smca_single_scale_R_50", 41.0),
        ("smca_R_50", 39.5),
        ("smca_R_50_no_scale_selection", 39.5),
        ("smca_R_50_3_intra", 37.9),
        ("smca_R_50_3_multi", 37.9),
        ("smca_R_50_5_intra", 39.5),
        ("smca_R_50_shared_ffn", 42.2),
        ("smca_R_50_shared_attention", 44.7),
        ("smca_R_50_nothing_shared", 47.3),
        ("smca_R_101", 58),
    ],
)
def test_parameters(config, millions):
    found = sum(
        parameter.numel()
        for parameter in model_without_memory(CONFIGS / f"{config}.yaml").parameters()
    )
    assert found / 1e6 == pytest.approx(millions, rel=0.02)


def test_optimizer():
    solver = read_config(str(CONFIGS / "smca_R_50.yaml"), []).SOLVER
    assert (solver.OPTIMIZER, solver.BASE_LR, solver.BACKBONE_MULTIPLIER) == ("ADAMW", 1e-4, 0.1)
    assert (solver.CLIP_GRADIENTS.CLIP_TYPE, solver.CLIP_GRADIENTS.CLIP_VALUE) == (
        "full_model",
        0.1,
    )
    decays = {solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM, solver.WEIGHT_DECAY_BIAS}
    assert decays == {1e-4} and solver.IMS_PER_BATCH == 16


def test_published_weights_fit_the_model():
    weights = weights_of(published_shapes())
    model = model_without_memory(CONFIGS / "smca_single_scale_R_50.yaml").state_dict()
    fitted = convert_weights.fit(conversion.convert(weights), model, num_classes=80)
    assert len(fitted) == len(weights) == len(model)
    del weights["transformer.decoder.layers.3.norm4.bias"]
    with pytest.raises(
        convert_weights.UserError, match="missing: decoder.layers.3.guide_norm.bias"
    ):
        convert_weights.fit(conversion.convert(weights), model, num_classes=80)
    weights["transformer.decoder.layers.1.point1.layers.0.bias"] = torch.empty(256, device="meta")
    with pytest.raises(convert_weights.UserError, match=r"layers.1.point1.* is left over"):
        conversion.convert(weights)


def test_layer_equals_the_released_one():
    """Without positions it is PyTorch's decoder layer with the log-prior as attention mask."""
    theirs = nn.TransformerDecoderLayer(CHANNELS, HEADS, 12, 0.0, batch_first=True).double()
    theirs.norm4 = nn.LayerNorm(CHANNELS)
    theirs.point2, theirs.point3 = (nn.Linear(CHANNELS, 2 * HEADS) for _ in range(2))
    shake(theirs.double())
    prefix = "transformer.decoder.layers.0."
    names = conversion.convert({prefix + k: v for k, v in theirs.state_dict().items()})
    ours = make_decoder(1).layers[0].double()
    ours.load_state_dict({k.removeprefix("decoder.layers.0."): v for k, v in names.items()})
    assert isinstance(ours, SMCADecoderLayer)
    _, pyramid = make_pyramid(1)
    memory, content = pyramid.table(), torch.randn(1, 4, CHANNELS).double()
    references, nowhere = torch.rand(1, 4, 2).double(), torch.zeros(()).double()
    grid = torch.tensor([[x, y] for y in range(3) for x in range(4)])  # 70 x 100 by stride 32
    z = theirs.norm4(content)
    centers = (references * torch.tensor([4, 3])).repeat(1, 1, HEADS) + theirs.point2(z)
    distances = (centers.view(1, 4, 1, HEADS, 2) - grid[:, None]).square()
    distances = (distances * theirs.point3(z).square().view(1, 4, 1, HEADS, 2)).sum(dim=-1)
    mask = (-distances / 8).permute(0, 3, 1, 2).flatten(0, 1)
    found = ours(content, nowhere, references, pyramid, nowhere)
    torch.testing.assert_close(found, theirs(content, memory, memory_mask=mask))
