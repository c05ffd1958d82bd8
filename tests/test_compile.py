"""Encoder and decoder are one graph each for torch.compile, whatever the true sizes; and nothing
between image and boxes asks the device for a value."""

import pytest
import torch
from helpers import batch_pyramid, random_image, random_levels, shake, small_config, small_model
from torch._dynamo.testing import CompileCounterWithBackend

from dynamic_detr import DynamicDETR, Pyramid
from dynamic_detr.decoders import DynamicDecoder
from dynamic_detr.encoders import DynamicEncoder

CHANNELS = 16
STRIDES = (4, 8)
PADDED = (32, 48)
BATCHES = ([(32, 48), (20, 31)], [(9, 48), (32, 17)])
SMALL = {"HIDDEN_DIM": 32, "NUM_QUERIES": 4, "ENCODER__NUM_GROUPS": 8, "DECODER__NUM_STAGES": 1}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def pyramids() -> list[Pyramid]:
    """Two batches of one padded size and different true sizes."""
    return [
        batch_pyramid(
            [random_levels(size, CHANNELS, STRIDES, torch.float32) for size in sizes],
            sizes,
            PADDED,
            STRIDES,
            garbage=1.0,
        )
        for sizes in BATCHES
    ]


def fresh(pyramid: Pyramid) -> Pyramid:
    """Without anything that was computed before."""
    return Pyramid(pyramid.features, pyramid.strides, pyramid.image_sizes)


@torch.no_grad()
def test_encoder_is_one_graph_for_all_true_sizes():
    model = shake(DynamicEncoder(CHANNELS, num_blocks=1, num_groups=4), 0.1).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for pyramid in pyramids():
        found = compiled(fresh(pyramid))
        for a, b in zip(found.features, model(fresh(pyramid)).features, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@torch.no_grad()
def test_decoder_is_one_graph_for_all_true_sizes():
    model = DynamicDecoder(
        CHANNELS, 3, num_queries=4, num_stages=2, ffn_dim=16, pooling_size=2, dynamic_dim=4
    )
    shake(model, 0.1).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for pyramid in pyramids():
        found = compiled(fresh(pyramid))
        for a, b in zip(found, model(fresh(pyramid)), strict=True):
            torch.testing.assert_close(a.pred_boxes, b.pred_boxes, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(a.pred_logits, b.pred_logits, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_detector_compiles_at_inference_only():
    model = shake(small_model(**SMALL), 0.01).eval()
    batch = [{"image": random_image(50, 64)}]
    wanted = model.predict(batch)[1][-1]
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_backend, model._inference = counter, None
    found = model.predict(batch)[1][-1]
    torch.testing.assert_close(found.pred_boxes, wanted.pred_boxes, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.pred_logits, wanted.pred_logits, rtol=1e-3, atol=1e-4)
    assert counter.frame_count == 1
    model.train()._predict(batch)
    assert counter.frame_count == 1


def test_config_chooses_the_backend():
    assert DynamicDETR.from_config(small_config())["compile_backend"] is None
    cfg = small_config(INFERENCE__COMPILE=True)
    assert DynamicDETR.from_config(cfg)["compile_backend"] == "inductor"


def test_the_network_asks_for_no_value():
    """Tensors of the device "meta" have none: whoever asks, fails."""
    model = small_model().eval().to("meta")
    sizes, predictions = model.predict([{"image": random_image(60, 90)}])
    assert sizes == [(60, 90)]
    assert predictions[-1].pred_boxes.shape == (1, 32, 4)
