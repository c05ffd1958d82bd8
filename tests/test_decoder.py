"""Dynamic decoder: equality of a stage with a loop over queries, and gradients between stages."""

import math

import numpy as np
import pytest
import torch
from helpers import STRIDES, batch_pyramid, dynamic_decoder, random_levels, shake, small_config
from reference.decoder import decoder_stage, refine
from torch import nn

from dynamic_detr.decoders import build_decoder
from dynamic_detr.decoders.denoising import LOG_SCALE, SHIFT, noised_copies
from dynamic_detr.decoders.dynamic_interaction import ResidualInteraction
from dynamic_detr.decoders.dynamic_stage import apply_box_deltas

CHANNELS, QUERIES, HEADS, BINS, CANONICAL = 16, 5, 4, 3, 60
SMALL = {
    "channels": CHANNELS,
    "num_classes": 3,
    "num_queries": QUERIES,
    "num_stages": 2,
    "num_heads": HEADS,
    "ffn_dim": 24,
    "pooling_size": BINS,
    "canonical_size": CANONICAL,
    "dynamic_dim": 6,
}
IMAGE = (100, 136)


def decoder(**options) -> nn.Module:
    return dynamic_decoder(**{**SMALL, **options})


def pyramid_of(image_size=IMAGE, channels=CHANNELS, dtype=torch.float64, padded=(128, 192)):
    return batch_pyramid([random_levels(image_size, channels, dtype=dtype)], [image_size], padded)


