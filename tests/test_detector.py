"""The meta-architecture: training, inference, precisions and construction."""

import math

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Instances
from helpers import random_image, shake, small_config, small_model, training_input
from torch import nn

from dynamic_detr import Prediction

LOSSES = {"loss_class", "loss_l1", "loss_giou"}
ONE_BOX = {"boxes": [[10, 12, 50, 40]], "classes": [1]}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A model that the tests of this module share, so it must not be trained."""
    torch.manual_seed(0)
    return shake(small_model(), 0.01)


def step(model: nn.Module, batch: list[dict]) -> dict[str, torch.Tensor]:
    """Run forward and backward, check that all values are finite, and return the losses."""
    model.train()
    model.zero_grad()
    losses = model(batch)
    assert all(loss.isfinite() for loss in losses.values()), losses
    sum(losses.values()).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf)
    assert norm.isfinite()
    assert norm > 0
    return losses


def infer(model: nn.Module, batch: list[dict]) -> list[Instances]:
    model.eval()
    return [output["instances"] for output in model(batch)]


def assert_detections(result: Instances, size: tuple[int, int], num_classes: int) -> None:
    assert result.image_size == size
    boxes = result.pred_boxes.tensor
    assert len(boxes) == len(result.scores) == len(result.pred_classes) > 0
    assert boxes.isfinite().all()
    assert (boxes >= 0).all()
    assert (boxes[:, [0, 2]] <= size[1]).all()
    assert (boxes[:, [1, 3]] <= size[0]).all()
    assert (result.scores[:-1] >= result.scores[1:]).all()  # best first
    assert ((result.scores >= 0) & (result.scores <= 1)).all()
    assert ((result.pred_classes >= 0) & (result.pred_classes < num_classes)).all()


class TestTraining:
    def test_losses_of_every_stage(self):
        losses = step(
            small_model(DYNAMIC_DECODER__NUM_STAGES=3), [training_input(64, 90, **ONE_BOX)]
        )
        assert set(losses) == LOSSES | {f"{name}_{stage}" for name in LOSSES for stage in (0, 1)}
        assert all(loss.dim() == 0 and loss.requires_grad for loss in losses.values())

    @pytest.mark.parametrize(
        ("boxes", "classes"),
        [
            ([], []),
            ([[20, 20, 21, 21]], [0]),
            ([[0, 0, 1, 1], [63, 63, 64, 64], [0, 0, 64, 64]], [0, 4, 2]),
            ([[i, i, i + 9, i + 7] for i in range(40)], [i % 5 for i in range(40)]),
            ([[10, 10, 30, 30]] * 3, [1, 1, 2]),
        ],
        ids=["none", "one pixel", "corners", "more than queries", "the same box"],
    )
    @pytest.mark.parametrize("class_head", ["focal", "softmax"])
    def test_strange_objects(self, boxes, classes, class_head):
        model = small_model(CLASS_HEAD=class_head, DYNAMIC_DECODER__NUM_QUERIES=16)
        batch = [training_input(64, 64, boxes, classes), training_input(48, 60)]
        losses = step(model, batch)
        if not boxes:
            assert losses["loss_l1"] == losses["loss_giou"] == 0

    @pytest.mark.parametrize("num_classes", [1, 80])
    @pytest.mark.parametrize("class_head", ["focal", "softmax"])
    def test_any_number_of_classes(self, num_classes, class_head):
        model = small_model(NUM_CLASSES=num_classes, CLASS_HEAD=class_head)
        step(model, [training_input(64, 64, [[5, 5, 40, 40]], [num_classes - 1])])
        (result,) = infer(model, [{"image": random_image(64, 64)}])
        assert_detections(result, (64, 64), num_classes)

    def test_targets_are_normalised_by_the_true_size(self, model):
        batch = [training_input(50, 100, [[10, 5, 30, 45]], [3]), training_input(64, 64)]
        targets = model._targets(batch)
        torch.testing.assert_close(targets[0][1], torch.tensor([[0.2, 0.5, 0.2, 0.8]]))
        assert targets[0][0].tolist() == [3]
        assert targets[1][1].shape == (0, 4)

    @pytest.mark.parametrize("unknown", [2, -1])
    def test_a_class_beyond_the_configured_is_one_line(self, unknown):
        model = small_model(NUM_CLASSES=2)
        objects = [[1, 1, 9, 9]], [unknown]
        batch = [training_input(64, 64, **ONE_BOX), training_input(64, 64, *objects)]
        batch[1]["file_name"] = "cat.jpg"
        message = rf"^cat\.jpg has an object of class {unknown}, .*NUM_CLASSES is 2\.$"
        with pytest.raises(ValueError, match=message):
            model.train()(batch)

    def test_weights_that_are_nan_give_losses_that_are_not_finite(self):
        """No error is raised: the trainer handles such losses."""
        model = small_model().train()
        with torch.no_grad():
            model.decoder.stages[0].box_deltas.bias.fill_(torch.nan)
        losses = model([training_input(64, 64, **ONE_BOX)])
        assert not sum(losses.values()).isfinite()


class TestInference:
    def test_contract(self, model):
        sizes = [(64, 100), (90, 70)]
        batch = [{"image": random_image(*size)} for size in sizes]
        for result, size in zip(infer(model, batch), sizes, strict=True):
            assert_detections(result, size, 5)
            assert len(result) == 100

    def test_results_are_in_the_wanted_size(self, model):
        image = random_image(64, 96)
        (small,) = infer(model, [{"image": image}])
        (large,) = infer(model, [{"image": image, "height": 128, "width": 288}])
        assert_detections(large, (128, 288), 5)
        scale = torch.tensor([3.0, 2.0, 3.0, 2.0])
        torch.testing.assert_close(large.pred_boxes.tensor, small.pred_boxes.tensor * scale)
        torch.testing.assert_close(large.scores, small.scores)

    def test_each_stage(self, model):
        sizes, predictions = model.eval().predict([{"image": random_image(64, 100)}])
        assert sizes == [(64, 100)]
        assert len(predictions) == 2
        for prediction in predictions:
            assert prediction.pred_logits.shape == (1, 32, 5)
            assert not prediction.pred_logits.requires_grad
            (result,) = model.to_instances(prediction, sizes)
            assert_detections(result, (64, 100), 5)

    def test_best_query_and_class_pairs_by_hand(self, model):
        logits = torch.full((1, 3, 5), -9.0)
        logits[0, 0, 4], logits[0, 2, 1], logits[0, 2, 3] = 1.0, 3.0, 0.0
        boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.1] * 4, [0.9, 0.5, 0.4, 0.5]]])
        (result,) = model.to_instances(Prediction(logits, boxes), [(100, 200)])
        assert result.pred_classes[:3].tolist() == [1, 4, 3]
        torch.testing.assert_close(result.scores[:3], torch.tensor([3.0, 1.0, 0.0]).sigmoid())
        clipped, inside = [140.0, 25.0, 200.0, 75.0], [80.0, 30.0, 120.0, 70.0]
        torch.testing.assert_close(
            result.pred_boxes.tensor[:3], torch.tensor([clipped, inside, clipped])
        )
        assert len(result) == 15  # all pairs, as they are fewer than 100

    @pytest.mark.parametrize(("threshold", "kept"), [(1.0, 4), (0.7, 4), (0.5, 3), (0.2, 2)])
    def test_non_maximum_suppression_by_hand(self, threshold, kept):
        """IoUs with the best box are 0.6 and 1/3; the fourth box has another class."""
        model = small_model(NUM_CLASSES=2, INFERENCE__NMS_THRESHOLD=threshold)
        logits = torch.full((1, 5, 2), -math.inf)
        logits[0, :3, 0], logits[0, 3, 1], logits[0, 4, 0] = torch.tensor([1.0, 3, 2]), 2.5, 9.0
        centers = [[0.6, 0.4], [0.5, 0.4], [0.7, 0.4], [0.5, 0.4], [torch.nan, 0.4]]
        boxes = torch.cat([torch.tensor([centers]), torch.full((1, 5, 2), 0.4)], dim=2)
        nothing = torch.full_like(boxes, torch.nan)
        prediction = Prediction(logits.repeat(2, 1, 1), torch.cat([boxes, nothing]))
        first, second = model.to_instances(prediction, [(50, 50)] * 2)
        found = first[first.scores > 0]
        assert found.scores.logit().tolist() == pytest.approx([3, 2.5, 2, 1][:kept], rel=1e-5)
        assert len(second) == 0

    def test_no_object_is_no_detection(self):
        model = small_model(CLASS_HEAD="softmax", NUM_CLASSES=2)
        logits = torch.tensor([[[2.0, 0.0, 9.0], [0.0, 3.0, 0.0]]])
        boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.2, 0.2]]])
        (result,) = model.to_instances(Prediction(logits, boxes), [(10, 10)])
        assert result.scores[0].item() == pytest.approx(math.exp(3) / (math.exp(3) + 2))
        assert result.pred_classes.tolist() == [1, 0]  # one detection per query

    @pytest.mark.parametrize("detections", [1, 7, 100])
    def test_number_of_detections(self, detections):
        cfg = small_config(DYNAMIC_DECODER__NUM_QUERIES=4)
        cfg.TEST.DETECTIONS_PER_IMAGE = detections
        (result,) = infer(build_model(cfg), [{"image": random_image(64, 64)}])
        assert len(result) == min(detections, 4 * 5)

    def test_boxes_without_area_are_left_out(self, model):
        """Boxes that are flat, inverted or outside the image."""
        logits = torch.arange(20.0).view(1, 4, 5)
        boxes = [[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0], [0.5, 0.5, -0.2, 0.2], [2, 0.5, 1, 1]]
        (result,) = model.to_instances(Prediction(logits, torch.tensor([boxes])), [(50, 50)])
        assert result.pred_classes.tolist() == [4, 3, 2, 1, 0]
        torch.testing.assert_close(
            result.pred_boxes.tensor, torch.tensor([[20.0, 20.0, 30.0, 30.0]]).expand(5, 4)
        )

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_boxes_that_are_not_finite_are_left_out(self, model, bad):
        logits, boxes = torch.zeros(1, 4, 5), torch.rand(1, 4, 4)
        boxes[0, 1, 2], logits[0, 2, 0] = bad, torch.nan
        (result,) = model.to_instances(Prediction(logits, boxes), [(50, 50)])
        assert len(result) == 2 * 5
        assert_detections(result, (50, 50), 5)

    def test_threads_do_not_matter(self, model):
        image = [{"image": random_image(64, 100)}]
        threads = torch.get_num_threads()
        found = []
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                found.append(model.eval().predict(image)[1][-1])
        finally:
            torch.set_num_threads(threads)
        torch.testing.assert_close(found[0].pred_boxes, found[1].pred_boxes, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found[0].pred_logits, found[1].pred_logits, rtol=1e-3, atol=1e-3)

    def test_images_are_padded_as_far_as_the_backbone_asks(self):
        """Two images of the same padded size get the same predictions together and alone."""
        model = small_model().eval()
        first, second = random_image(100, 90), random_image(128, 96)
        together = model.predict([{"image": first}, {"image": second}])[1][-1]
        alone = model.predict([{"image": first}])[1][-1]
        torch.testing.assert_close(together.pred_boxes[:1], alone.pred_boxes, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(
            together.pred_logits[:1], alone.pred_logits, rtol=1e-3, atol=1e-3
        )
        images = model._images([{"image": first}])
        assert images.tensor.shape == (1, 3, 128, 96)
        assert images.image_sizes == [(100, 90)]


class TestPrecision:
    def test_bfloat16_autocast(self):
        model = small_model()
        batch = [training_input(64, 90, **ONE_BOX), training_input(64, 64)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = step(model, batch)
        assert all(loss.dtype == torch.float32 for loss in losses.values())
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (result,) = infer(model, [{"image": random_image(64, 64)}])
        assert_detections(result, (64, 64), 5)
        assert result.pred_boxes.tensor.dtype == torch.float32

    def test_float64_stays_float64(self):
        model = small_model().double().eval()
        for prediction in model.predict([{"image": random_image(64, 64)}])[1]:
            assert prediction.pred_boxes.dtype == prediction.pred_logits.dtype == torch.float64


class TestConstruction:
    def test_state_dict_round_trip(self, model, tmp_path):
        torch.save(model.state_dict(), tmp_path / "model.pth")
        torch.manual_seed(5)
        other = small_model()
        image = [{"image": random_image(64, 64)}]
        (wanted,) = infer(model, image)
        other.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
        (found,) = infer(other, image)
        torch.testing.assert_close(found.pred_boxes.tensor, wanted.pred_boxes.tensor)
        torch.testing.assert_close(found.scores, wanted.scores)

    def test_statistics_of_the_input_are_not_in_the_checkpoint(self, model):
        assert not [name for name in model.state_dict() if name.startswith(("pixel", "criterion"))]

    def test_wrong_channels_are_one_line(self):
        cfg = small_config()
        cfg.MODEL.FPN.OUT_CHANNELS = 32
        with pytest.raises(
            ValueError, match=r"HIDDEN_DIM is 64, .*\[32\].* set MODEL\.FPN\.OUT_CHANNELS .* to 64"
        ):
            build_model(cfg)

    def test_unknown_levels_are_one_line(self):
        with pytest.raises(ValueError, match=r"IN_FEATURES names \['p9'\]; the backbone has"):
            small_model(IN_FEATURES=["p2", "p9"])

    @pytest.mark.parametrize("levels", [["p3", "p2"], ["p2", "p4"]])
    def test_levels_that_are_not_neighbours_are_one_line(self, levels):
        with pytest.raises(ValueError, match="expected neighbouring levels, fine to coarse, got"):
            small_model(IN_FEATURES=levels)
