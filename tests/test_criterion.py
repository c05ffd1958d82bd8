"""Set loss: values by hand, gradients, several processes, and boxes that are not valid."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from detectron2.utils import comm
from fvcore.nn import sigmoid_focal_loss
from helpers import set_costs, set_criterion, small_config
from reference.matching import cheapest_pairs, cost_matrix, focal, giou, l1
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, box_iou, generalized_box_iou_loss

from dynamic_detr import Prediction
from dynamic_detr.losses import SetCriterion, iou_and_generalized_iou
from dynamic_detr.losses.class_loss import VarifocalClassLoss

Target = tuple[Tensor, Tensor]


def target(labels=(), boxes=()) -> Target:
    return torch.tensor(labels, dtype=torch.int64), torch.as_tensor(boxes).float().reshape(-1, 4)


# One image, two queries; the object is the box of the second query, moved by half its width.
OBJECT = [0.4, 0.5, 0.2, 0.2]
BOXES = [[0.9, 0.9, 0.1, 0.1], [0.5, 0.5, 0.2, 0.2]]


def simple_prediction(logits: int = 2) -> Prediction:
    return Prediction(torch.zeros(1, 2, logits), torch.tensor([BOXES]))


def values(losses: dict[str, Tensor]) -> dict[str, float]:
    return {name: loss.item() for name, loss in losses.items()}


class TestByHand:
    def test_varifocal_of_the_true_boxes(self):
        """It is the focal loss: with the binary cross-entropy the boxes learn more slowly."""
        prediction = replace(simple_prediction(), true_logits=torch.tensor([[[0.0, 1.0]]]))
        losses = set_criterion(class_target="iou")([prediction], [target([1], [OBJECT])])
        p = 1 / (1 + math.exp(-1))
        expected = 2 * (0.25 * (1 - p) ** 2 * -math.log(p) + 0.75 * 0.25 * math.log(2))
        assert losses["loss_true_class"].item() == pytest.approx(expected)

    def test_varifocal_needs_the_focal_head(self):
        message = r"^MODEL\.SET_DETECTOR\.LOSS\.CLASS_TARGET 'iou' needs CLASS_HEAD 'focal'"
        with pytest.raises(ValueError, match=message):
            set_costs(class_target="iou", class_head="softmax")

    def test_weights(self):
        options = {"class_weight": 3.0, "l1_weight": 7.0, "giou_weight": 11.0}
        plain = set_criterion()([simple_prediction()], [target([1], [OBJECT])])
        weighted = set_criterion(**options)([simple_prediction()], [target([1], [OBJECT])])
        assert values(weighted) == pytest.approx(
            {
                "loss_class": plain["loss_class"].item() * 3 / 2,
                "loss_l1": plain["loss_l1"].item() * 7 / 5,
                "loss_giou": plain["loss_giou"].item() * 11 / 2,
            }
        )


@pytest.mark.parametrize("l1_format", ["cxcywh", "xyxy"])
def test_equals_the_reference(l1_format):
    """Two stages and three images, one empty, one with more objects than queries."""
    counts, queries, classes = [2, 0, 5], 4, 3

    def boxes(*shape):
        return torch.cat([torch.rand(*shape, 2), torch.rand(*shape, 2) * 0.4 + 0.05], dim=-1)

    predictions = [
        Prediction(torch.randn(3, queries, classes), boxes(3, queries)) for _ in range(2)
    ]
    targets = [(torch.randint(0, classes, (count,)), boxes(count)) for count in counts]
    losses = set_criterion(l1_format=l1_format)(predictions, targets)
    for prediction, suffix in zip(predictions, ("_0", ""), strict=True):
        expected = {"class": 0.0, "l1": 0.0, "giou": 0.0}
        for image, (labels, objects) in enumerate(targets):
            logits = prediction.pred_logits[image].tolist()
            found = prediction.pred_boxes[image].tolist()
            labels, objects = labels.tolist(), objects.tolist()
            pairs = []
            if objects:
                cost = cost_matrix(logits, found, labels, objects, "focal", l1_format)
                pairs = cheapest_pairs(cost)
            for query, entries in enumerate(logits):
                wanted = [labels[j] for i, j in pairs if i == query]
                for entry, logit in enumerate(entries):
                    expected["class"] += 2 * focal(logit, entry in wanted) / sum(counts)
            for i, j in pairs:
                expected["l1"] += 5 * l1(found[i], objects[j], l1_format) / sum(counts)
                expected["giou"] += 2 * (1 - giou(found[i], objects[j])) / sum(counts)
        for name, value in expected.items():
            assert losses[f"loss_{name}{suffix}"].item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("class_head", ["focal", "softmax"])
@pytest.mark.parametrize("batch", [1, 3])
def test_batches_without_any_object(class_head, batch):
    """The class loss is positive; the gradient of the boxes is zero."""
    logits = torch.randn(batch, 4, 2 + (class_head == "softmax"), requires_grad=True)
    boxes = torch.rand(batch, 4, 4, requires_grad=True)
    losses = set_criterion(class_head=class_head)([Prediction(logits, boxes)], [target()] * batch)
    sum(losses.values()).backward()
    assert losses["loss_class"] > 0
    assert losses["loss_l1"] == losses["loss_giou"] == 0
    assert logits.grad.any()
    assert not boxes.grad.any()


def test_empty_images_count_in_the_class_loss_only():
    prediction = Prediction(torch.zeros(2, 2, 2), torch.tensor([BOXES] * 2))
    with_empty = set_criterion()([prediction], [target([1], [OBJECT]), target()])
    alone = set_criterion()([simple_prediction()], [target([1], [OBJECT])])
    assert with_empty["loss_l1"].item() == pytest.approx(alone["loss_l1"].item())
    assert with_empty["loss_giou"].item() == pytest.approx(alone["loss_giou"].item())
    four_negatives = 2 * 4 * 0.75 * 0.25 * math.log(2)
    expected = alone["loss_class"].item() + four_negatives
    assert with_empty["loss_class"].item() == pytest.approx(expected)


class TestSeveralProcesses:
    @pytest.fixture
    def two_processes(self, monkeypatch):
        """Simulate two processes; the test sets the sums of the other one."""
        additions = []

        def all_reduce(sums: Tensor) -> None:
            sums += torch.tensor(additions.pop(0))

        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
        return additions

    @pytest.mark.parametrize("class_head", ["focal", "softmax"])
    def test_mean_over_processes_is_the_loss_of_the_whole_batch(self, two_processes, class_head):
        """DistributedDataParallel averages the gradients."""
        classes = 2 + (class_head == "softmax")
        logits, boxes = torch.randn(2, 3, classes), torch.rand(2, 3, 4) * 0.4 + 0.1
        targets = [target([0, 1], [OBJECT, BOXES[0]]), target()]
        # divisor of the class loss on each process: objects, or sum of the class weights
        totals = [2.0, 0.0] if class_head == "focal" else [2 * 1 + 0.1, 3 * 0.1]
        loss = set_criterion(class_head=class_head)

        def process(images, *other):
            two_processes[:] = [other]
            part = Prediction(logits[images], boxes[images])
            return loss([part], targets[images])

        first = process(slice(0, 1), 0.0, totals[1])
        second = process(slice(1, 2), 2.0, totals[0])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(comm, "get_world_size", lambda: 1)
            whole = loss([Prediction(logits, boxes)], targets)
        for name, value in whole.items():
            mean = (first[name] + second[name]).item() / 2
            assert mean == pytest.approx(value.item(), rel=1e-5), name

    def test_fewer_objects_than_processes(self, two_processes):
        """With one object on two processes, the divisor is ½."""
        two_processes[:] = [(0.0, 0.0)]
        losses = set_criterion()([simple_prediction()], [target([1], [OBJECT])])
        assert losses["loss_l1"].item() == pytest.approx(2 * 5 * 0.1)

    def test_no_object_anywhere(self, two_processes):
        two_processes[:] = [(0.0, 0.0)]
        losses = set_criterion()([simple_prediction()], [target()])
        assert losses["loss_l1"] == 0
        assert losses["loss_class"].isfinite()

    def test_every_process_joins_the_reduction(self, two_processes):
        """A process whose images are empty joins too."""
        two_processes[:] = [(0.0, 0.0)]
        stages = [simple_prediction(3), simple_prediction(3)]
        set_criterion(class_head="softmax")(stages, [target()])
        assert not two_processes  # one reduction for all stages


class TestBadBoxes:
    @pytest.mark.parametrize("query", [0, 1], ids=["unmatched", "matched"])
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("class_head", ["focal", "softmax"])
    def test_boxes_that_are_not_finite(self, query, bad, class_head):
        prediction = simple_prediction(2 + (class_head == "softmax"))
        prediction.pred_boxes[0, query] = bad
        losses = set_criterion(class_head=class_head)([prediction], [target([1], [OBJECT])])
        assert not sum(losses.values()).isfinite()

    def test_all_predictions_are_nan(self):
        prediction = simple_prediction()
        prediction.pred_boxes.fill_(torch.nan)
        prediction.pred_logits.fill_(torch.nan)
        losses = set_criterion()([prediction], [target([1, 0], [OBJECT, OBJECT])])
        assert all(loss.isnan() for loss in losses.values())

    @pytest.mark.parametrize(
        "box",
        [
            [0.5, 0.5, -0.2, -0.3],  # inverted
            [0.5, 0.5, 0.0, 0.0],
            [0.4, 0.5, 0.0, 0.2],
            [0.5, 0.5, 1e-30, 1e-30],
            [1e6, -1e6, 1e3, 1e3],
            [0.5, 0.5, 6e3, 6e3],
        ],
        ids=str,
    )
    @pytest.mark.parametrize("size", [0.2, 1 / 1333])
    @pytest.mark.parametrize("class_target", ["one", "iou"])
    def test_degenerate_boxes_give_finite_losses_and_gradients(self, box, size, class_target):
        boxes = torch.tensor([[box, box]], requires_grad=True)
        logits = torch.zeros(1, 2, 2, requires_grad=True)
        losses = set_criterion(class_target=class_target)(
            [Prediction(logits, boxes)], [target([1], [[0.4, 0.5, size, size]])]
        )
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
        assert boxes.grad.isfinite().all()
        assert 0 <= losses["loss_giou"].item() <= 2 * 2 + 1e-4


class TestGradients:
    """Gradients against a loss written stage by stage, with fvcore's focal loss."""

    @staticmethod
    def plain(class_loss: str, predictions, targets, matches) -> Tensor:
        """Return the sum of all losses; `matches` are (queries, objects) by stage and image."""
        objects = max(sum(len(labels) for labels, _ in targets), 1)
        total = 0.0
        for prediction, pairs in zip(predictions, matches, strict=True):
            logits, boxes = prediction.pred_logits, prediction.pred_boxes
            classes = torch.full(logits.shape[:2], logits.shape[2] - (class_loss == "softmax"))
            ious = torch.zeros(logits.shape[:2])
            for image, (queries, found) in enumerate(pairs):
                labels, wanted = targets[image]
                classes[image, queries] = labels[found]
                box, wanted = boxes[image, queries], wanted[found]
                corners = [box_convert(b, "cxcywh", "xyxy") for b in (box, wanted)]
                overlap = iou_and_generalized_iou(*corners)[1]
                ious[image, queries] = box_iou(*corners).diag().detach()
                total += 5 * (box - wanted).abs().sum() / objects
                total += 2 * (1 - overlap).sum() / objects
            if class_loss == "softmax":
                weight = torch.tensor([1.0] * (logits.shape[2] - 1) + [0.1])
                costs = F.cross_entropy(
                    logits.flatten(0, 1), classes.flatten(), weight, reduction="sum"
                )
                total += 2 * costs / max(weight[classes].sum().item(), 1)
            else:
                one_hot = F.one_hot(classes, logits.shape[2] + 1)[..., :-1].float()
                costs = sigmoid_focal_loss(logits, one_hot, 0.25, 2)
                if class_loss == "varifocal":
                    quality = ious[..., None].expand_as(logits)
                    varifocal = F.binary_cross_entropy_with_logits(
                        logits, quality, weight=quality, reduction="none"
                    )
                    costs = torch.where(one_hot > 0, varifocal, costs)
                total += 2 * costs.sum() / objects
        return total

    @pytest.mark.parametrize("class_loss", ["focal", "varifocal", "softmax"])
    @pytest.mark.parametrize("counts", [[2, 0, 6], [1], [0, 0]], ids=str)
    def test_equal_the_plain_loss(self, class_loss, counts):
        stages, queries, classes = 3, 4, 5
        shape = (stages, len(counts), queries)
        logits = (torch.randn(*shape, classes + (class_loss == "softmax")) * 3).requires_grad_()
        boxes = (torch.rand(*shape, 4) * 0.4 + 0.1).requires_grad_()
        predictions = [Prediction(*pair) for pair in zip(logits, boxes, strict=True)]
        targets = [
            (torch.randint(0, classes, (count,)), torch.rand(count, 4) * 0.4 + 0.1)
            for count in counts
        ]
        loss = set_criterion(
            class_head="softmax" if class_loss == "softmax" else "focal",
            class_target="iou" if class_loss == "varifocal" else "one",
        )
        total = sum(loss(predictions, targets).values())
        found = torch.autograd.grad(total, (logits, boxes))

        labels, wanted = (torch.cat(part) for part in zip(*targets, strict=True))
        costs = loss.matcher.pair_costs(logits, boxes, labels, wanted, counts)
        matches = [
            [linear_sum_assignment(cost.T.numpy()) for cost in costs[:, stage].split(counts)]
            for stage in range(stages)
        ]
        expected = self.plain(class_loss, predictions, targets, matches)
        torch.testing.assert_close(total, expected)
        if sum(counts):
            grads = torch.autograd.grad(expected, (logits, boxes))
            torch.testing.assert_close(found, grads, rtol=1e-4, atol=1e-6)
        else:
            assert not found[1].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("class_head", ["focal", "softmax"])
