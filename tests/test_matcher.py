"""The matcher against every possible matching and against SciPy one by one; also on predictions
that are no numbers."""

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

from dynamic_detr import Prediction
from dynamic_detr.losses import HungarianMatcher, generalized_iou
from dynamic_detr.losses.assignment import PendingAssignment
from dynamic_detr.structures import box_cxcywh_to_xyxy


def random_boxes(*shape: int) -> Tensor:
    center, size = torch.rand(*shape, 2), torch.rand(*shape, 2) * 0.5 + 0.02
    return torch.cat([center, size], dim=-1)


def random_prediction(batch: int, queries: int, logits: int) -> Prediction:
    return Prediction(torch.randn(batch, queries, logits) * 2, random_boxes(batch, queries))


Pairs = list[tuple[int, int]]


def by_image(found: PendingAssignment, stages: int, queries: int, counts: list[int]):
    """(query, object of the image) pairs of each stage and image: list[list[Pairs]]."""
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
def test_is_the_cheapest_of_all_matchings(class_head, l1_format):
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


def test_weights_choose_what_counts():
    """One object, two queries: one has the better class, the other the better box."""
    logits = torch.tensor([[[4.0], [-4.0]]])
    boxes = torch.tensor([[[0.2, 0.2, 0.1, 0.1], [0.7, 0.7, 0.3, 0.3]]])
    target = [torch.tensor([0])], [torch.tensor([[0.7, 0.7, 0.3, 0.3]])]
    prediction = [Prediction(logits, boxes)]
    by_class = HungarianMatcher(set_costs(class_weight=1, l1_weight=0, giou_weight=0))
    by_l1 = HungarianMatcher(set_costs(class_weight=0, l1_weight=1, giou_weight=0))
    by_giou = HungarianMatcher(set_costs(class_weight=0, l1_weight=0, giou_weight=1))
    for matcher, query in ((by_class, 0), (by_l1, 1), (by_giou, 1)):
        assert match(matcher, prediction, *target)[0][0] == [(query, 0)]


def test_stages_and_images_are_matched_on_their_own():
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
def test_what_is_no_number_is_matched_last(bad, where, class_head):
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
    """Costs are float32, whatever the predictions are."""
    exact = random_prediction(2, 5, 3)
    rounded = Prediction(exact.pred_logits.bfloat16(), exact.pred_boxes.bfloat16())
    widened = Prediction(rounded.pred_logits.float(), rounded.pred_boxes.float())
    labels, boxes = [torch.tensor([0, 1, 2])] * 2, [random_boxes(3)] * 2
    matcher = HungarianMatcher(set_costs())
    assert match(matcher, [rounded], labels, boxes) == match(matcher, [widened], labels, boxes)


class TestAssignment:
    @staticmethod
    def assert_is_scipy(costs: Tensor, counts: list[int]) -> None:
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
    def test_is_scipy_one_by_one_also_with_ties(self, counts, stages, queries):
        """Empty images, batches without any object, more objects than queries; whole numbers
        from 0 to 2 as costs tie everywhere."""
        costs = torch.randint(0, 3, (sum(counts), stages, queries)).float()
        self.assert_is_scipy(costs, counts)
        self.assert_is_scipy(torch.randn(costs.shape), counts)

    def test_costs_that_were_not_finite(self):
        """They become one large number, and so tie."""
        logits, boxes = torch.randn(3, 2, 6, 4), random_boxes(3, 2, 6)
        logits[0, 0, 2], boxes[1, 1, 3, 0], boxes[2] = torch.nan, torch.inf, torch.nan
        counts = [4, 9]
        labels, objects = torch.randint(0, 4, (13,)), random_boxes(13)
        costs = HungarianMatcher(set_costs()).pair_costs(logits, boxes, labels, objects, counts)
        assert costs.isfinite().all()
        assert (costs[:, 2] == 1e6).all()
        self.assert_is_scipy(costs, counts)

    def test_what_a_thread_raises_is_raised(self):
        search = PendingAssignment(torch.full((2, 1, 3), torch.nan), [2])
        with pytest.raises(ValueError, match="invalid numeric entries"):
            search.wait()

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_a_forked_process_has_threads_of_its_own(self):
        costs = torch.randn(3, 2, 4)
        wanted = PendingAssignment(costs, [3]).wait()
        child = os.fork()
        if child == 0:
            found = PendingAssignment(costs, [3]).wait()
            os._exit(0 if all(map(torch.equal, found, wanted)) else 1)
        assert os.waitpid(child, 0)[1] == 0


class TestGeneralizedIoU:
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
        assert generalized_iou(box, other).item() == pytest.approx(expected)
        assert generalized_iou(other, box).item() == pytest.approx(expected)

    def test_is_the_loop(self):
        boxes, others = random_boxes(6).double(), random_boxes(4).double()
        found = generalized_iou(box_cxcywh_to_xyxy(boxes)[:, None], box_cxcywh_to_xyxy(others))
        expected = [[giou(a, b) for b in others.tolist()] for a in boxes.tolist()]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))

    @given(
        st.lists(
            st.floats(-1e6, 1e6, width=32).filter(lambda value: value == 0 or abs(value) > 1e-6),
            min_size=8,
            max_size=8,
        )
    )
    def test_any_numbers_give_a_number_between_minus_one_and_one(self, numbers):
        """Boxes without area, inverted, far outside."""
        box, other = torch.tensor(numbers).view(2, 4).requires_grad_().unbind()
        found = generalized_iou(box, other)
        assert -1.001 <= found.item() <= 1.001

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_what_is_no_box_gives_nan_or_a_number_and_no_error(self, bad):
        other = torch.tensor([0.1, 0.1, 0.4, 0.4])
        for index in range(4):
            box = torch.tensor([0.2, 0.2, 0.6, 0.6])
            box[index] = bad
            found = generalized_iou(box, other).item()
            assert not abs(found) > 1.001
        assert generalized_iou(torch.full((4,), torch.nan), other).isnan()

    def test_gradient_pulls_distant_boxes_together(self):
        box = torch.tensor([0.0, 0.0, 1.0, 1.0], requires_grad=True)
        generalized_iou(box, torch.tensor([5.0, 0.0, 6.0, 1.0])).backward()
        assert box.grad[2] > 0
        assert box.grad.isfinite().all()
