"""Matcher: against all possible matchings and SciPy, and with predictions that are not finite."""

import os

import numpy as np
import pytest
import torch
from helpers import set_costs
from hypothesis import given
from hypothesis import strategies as st
from reference.matching import cheapest_pairs, cost_matrix, giou
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from dynamic_detr import Prediction
from dynamic_detr.losses import HungarianMatcher, iou_and_generalized_iou
from dynamic_detr.losses.assignment import PendingAssignment


def random_boxes(*shape: int) -> Tensor:
    center, size = torch.rand(*shape, 2), torch.rand(*shape, 2) * 0.5 + 0.02
    return torch.cat([center, size], dim=-1)


def random_prediction(batch: int, queries: int, logits: int) -> Prediction:
    return Prediction(torch.randn(batch, queries, logits) * 2, random_boxes(batch, queries))


Pairs = list[tuple[int, int]]


def by_image(found: PendingAssignment, stages: int, queries: int, counts: list[int]):
    """Return the (query, object of the image) pairs of each stage and image."""
    rows, objects = found.wait()
    assert rows.dtype == objects.dtype == torch.int64
    assert rows.shape == objects.shape == (stages, sum(min(n, queries) for n in counts))
    batch = len(counts)
    first = np.cumsum([0, *counts])
    pairs = [[[] for _ in counts] for _ in range(stages)]
    for stage in range(stages):
        images = []
        for row, item in zip(rows[stage].tolist(), objects[stage].tolist(), strict=True):
            assert row // queries // batch == stage
            image = row // queries % batch
            pairs[stage][image].append((row % queries, item - first[image]))
            images.append(image)
        assert images == sorted(images)
    return pairs


def match(
    matcher: HungarianMatcher,
    predictions: list[Prediction],
    labels: list[Tensor],
    boxes: list[Tensor],
) -> list[list[Pairs]]:
    counts = [len(label) for label in labels]
    found = matcher(
        torch.stack([p.pred_logits for p in predictions]),
        torch.stack([p.pred_boxes for p in predictions]),
        torch.cat(labels),
        torch.cat(boxes),
        counts,
    )
    return by_image(found, len(predictions), predictions[0].pred_boxes.shape[1], counts)


@pytest.mark.parametrize("class_head", ["focal", "softmax"])
@pytest.mark.parametrize("l1_format", ["cxcywh", "xyxy"])
def test_finds_the_cheapest_matching(class_head, l1_format):
    """Two stages; images with fewer objects than queries, as many, more, and none."""
    counts, queries, classes = [3, 5, 7, 0, 1], 5, 4
    predictions = [
        random_prediction(len(counts), queries, classes + (class_head == "softmax"))
        for _ in range(2)
    ]
    labels = [torch.randint(0, classes, (count,)) for count in counts]
    boxes = [random_boxes(count) for count in counts]
    matcher = HungarianMatcher(set_costs(class_head=class_head, l1_format=l1_format))
    matches = match(matcher, predictions, labels, boxes)
    assert len(matches) == 2
    for prediction, stage in zip(predictions, matches, strict=True):
        assert len(stage) == len(counts)
        for image, pairs in enumerate(stage):
            assert len(pairs) == min(queries, counts[image])
            cost = cost_matrix(
                prediction.pred_logits[image].tolist(),
                prediction.pred_boxes[image].tolist(),
                labels[image].tolist(),
                boxes[image].tolist(),
                class_head,
                l1_format,
            )
            if counts[image]:
                assert pairs == cheapest_pairs(cost)