def test_logits_that_are_not_finite(bad, class_head):
    prediction = simple_prediction(2 + (class_head == "softmax"))
    prediction.pred_logits[0, 0, 0] = bad
    losses = set_criterion(class_head=class_head)([prediction], [target([1], [OBJECT])])
    assert not losses["loss_class"].isfinite()


def test_half_precision_predictions_give_float32_losses():
    prediction = Prediction(torch.zeros(1, 2, 2).bfloat16(), torch.tensor([BOXES]).bfloat16())
    losses = set_criterion()([prediction], [target([1], [OBJECT])])
    assert all(loss.dtype == torch.float32 for loss in losses.values())


@pytest.mark.parametrize("class_head", ["focal", "softmax"])
def test_true_boxes_have_a_class_loss(class_head):
    """The classes of the true boxes are known without matching; the padding has no influence."""
    targets = [target([1, 0, 2], [OBJECT] * 3), target(), target([2], [OBJECT])]
    classes = 3 + (class_head == "softmax")
    logits = torch.randn(3, 3, classes, requires_grad=True)
    prediction = Prediction(torch.randn(3, 5, classes), torch.rand(3, 5, 4), true_logits=logits)
    losses = set_criterion(class_head=class_head)([prediction, prediction], targets)
    assert list(losses)[3::4] == ["loss_true_class_0", "loss_true_class"]
    true, labels = logits[[0, 0, 0, 2], [0, 1, 2, 0]], torch.tensor([1, 0, 2, 2])
    if class_head == "softmax":
        expected = F.cross_entropy(true, labels, reduction="sum")
    else:
        one_hot = F.one_hot(labels, 3).float()
        expected = sigmoid_focal_loss(true, one_hot, alpha=0.25, gamma=2, reduction="sum")
    for name in ("loss_true_class_0", "loss_true_class"):
        torch.testing.assert_close(losses[name], 2 * expected / 4)
    losses["loss_true_class"].backward()
    assert not logits.grad[1].any()
    assert not logits.grad[2, 1:].any()