@pytest.mark.parametrize("dynamic_filter", ["bottleneck", "residual", "single"])
@pytest.mark.parametrize("class_head", ["focal", "softmax"])
def test_stages_equal_the_reference(dynamic_filter, class_head):
    model = decoder(dynamic_filter=dynamic_filter, class_head=class_head).double()
    shake(model, 0.1)
    levels = random_levels(IMAGE, CHANNELS)
    with torch.no_grad():
        predictions = model(batch_pyramid([levels], [IMAGE], (128, 192), garbage=30.0))

    arrays = [level.numpy() for level in levels]
    queries = model.query_embed.weight.detach().numpy()
    boxes = model.initial_boxes.detach().numpy()
    assert len(predictions) == 2
    for stage, prediction in zip(model.stages, predictions, strict=True):
        weights = {name: value.numpy() for name, value in stage.state_dict().items()}
        queries, logits, boxes = decoder_stage(
            arrays, STRIDES, IMAGE, queries, boxes, weights, HEADS, BINS, CANONICAL
        )
        assert logits.shape == (QUERIES, 3 + (class_head == "softmax"))
        np.testing.assert_allclose(prediction.pred_logits[0], logits, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(prediction.pred_boxes[0], boxes, rtol=1e-8, atol=1e-8)
        assert not prediction.is_proposal


@pytest.mark.parametrize("checkpoint_stages", [False, True])
@pytest.mark.parametrize("classify", [False, True])
@pytest.mark.parametrize("copies", [0, 4])
def test_true_and_noised_boxes_are_processed_each_by_itself(checkpoint_stages, classify, copies):
    """The reference runs the stages on one box at a time, and never moves a true box."""
    model = decoder(
        checkpoint_stages=checkpoint_stages,
        dynamic_filter="residual",
        classify_true_boxes=classify,
        noised_boxes=copies,
    ).double()
    shake(model, 0.1)
    size = (64, 80)
    levels = [random_levels(size, CHANNELS) for _ in range(2)]
    pyramid = batch_pyramid(levels, [size] * 2, (64, 96), garbage=30.0)
    true_boxes = [torch.rand(3, 4).double() * 0.4 + 0.3, torch.rand(1, 4).double() * 0.4 + 0.3]
    with torch.no_grad():
        torch.manual_seed(1)
        predictions = model(pyramid, true_boxes)
        torch.manual_seed(1)
        noised, objects = noised_copies(true_boxes, copies) if copies else ((), None)
        for found, alone in zip(predictions, model(pyramid), strict=True):
            torch.testing.assert_close(found.pred_logits, alone.pred_logits)
            torch.testing.assert_close(found.pred_boxes, alone.pred_boxes)
            assert (found.true_logits is not None) == classify
            assert (found.noised_boxes is not None) == (copies > 0)
            assert alone.true_logits is alone.noised_boxes is None

    for image, boxes in enumerate(true_boxes):
        arrays = [level.numpy() for level in levels[image]]

        def reference(box, moves, arrays=arrays):
            query = model.query_embed.weight.detach().numpy().mean(axis=0, keepdims=True)
            for stage, prediction in zip(model.stages, predictions, strict=True):
                weights = {name: value.numpy() for name, value in stage.state_dict().items()}
                query, logits, moved = decoder_stage(
                    arrays, STRIDES, size, query, box, weights, HEADS, BINS, CANONICAL
                )
                box = moved if moves else box
                yield prediction, logits[0], moved[0]

        for i, box in enumerate(boxes.numpy()):
            for found, logits, _ in reference(box[None], moves=False) if classify else ():
                assert found.true_logits.shape == (2, 3, 3)
                np.testing.assert_allclose(
                    found.true_logits[image, i], logits, rtol=1e-8, atol=1e-8
                )
        for i, box in enumerate(noised[image].numpy() if copies else ()):
            for found, _, moved in reference(box[None], moves=True):
                assert found.noised_objects.equal(objects)
                assert found.noised_boxes.shape == (2, copies, 4)
                np.testing.assert_allclose(
                    found.noised_boxes[image, i], moved, rtol=1e-8, atol=1e-8
                )


def test_noised_boxes_are_near_the_true_boxes():
    true = torch.tensor([[0.5, 0.4, 0.2, 0.1], [0.2, 0.2, 0.3, 0.3]]).double()
    noised, objects = noised_copies([true[:1], true[:0], true[1:]], 4000)
    assert noised.shape == (3, 4000, 4)
    assert objects.tolist() == [[0] * 4000, [-1] * 4000, [1] * 4000]
    for copies, box in ((noised[0], true[0]), (noised[2], true[1])):
        shift = (copies - box)[:, :2] / box[2:]
        log_scale = (copies / box)[:, 2:].log()
        for values, limit in ((shift, SHIFT), (log_scale, LOG_SCALE)):
            assert limit * 0.99 < values.amax() <= limit
            assert -limit <= values.amin() < -0.99 * limit
            assert values.mean().abs() < 0.05 * limit


@pytest.mark.parametrize("count", [1, 3, 4, 11])
def test_copies_are_shared_among_the_objects(count):
    """In each image, the numbers of copies differ by at most one; on average they are equal."""
    boxes = [torch.rand(2, 4), torch.rand(0, 4), torch.rand(count, 4)]
    counts = torch.stack(
        [torch.bincount(noised_copies(boxes, 4)[1][2] - 2, minlength=count) for _ in range(400)]
    )
    assert counts.shape == (400, count)
    assert (counts.amax(1) - counts.amin(1) <= 1).all()
    torch.testing.assert_close(
        counts.double().mean(0), torch.full((count,), 4.0 / count).double(), rtol=0, atol=0.1
    )


def test_true_boxes_of_a_batch_without_objects():
    model = decoder(classify_true_boxes=True, noised_boxes=2)
    predictions = model(pyramid_of(dtype=torch.float32), [torch.zeros(0, 4)])
    assert [p.true_logits.shape for p in predictions] == [(1, 0, 3)] * 2
    assert [p.noised_boxes.shape for p in predictions] == [(1, 2, 4)] * 2


class TestBoxDeltas:
    def test_equal_the_reference(self):
        boxes = torch.rand(20, 4, dtype=torch.float64)
        deltas = torch.randn(20, 4, dtype=torch.float64) * 3
        expected = [refine(b.numpy(), d.numpy()) for b, d in zip(boxes, deltas, strict=True)]
        np.testing.assert_allclose(apply_box_deltas(boxes, deltas), expected, rtol=1e-12)

    def test_by_hand(self):
        box = torch.tensor([0.5, 0.4, 0.2, 0.1])
        deltas = torch.tensor([1.0, -2.0, math.log(2), math.log(0.5)])
        expected = torch.tensor([0.6, 0.3, 0.4, 0.05])
        torch.testing.assert_close(apply_box_deltas(box, deltas), expected)
        torch.testing.assert_close(apply_box_deltas(box, torch.zeros(4)), box)

    def test_are_not_clipped_to_the_image_but_growth_is(self):
        box = torch.tensor([0.9, 0.9, 0.5, 0.5])
        out = apply_box_deltas(box, torch.tensor([4.0, 4.0, 1000.0, 3.0]))
        torch.testing.assert_close(out[:2], torch.tensor([1.9, 1.9]))
        torch.testing.assert_close(out[2], torch.tensor(0.5 * 1e5 / 16))
        torch.testing.assert_close(out[3], torch.tensor(0.5 * math.exp(3)))


class TestBetweenStages:
    def test_boxes_start_as_the_whole_image(self):
        model = decoder()
        whole = torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(QUERIES, 4)
        torch.testing.assert_close(model.initial_boxes.data, whole)
        for stage in model.stages:
            nn.init.zeros_(stage.box_deltas.weight)
            nn.init.zeros_(stage.box_deltas.bias)
        for prediction in model(pyramid_of(dtype=torch.float32)):
            torch.testing.assert_close(prediction.pred_boxes[0], whole)

    def test_initial_boxes_get_gradients_from_the_first_stage_only(self):
        model = decoder()
        for which, expected in ((0, True), (1, False)):
            model.zero_grad()
            predictions = model(pyramid_of(dtype=torch.float32))
            predictions[which].pred_boxes.square().sum().backward()
            grad = model.initial_boxes.grad
            assert (grad is not None and bool(grad.any())) == expected

    @pytest.mark.parametrize("name", ["pred_boxes", "noised_boxes"])
    def test_boxes_pass_without_gradient_and_queries_with_it(self, name):
        model = decoder(noised_boxes=2)
        last = model(pyramid_of(dtype=torch.float32), [torch.full((1, 4), 0.4)])[1]
        getattr(last, name).sum().backward()
        first = model.stages[0]
        for parameter in [*first.box_branch.parameters(), *first.box_deltas.parameters()]:
            assert parameter.grad is None
        assert first.ffn[0].weight.grad.any()
        assert first.interaction.filters.weight.grad.any()
        assert model.query_embed.weight.grad.any()

    def test_initial_boxes_that_are_not_learned(self):
        model = decoder(learn_initial_boxes=False)
        assert "initial_boxes" not in dict(model.named_parameters())
        assert "initial_boxes" in model.state_dict()
        sum(p.pred_boxes.sum() for p in model(pyramid_of(dtype=torch.float32))).backward()


@pytest.mark.parametrize("channels", [64, 256])
@pytest.mark.parametrize("num_classes", [1, 4, 64, 80, 256, 2048])
def test_only_the_class_layer_has_the_prior(num_classes, channels):
    """No other parameter has the bias of the prior, for any number of classes."""
    options = {"channels": channels, "ffn_dim": 64, "num_classes": num_classes, "num_stages": 1}
    stage = decoder(**options).stages[0]
    torch.testing.assert_close(
        stage.class_logits.bias.sigmoid(), torch.full((num_classes,), 0.01), rtol=1e-5, atol=1e-7
    )
    for name, parameter in stage.named_parameters():
        if name != "class_logits.bias" and parameter.dim() == 1:
            assert parameter.abs().max() <= 1, name  # the bias of the prior is -4.6
    softmax = decoder(**options, class_head="softmax").stages[0]
    assert softmax.class_logits.bias.shape == (num_classes + 1,)
    assert not softmax.class_logits.bias.any()


def test_scores_start_near_the_prior():
    model = decoder(num_classes=80, channels=64)
    logits = model(pyramid_of(channels=64, dtype=torch.float32))[0].pred_logits
    assert 0.001 < logits.sigmoid().mean() < 0.05


def test_size_of_a_stage():
    """At the paper's sizes: 8.4 M for the filters, 3.2 M for the readout; 16.8 M for "single"."""
    stage = dynamic_decoder(256, 80, num_stages=1, num_queries=2).stages[0]
    count = {n: sum(p.numel() for p in m.parameters()) for n, m in stage.named_modules()}
    assert count["interaction.filters"] == (256 + 1) * 2 * 256 * 64
    assert count["interaction.readout.linear"] == (49 * 256 + 1) * 256
    options = {"num_stages": 1, "num_queries": 2, "dynamic_filter": "single"}
    single = dynamic_decoder(256, 80, **options).stages[0]
    assert sum(p.numel() for p in single.interaction.filters.parameters()) == 257 * 256 * 256


def test_residual_filters_start_as_a_layer_on_the_region():
    """At the start the query changes nothing; after one step it does."""
    interaction = ResidualInteraction(8, positions=4, dynamic_dim=3)
    queries, regions = torch.randn(2, 5, 8), torch.randn(2, 5, 4, 8)
    out = interaction(queries, regions)
    torch.testing.assert_close(out, interaction.readout(regions))
    out.square().sum().backward()
    scale = interaction.norm_branch.weight
    assert scale.grad.any()
    with torch.no_grad():
        scale.sub_(scale.grad)
        assert not torch.allclose(interaction(queries, regions), interaction(-queries, regions))


def test_dropout_is_for_training_only():
    model = decoder(dropout=0.5)
    pyramid = pyramid_of(dtype=torch.float32)
    noisy = [model(pyramid)[-1].pred_logits for _ in range(2)]
    assert not torch.equal(*noisy)
    model.eval()
    quiet = [model(pyramid)[-1].pred_logits for _ in range(2)]
    assert torch.equal(*quiet)


def test_config_reaches_the_decoder():
    model = build_decoder(
        small_config(
            NUM_CLASSES=7,
            DYNAMIC_DECODER__NUM_QUERIES=9,
            CLASS_HEAD="softmax",
            DYNAMIC_DECODER__NUM_STAGES=3,
            DYNAMIC_DECODER__NUM_HEADS=2,
            DYNAMIC_DECODER__FFN_DIM=40,
            DYNAMIC_DECODER__DROPOUT=0.25,
            DYNAMIC_DECODER__POOLING_SIZE=5,
            DYNAMIC_DECODER__SAMPLING_RATIO=1,
            DYNAMIC_DECODER__CANONICAL_SIZE=100,
            DYNAMIC_DECODER__DYNAMIC_DIM=12,
            DYNAMIC_DECODER__LEARN_INITIAL_BOXES=False,
        )
    )
    stage = model.stages[2]
    assert len(model.stages) == 3
    assert model.query_embed.weight.shape == (9, 64)
    assert stage.class_logits.out_features == 8
    assert stage.self_attention.num_heads == 2
    assert stage.ffn[0].out_features == 40
    assert stage.dropout.p == 0.25
    assert (stage.pooling_size, stage.sampling_ratio, stage.canonical_size) == (5, 1, 100)
    assert stage.interaction.readout.linear.in_features == 25 * 64
    assert stage.interaction.filters.out_features == 2 * 64 * 12
    assert not isinstance(model.initial_boxes, nn.Parameter)
    single = build_decoder(small_config(DYNAMIC_DECODER__DYNAMIC_FILTER="single"))
    assert single.stages[0].interaction.filters.out_features == 64 * 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "NUM_HEADS is 3; it must divide .*HIDDEN_DIM, which is 16"),
        ({"dynamic_filter": "double"}, "DYNAMIC_FILTER is 'double'; it must be one of"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        decoder(**options)
    assert "\n" not in str(caught.value)