def test_weights_of_the_costs():
    """One query has the better class, the other one the better box."""
    logits = torch.tensor([[[4.0], [-4.0]]])
    boxes = torch.tensor([[[0.2, 0.2, 0.1, 0.1], [0.7, 0.7, 0.3, 0.3]]])
    target = [torch.tensor([0])], [torch.tensor([[0.7, 0.7, 0.3, 0.3]])]
    prediction = [Prediction(logits, boxes)]
    by_class = HungarianMatcher(set_costs(class_weight=1, l1_weight=0, giou_weight=0))
    by_l1 = HungarianMatcher(set_costs(class_weight=0, l1_weight=1, giou_weight=0))
    by_giou = HungarianMatcher(set_costs(class_weight=0, l1_weight=0, giou_weight=1))
    for matcher, query in ((by_class, 0), (by_l1, 1), (by_giou, 1)):
        assert match(matcher, prediction, *target)[0][0] == [(query, 0)]


def test_stages_and_images_are_independent():
    predictions = [random_prediction(3, 6, 4) for _ in range(3)]
    labels, boxes = [torch.randint(0, 4, (2,)) for _ in range(3)], [random_boxes(2)] * 3
    matcher = HungarianMatcher(set_costs())
    together = match(matcher, predictions, labels, boxes)
    for stage, prediction in enumerate(predictions):
        for image in range(3):
            one = slice(image, image + 1)
            alone = Prediction(prediction.pred_logits[one], prediction.pred_boxes[one])
            expected = match(matcher, [alone], labels[one], boxes[one])[0][0]
            assert together[stage][image] == expected


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["logits", "boxes"])
@pytest.mark.parametrize("class_head", ["focal", "softmax"])
def test_queries_that_are_not_finite_are_matched_last(bad, where, class_head):
    prediction = random_prediction(1, 4, 3)
    broken = prediction.pred_logits if where == "logits" else prediction.pred_boxes
    broken[0, 1] = bad
    matcher = HungarianMatcher(set_costs(class_head=class_head))
    labels, boxes = [torch.tensor([0, 1])], [random_boxes(2)]
    pairs = match(matcher, [prediction], labels, boxes)[0][0]
    if where == "boxes" or class_head == "softmax" or bad != torch.inf:
        assert 1 not in [query for query, _ in pairs]
    broken.fill_(bad)
    pairs = match(matcher, [prediction], labels, boxes)[0][0]
    assert len({query for query, _ in pairs}) == 2
    assert sorted(item for _, item in pairs) == [0, 1]


def test_half_precision_predictions():
    """Costs are computed in float32."""
    exact = random_prediction(2, 5, 3)
    rounded = Prediction(exact.pred_logits.bfloat16(), exact.pred_boxes.bfloat16())
    widened = Prediction(rounded.pred_logits.float(), rounded.pred_boxes.float())
    labels, boxes = [torch.tensor([0, 1, 2])] * 2, [random_boxes(3)] * 2
    matcher = HungarianMatcher(set_costs())
    assert match(matcher, [rounded], labels, boxes) == match(matcher, [widened], labels, boxes)


class TestAssignment:
    @staticmethod
    def assert_equals_scipy(costs: Tensor, counts: list[int]) -> None:
        _, stages, queries = costs.shape
        found = by_image(PendingAssignment(costs, counts), stages, queries, counts)
        for stage in range(stages):
            for image, cost in enumerate(costs[:, stage].split(counts)):
                expected = linear_sum_assignment(cost.T.numpy())
                assert found[stage][image] == list(
                    zip(*map(np.ndarray.tolist, expected), strict=True)
                )

    @given(
        st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(1, 6), st.integers(1, 5)
    )
    def test_equals_scipy(self, counts, stages, queries):
        """Costs with and without ties; images may be empty or have more objects than queries."""
        costs = torch.randint(0, 3, (sum(counts), stages, queries)).float()
        self.assert_equals_scipy(costs, counts)
        self.assert_equals_scipy(torch.randn(costs.shape), counts)

    def test_costs_that_are_not_finite(self):
        """They are replaced by one large number."""
        logits, boxes = torch.randn(3, 2, 6, 4), random_boxes(3, 2, 6)
        logits[0, 0, 2], boxes[1, 1, 3, 0], boxes[2] = torch.nan, torch.inf, torch.nan
        counts = [4, 9]
        labels, objects = torch.randint(0, 4, (13,)), random_boxes(13)
        costs = HungarianMatcher(set_costs()).pair_costs(logits, boxes, labels, objects, counts)
        assert costs.isfinite().all()
        assert (costs[:, 2] == 1e6).all()
        self.assert_equals_scipy(costs, counts)

    def test_errors_of_the_workers_are_raised(self):
        search = PendingAssignment(torch.full((2, 1, 3), torch.nan), [2])
        with pytest.raises(ValueError, match="invalid numeric entries"):
            search.wait()

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_works_in_a_forked_process(self):
        costs = torch.randn(3, 2, 4)
        wanted = PendingAssignment(costs, [3]).wait()
        child = os.fork()
        if child == 0:
            found = PendingAssignment(costs, [3]).wait()
            os._exit(0 if all(map(torch.equal, found, wanted)) else 1)
        assert os.waitpid(child, 0)[1] == 0