def test_noised_boxes_have_box_losses():
    """Each copy is compared with its object; an image counts as much as it has objects."""
    centers, sizes = 0.3 + 0.4 * torch.rand(8, 2), 0.1 + 0.2 * torch.rand(8, 2)
    true = torch.cat([centers, sizes], dim=1)
    targets = [
        target([1, 0], true[:2]),
        target(),
        target([2], true[2:3]),
        target([0] * 5, true[3:]),
    ]
    objects = torch.tensor([[0, 0, 1, 1], [-1] * 4, [2] * 4, [3, 4, 5, 7]])
    weights = torch.tensor([2 / 4, 0, 1 / 4, 5 / 4])[:, None]
    stages = [0.3 + 0.3 * torch.rand(4, 4, 4) for _ in range(2)]
    predictions = [
        Prediction(
            torch.randn(4, 6, 3),
            torch.rand(4, 6, 4),
            noised_boxes=noised.requires_grad_(),
            noised_objects=objects,
        )
        for noised in stages
    ]
    losses = set_criterion()(predictions, targets)
    names = ["loss_noised_l1_0", "loss_noised_giou_0", "loss_noised_l1", "loss_noised_giou"]
    assert [name for name in losses if "noised" in name] == names
    for noised, suffix in zip(stages, ("_0", ""), strict=True):
        l1 = F.l1_loss(noised, true[objects], reduction="none").sum(dim=2)
        corners = [box_convert(boxes, "cxcywh", "xyxy") for boxes in (noised, true[objects])]
        giou_loss = generalized_box_iou_loss(*corners)
        for name, loss in (
            (f"loss_noised_l1{suffix}", 5 * l1),
            (f"loss_noised_giou{suffix}", 2 * giou_loss),
        ):
            torch.testing.assert_close(losses[name], (weights * loss).sum() / 8)
    losses["loss_noised_l1"].backward()
    assert stages[1].grad[[0, 2, 3]].all()
    assert not stages[1].grad[1].any()


