"""Losses of a dense head: equality with loops over objects and positions in float64."""

import math

import pytest
import torch
from helpers import set_costs, set_criterion
from torch import Tensor
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from dynamic_detr.losses.dense import assign_positions, dense_losses
from dynamic_detr.structures import Prediction

CLASSES, SIDE = 3, 10


def grid_cells() -> Tensor:
    """Return the cells of a 10 × 10 map, (100, 4) cx, cy, w, h."""
    place = torch.arange(SIDE * SIDE)
    centers = torch.stack([place % SIDE, place // SIDE], dim=1) / SIDE + 0.5 / SIDE
    return torch.cat([centers, torch.full((SIDE * SIDE, 2), 1 / SIDE)], dim=1)


def dense(batch: int, dtype: torch.dtype = torch.float32) -> tuple[Prediction, list]:
    """Return a prediction with boxes near their cells, and targets.

    One object is smaller than a cell, and two objects are nearly equal.
    """
    torch.manual_seed(3)
    cells = grid_cells().expand(batch, -1, -1).to(dtype)
    noise = torch.randn(cells.shape).to(dtype)
    boxes = torch.cat(
        [cells[..., :2] + 0.05 * noise[..., :2], 0.25 * (0.4 * noise[..., 2:]).exp()], dim=-1
    )
    logits = torch.randn(batch, SIDE * SIDE, CLASSES).to(dtype)
    large, small = [0.5, 0.5, 0.42, 0.34], [0.22, 0.21, 0.01, 0.01]
    objects = torch.tensor([large, [0.52, 0.5, 0.42, 0.34], small, [0.8, 0.3, 0.22, 0.46]])
    targets = [(torch.tensor([0, 1, 2, 0]), objects), (torch.zeros(0).long(), objects[:0])]
    return Prediction(logits, boxes, is_proposal=True, cells=cells), (targets * batch)[:batch]


def loop_assignment(scores, boxes, cells, labels, objects) -> dict[int, tuple[int, float]]:
    """Return the object and the target score of each assigned position."""
    iou = box_iou(box_convert(objects, "cxcywh", "xyxy"), box_convert(boxes, "cxcywh", "xyxy"))
    fits, takers = {}, {}
    for t, label in enumerate(labels.tolist()):
        for n in range(len(boxes)):
            reach = [max(objects[t, d + 2].item(), cells[n, d + 2].item()) / 2 for d in (0, 1)]
            if all(abs(objects[t, d] - cells[n, d]) <= reach[d] for d in (0, 1)):
                fits[t, n] = scores[n, label].item() * max(iou[t, n].item(), 1e-4) ** 6
        mine = sorted((n for s, n in fits if s == t), key=lambda n: -fits[t, n])
        for n in mine[:13]:
            takers.setdefault(n, []).append(t)
    owner = {n: max(ts, key=lambda t: iou[t, n].item()) for n, ts in takers.items()}
    found = {}
    for n, t in owner.items():
        positions = [m for m in owner if owner[m] == t]
        best = max(fits[t, m] for m in positions)
        found[n] = t, fits[t, n] / best * max(iou[t, m].item() for m in positions)
    return found


def test_assignment_equals_the_reference():
    prediction, targets = dense(1, torch.float64)
    labels, objects = targets[0]
    inputs = prediction.pred_logits[0].sigmoid(), prediction.pred_boxes[0], prediction.cells[0]
    owner, wanted = assign_positions(*inputs, labels, objects.double())
    expected = loop_assignment(*inputs, labels, objects.double())
    assert {n for n in range(len(wanted)) if wanted[n] > 0} == set(expected)
    assert {t for t, _ in expected.values()} == {0, 1, 2, 3}
    for n, (t, score) in expected.items():
        assert owner[n] == t
        assert wanted[n].item() == pytest.approx(score, rel=1e-9)


@pytest.mark.parametrize("batch", [1, 3])
def test_losses_and_gradients_equal_the_reference(batch):
    prediction, targets = dense(batch)
    logits, boxes = prediction.pred_logits.requires_grad_(), prediction.pred_boxes.requires_grad_()
    total = sum(dense_losses(prediction, targets, set_costs()).values())
    found = torch.autograd.grad(total, (logits, boxes))

    classes = boxes_loss = weights = 0.0
    for image, (labels, objects) in enumerate(targets):
        inputs = logits[image].double(), boxes[image].double(), prediction.cells[image].double()
        with torch.no_grad():
            assigned = loop_assignment(inputs[0].sigmoid(), *inputs[1:], labels, objects.double())
        for n, position in enumerate(inputs[0]):
            t, score = assigned.get(n, (0, 0.0))
            for k, logit in enumerate(position):
                y, p = score * (len(labels) > 0 and labels[t].item() == k), logit.sigmoid()
                entropy = -(y * p.log() + (1 - y) * (1 - p).log())
                classes = classes + (y - p).abs() ** 2 * entropy
            if score:
                box, wanted = inputs[1][n], objects[t].double()
                corners = (box_convert(b[None], "cxcywh", "xyxy") for b in (box, wanted))
                l1, overlap = (box - wanted).abs().sum(), generalized_box_iou(*corners)[0, 0]
                boxes_loss = boxes_loss + score * (5 * l1 + 2 * (1 - overlap))
                weights += score
    expected = (2 * classes + boxes_loss) / weights
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad(expected, (logits, boxes))
    torch.testing.assert_close(found, grads, rtol=1e-4, atol=1e-6)


def test_without_objects_all_logits_are_negatives():
    prediction, targets = dense(2)
    logits, boxes = prediction.pred_logits.requires_grad_(), prediction.pred_boxes.requires_grad_()
    losses = dense_losses(prediction, [targets[1]] * 2, set_costs())
    assert losses["l1"] == losses["giou"] == 0
    sum(losses.values()).backward()
    assert (logits.grad > 0).all() and not boxes.grad.any()


@pytest.mark.parametrize("which", ["pred_logits", "pred_boxes"])
def test_predictions_that_are_not_finite(which):
    prediction, targets = dense(1)
    getattr(prediction, which)[0, 0, 0] = math.nan
    assert not sum(dense_losses(prediction, targets, set_costs()).values()).isfinite()


def test_criterion_returns_dense_and_stage_losses():
    prediction, targets = dense(2)
    stage = Prediction(torch.randn(2, 6, CLASSES), torch.rand(2, 6, 4))
    criterion = set_criterion()
    losses = criterion([prediction, stage], targets)
    wanted = dense_losses(prediction, targets, criterion.costs)
    expected = {f"loss_{name}_proposals": loss for name, loss in wanted.items()}
    expected |= criterion([stage], targets)
    assert list(losses) == list(expected)
    torch.testing.assert_close(losses, expected)
