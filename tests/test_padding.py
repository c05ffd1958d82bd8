"""What encoder and decoder say of an image does not depend on the batch that it came in."""

import pytest
import torch
from helpers import (
    STRIDES,
    batch_pyramid,
    dynamic_decoder,
    dynamic_encoder,
    random_image,
    random_levels,
    shake,
    small_model,
)
from torch import nn

from dynamic_detr import Prediction
from dynamic_detr.encoders import IdentityEncoder

CHANNELS = 16
SIZES = [(100, 136), (64, 190), (65, 1), (128, 64)]


def make_model(encoder: str = "dynamic", dynamic_filter: str = "bottleneck") -> nn.Sequential:
    """Two blocks and two stages in float64; offsets of about a pixel, boxes of every size."""
    if encoder == "identity":
        first = IdentityEncoder()
    else:
        first = dynamic_encoder(CHANNELS, num_blocks=2, offsets=encoder)
    second = dynamic_decoder(
        CHANNELS,
        num_classes=3,
        num_queries=6,
        num_stages=2,
        ffn_dim=24,
        dynamic_dim=6,
        canonical_size=60,
        dynamic_filter=dynamic_filter,
    )
    model = shake(nn.Sequential(first, second).double(), 0.15).eval()
    with torch.no_grad():  # across every edge of the image, and beyond it
        second.initial_boxes[:4, :2] = torch.tensor([[0, 0], [1, 1], [0.5, 1.1], [1.2, 0.5]])
        second.initial_boxes[:4, 2:] = torch.tensor([[0.3, 0.4], [0.5, 0.5], [2, 1], [0.8, 0.1]])
    return model


@torch.no_grad()
def predict(model, images, sizes, padded, garbage=0.0) -> list[Prediction]:
    return model(batch_pyramid(images, sizes, padded, garbage=garbage))


def assert_same(found: Prediction, wanted: Prediction) -> None:
    torch.testing.assert_close(found.pred_logits, wanted.pred_logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.pred_boxes, wanted.pred_boxes, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("image_size", SIZES, ids=str)
@pytest.mark.parametrize("encoder", ["dynamic", "identity"])
def test_one_image_padded_in_several_ways(image_size, encoder):
    model = make_model("resized" if encoder == "dynamic" else encoder)
    image = [random_levels(image_size, CHANNELS)]
    unpadded = predict(model, image, [image_size], image_size)
    for padded in ((128, 192), (image_size[0], 256), (129, 193)):
        for found, wanted in zip(
            predict(model, image, [image_size], padded), unpadded, strict=True
        ):
            assert_same(found, wanted)


@pytest.mark.parametrize("garbage", [0.0, 100.0, float("inf")], ids=["zeros", "noise", "NaN"])
@pytest.mark.parametrize("dynamic_filter", ["bottleneck", "single"])
def test_a_batch_is_its_images(garbage, dynamic_filter):
    """Images of several sizes together say what each says alone, whatever fills the padding."""
    model = make_model("resized", dynamic_filter)
    images = [random_levels(size, CHANNELS) for size in SIZES]
    together = predict(model, images, SIZES, (128, 192), garbage)
    for index, size in enumerate(SIZES):
        alone = predict(model, [images[index]], [size], size)
        for batch, single in zip(together, alone, strict=True):
            one = slice(index, index + 1)
            assert_same(Prediction(batch.pred_logits[one], batch.pred_boxes[one]), single)


def test_gradients_do_not_depend_on_the_padding_either():
    image = [random_levels((50, 70), CHANNELS)]
    grads = []
    model = make_model("resized")
    for padded in ((50, 70), (128, 128)):
        model.zero_grad()
        predictions = model(batch_pyramid(image, [(50, 70)], padded, garbage=10.0))
        sum(
            p.pred_logits.square().sum() + p.pred_boxes.square().sum() for p in predictions
        ).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-8, atol=1e-8)


def test_legacy_offsets_do_depend_on_it():
    """Which is why they are not the default; and the tests above can fail."""
    model = make_model("legacy")
    image = [random_levels((100, 136), CHANNELS)]
    few, many = (
        predict(model, image, [(100, 136)], padded)[-1] for padded in ((128, 192), (192, 320))
    )
    assert (few.pred_logits - many.pred_logits).abs().max() > 1e-3


def test_padding_is_empty_after_the_encoder():
    model = make_model("resized")
    images = [random_levels(size, CHANNELS) for size in SIZES]
    with torch.no_grad():
        out = model[0](batch_pyramid(images, SIZES, (128, 192), garbage=3.0))
    for level in range(len(STRIDES)):
        assert not out.features[level].masked_select(~out.valid_mask(level)).any()


def test_the_detector_pads_as_far_as_its_backbone_asks():
    """Images that share the padded size of a batch are predicted as they are alone."""
    model = small_model().eval()
    first, second = random_image(100, 90), random_image(128, 96)
    together = model.predict([{"image": first}, {"image": second}])[1][-1]
    alone = model.predict([{"image": first}])[1][-1]
    torch.testing.assert_close(together.pred_boxes[:1], alone.pred_boxes, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(together.pred_logits[:1], alone.pred_logits, rtol=1e-3, atol=1e-3)
    images = model._images([{"image": first}])
    assert images.tensor.shape == (1, 3, 128, 96)
    assert images.image_sizes == [(100, 90)]