def test_true_boxes_of_a_batch_without_objects():
    prediction = Prediction(
        torch.randn(2, 5, 3),
        torch.rand(2, 5, 4),
        true_logits=torch.zeros(2, 0, 3),
        noised_boxes=torch.rand(2, 3, 4),
        noised_objects=torch.full((2, 3), -1),
    )
    losses = set_criterion()([prediction], [target(), target()])
    assert losses["loss_true_class"] == losses["loss_noised_l1"] == losses["loss_noised_giou"] == 0


def test_groups_of_stages_are_independent():
    """The target class of proposals is 0; stages may have different numbers of queries."""

    def boxes(*shape: int) -> Tensor:
        return torch.cat([torch.rand(*shape, 2), torch.rand(*shape, 2) * 0.4 + 0.05], dim=-1)

    def prediction(queries: int, is_proposal: bool = False) -> Prediction:
        return Prediction(torch.randn(2, queries, 3), boxes(2, queries), is_proposal)

    predictions = [prediction(9, True), prediction(6), prediction(4), prediction(6)]
    targets = [(torch.tensor([2, 1]), boxes(2)), (torch.tensor([1]), boxes(1))]
    one_class = [(torch.zeros_like(labels), objects) for labels, objects in targets]
    criterion = set_criterion()
    losses = criterion(predictions, targets)
    for suffix, alone in zip(("_proposals", "_0", "_1", ""), predictions, strict=True):
        wanted = one_class if alone.is_proposal else targets
        expected = criterion([Prediction(alone.pred_logits, alone.pred_boxes)], wanted)
        for name, value in expected.items():
            torch.testing.assert_close(losses[f"{name}{suffix}"], value)
    assert len(losses) == 3 * len(predictions)
    assert list(losses)[:3] == ["loss_class_proposals", "loss_l1_proposals", "loss_giou_proposals"]


