"""The random crops of the DETR family, as Detectron2's mapper applies them."""

from pathlib import Path

import numpy as np
import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from dynamic_detr import add_dynamic_detr_config
from dynamic_detr.data.augmentation import build_mapper
from dynamic_detr.data.mapper import seeded

HEIGHT, WIDTH = 240, 320


@pytest.fixture
def cfg() -> CfgNode:
    """DETR's crops and sizes, a quarter as large."""
    cfg = get_cfg()
    add_dynamic_detr_config(cfg)
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TRAIN = (120, 200)
    cfg.INPUT.MAX_SIZE_TRAIN = 333
    cfg.INPUT.CROP_BRANCH.ENABLED = True
    cfg.INPUT.CROP_BRANCH.RESIZE = [100, 125, 150]
    cfg.INPUT.CROP_BRANCH.SIZE = [96, 150]
    return cfg


def draw(mapper: DatasetMapper, seed: int) -> list[T.Transform]:
    """Return the transforms of an image of HEIGHT × WIDTH, without flips and identities."""
    with seeded(seed, 0):
        found = mapper.augmentations(T.AugInput(np.zeros((HEIGHT, WIDTH, 3), np.uint8))).transforms
    wanted = (T.ResizeTransform, T.CropTransform)
    return [transform for transform in found if isinstance(transform, wanted)]


@pytest.mark.parametrize("kind", ["relative", "relative_range"])
def test_a_crop_has_a_pixel_at_least(cfg, kind):
    cfg.INPUT.CROP_BRANCH.ENABLED, cfg.INPUT.CROP.ENABLED = False, True
    cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = kind, [0.3, 0.3]
    mapper = build_mapper(cfg, is_train=True)
    for seed in range(20):
        with seeded(seed, 0):
            view = T.AugInput(np.zeros((1, 3000, 3), np.uint8))
            mapper.augmentations(view)
        assert min(view.image.shape) > 0


def test_half_of_the_images_are_cropped(cfg):
    mapper = build_mapper(cfg, is_train=True)
    draws = [draw(mapper, seed) for seed in range(200)]
    cropped = [found for found in draws if len(found) > 1]
    assert 80 <= len(cropped) <= 120
    short, sides = set(), []
    for first, crop, last in cropped:
        assert isinstance(crop, T.CropTransform)
        short.add(min(first.new_h, first.new_w))
        sides += [crop.w, crop.h]
        assert max(crop.x0 + crop.w - first.new_w, crop.y0 + crop.h - first.new_h) <= 0
        # then resized as all images are
        short_side, long_side = sorted((last.new_h, last.new_w))
        assert short_side in (120, 200) or long_side == 333
    assert short == {100, 125, 150}
    assert 96 <= min(sides) < 101 and 145 < max(sides) <= 150
    for found in draws:
        if len(found) == 1:
            assert found[0].new_h in (120, 200)


def test_boxes_follow_the_crop(cfg, tmp_path: Path):
    """The pixel values encode their positions."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack([x * 255 / WIDTH, y * 255 / HEIGHT, np.zeros_like(x)], axis=-1)
    Image.fromarray(pixels.round().astype(np.uint8)).save(tmp_path / "ramp.png")
    low, high = np.array([60, 40]), np.array([230, 160])
    box = {"bbox": [*low, *high], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 0}
    record = {"file_name": str(tmp_path / "ramp.png"), "height": HEIGHT, "width": WIDTH}
    mapper = build_mapper(cfg, is_train=True)
    clipped, lost = 0, 0
    for seed in range(40):
        with seeded(seed, 0):
            inputs = mapper({**record, "annotations": [box]})
        image = inputs["image"].float()
        if not len(inputs["instances"]):
            lost += 1
            continue
        corners = inputs["instances"].gt_boxes.tensor[0]
        x0, y0, x1, y1 = corners.round().int().tolist()
        inside = image[:2, y0:y1, x0:x1].flatten(1)
        found_low = inside.min(dim=1).values.numpy() * [WIDTH / 255, HEIGHT / 255]
        found_high = inside.max(dim=1).values.numpy() * [WIDTH / 255, HEIGHT / 255]
        # the content of a box is the same up to two pixels, or cut off at an edge of the crop
        at_edge = np.array([min(x0, image.shape[2] - x1), min(y0, image.shape[1] - y1)]) == 0
        assert np.all((found_low > low - 6) & (found_high < high + 6))
        assert np.all((abs(found_low - low) < 6) | at_edge)
        assert np.all((abs(found_high - high) < 6) | at_edge)
        clipped += at_edge.any()
    assert clipped > 0 and lost < 10


def test_only_training_is_cropped(cfg):
    (resize,) = build_mapper(cfg, is_train=False).augmentations.augs
    assert isinstance(resize, T.ResizeShortestEdge)
    cfg.INPUT.CROP_BRANCH.ENABLED = False
    mapper = build_mapper(cfg, is_train=True)
    assert {len(draw(mapper, seed)) for seed in range(20)} == {1}
    cfg.INPUT.CROP.ENABLED = True
    assert {len(draw(build_mapper(cfg, is_train=True), seed)) for seed in range(20)} == {2}


def test_two_kinds_of_crops_are_one_too_many(cfg):
    cfg.INPUT.CROP.ENABLED = True
    with pytest.raises(ValueError, match=r"INPUT\.CROP\.ENABLED and INPUT\.CROP_BRANCH\.ENABLED"):
        build_mapper(cfg, is_train=True)
    build_mapper(cfg, is_train=False)