class TestIoUs:
    @pytest.mark.parametrize(
        ("box", "other", "expected"),
        [
            ([0, 0, 2, 2], [0, 0, 2, 2], 1.0),
            ([0, 0, 2, 2], [1, 0, 3, 2], 1 / 3),  # the hull is the union
            ([0, 0, 1, 1], [1, 1, 2, 2], -0.5),  # touching at a corner: hull 4, union 2
            ([0, 0, 1, 1], [3, 0, 4, 1], -0.5),  # hull 4, union 2
            ([0, 0, 4, 4], [1, 1, 2, 2], 1 / 16),  # inside
            ([0, 0, 2, 2], [1, 1, 3, 3], 1 / 7 - 2 / 9),
        ],
    )
    def test_by_hand(self, box, other, expected):
        box, other = torch.tensor(box).double(), torch.tensor(other).double()
        assert iou_and_generalized_iou(box, other)[1].item() == pytest.approx(expected)
        assert iou_and_generalized_iou(other, box)[1].item() == pytest.approx(expected)

    def test_equals_the_reference(self):
        boxes, others = random_boxes(6).double(), random_boxes(4).double()
        corners, other_corners = (box_convert(b, "cxcywh", "xyxy") for b in (boxes, others))
        iou, found = iou_and_generalized_iou(corners[:, None], other_corners)
        expected = [[giou(a, b) for b in others.tolist()] for a in boxes.tolist()]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
        torch.testing.assert_close(iou, box_iou(corners, other_corners))

    @given(
        st.lists(
            st.floats(-1e6, 1e6, width=32).filter(lambda value: value == 0 or abs(value) > 1e-6),
            min_size=8,
            max_size=8,
        )
    )
    def test_ranges(self, numbers):
        """Boxes may be empty, inverted or far outside the image."""
        box, other = torch.tensor(numbers).view(2, 4).requires_grad_().unbind()
        iou, found = iou_and_generalized_iou(box, other)
        assert 0 <= iou.item() <= 1
        assert -1.001 <= found.item() <= 1.001

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_boxes_that_are_not_finite_raise_no_error(self, bad):
        other = torch.tensor([0.1, 0.1, 0.4, 0.4])
        for index in range(4):
            box = torch.tensor([0.2, 0.2, 0.6, 0.6])
            box[index] = bad
            found = iou_and_generalized_iou(box, other)[1].item()
            assert not abs(found) > 1.001
        assert iou_and_generalized_iou(torch.full((4,), torch.nan), other)[1].isnan()

    def test_gradient_of_distant_boxes(self):
        box = torch.tensor([0.0, 0.0, 1.0, 1.0], requires_grad=True)
        iou_and_generalized_iou(box, torch.tensor([5.0, 0.0, 6.0, 1.0]))[1].backward()
        assert box.grad[2] > 0
        assert box.grad.isfinite().all()