def test_config_sets_the_class_target():
    costs = SetCriterion.from_config(small_config(LOSS__CLASS_TARGET="iou")).costs
    assert isinstance(costs.class_loss, VarifocalClassLoss)
    assert costs == set_costs(class_target="iou")


def test_config_reaches_the_criterion():
    loss = SetCriterion.from_config(
        small_config(
            CLASS_HEAD="softmax",
            LOSS__CLASS_WEIGHT=1.0,
            LOSS__L1_WEIGHT=2.0,
            LOSS__GIOU_WEIGHT=3.0,
            LOSS__NO_OBJECT_WEIGHT=0.4,
            LOSS__L1_FORMAT="xyxy",
            LOSS__FOCAL_ALPHA=0.5,
            LOSS__FOCAL_GAMMA=1.5,
        )
    )
    assert loss.costs == set_costs(
        class_head="softmax",
        class_weight=1.0,
        l1_weight=2.0,
        giou_weight=3.0,
        no_object_weight=0.4,
        l1_format="xyxy",
        focal_alpha=0.5,
        focal_gamma=1.5,
    )
    assert loss.matcher.costs is loss.costs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_head": "sofmax"}, r"SET_DETECTOR\.CLASS_HEAD is 'sofmax'; it must be one of"),
        ({"focal_alpha": -1.0}, r"LOSS\.FOCAL_ALPHA is -1\.0; it must be a number >= 0 and <= 1"),
        ({"l1_format": "xywh"}, r"LOSS\.L1_FORMAT is 'xywh'; it must be one of"),
        ({"giou_weight": -2}, r"LOSS\.GIOU_WEIGHT is -2; it must be a number >= 0"),
    ],
)
def test_wrong_options_raise_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        set_costs(**options)
    assert "\n" not in str(caught.value)
