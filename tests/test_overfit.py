"""The whole detector learns three photographs by heart, and COCO's evaluation says so."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data import transforms as T
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from helpers import small_config

from dynamic_detr.engine.evaluation import BoxEvaluator

IMAGES = (30, 144941, 213148)  # 2, 3 and 3 objects of 7 classes
SIDES = (128, 192)  # shortest and longest, in pixels


@pytest.fixture
def three_images(coco_cc: Path, tmp_path: Path):
    """A registered data set of three photographs with their boxes."""
    source = json.loads((coco_cc / "annotations" / "instances_train.json").read_text())
    source["images"] = [image for image in source["images"] if image["id"] in IMAGES]
    source["annotations"] = [a for a in source["annotations"] if a["image_id"] in IMAGES]
    assert len(source["images"]) == len(IMAGES)
    (tmp_path / "three.json").write_text(json.dumps(source))
    name = "three_images"
    register_coco_instances(name, {}, str(tmp_path / "three.json"), str(coco_cc / "train"))
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def dynamic() -> CfgNode:
    return small_config(
        DYNAMIC_DECODER__NUM_QUERIES=40,
        IN_FEATURES=["p3", "p4", "p5", "p6"],
        DYNAMIC_DECODER__NUM_STAGES=3,
        DYNAMIC_DECODER__DYNAMIC_DIM=32,
        DYNAMIC_DECODER__FFN_DIM=256,
    )


def deformable(**options: object) -> CfgNode:
    cfg = small_config(
        IN_FEATURES=["p3", "p4", "p5", "p6"],
        ENCODER="DeformableEncoder",
        DECODER="DeformableDecoder",
        DEFORMABLE_ENCODER__NUM_LAYERS=2,
        DEFORMABLE_ENCODER__FFN_DIM=256,
        DEFORMABLE_ENCODER__DROPOUT=0.0,
        DEFORMABLE_DECODER__NUM_QUERIES=40,
        DEFORMABLE_DECODER__NUM_LAYERS=3,
        DEFORMABLE_DECODER__FFN_DIM=256,
        DEFORMABLE_DECODER__DROPOUT=0.0,
        LEVELS__OUT_CHANNELS=64,
        LEVELS__NUM_EXTRA=1,
        **options,
    )
    cfg.MODEL.BACKBONE.NAME = "build_resnet_levels_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    return cfg


def deformable_two_stage() -> CfgNode:
    return deformable(DEFORMABLE_DECODER__REFINE_BOXES=True, DEFORMABLE_DECODER__TWO_STAGE=True)


def sparse_rcnn() -> CfgNode:
    cfg = dynamic()
    cfg.MODEL.SET_DETECTOR.ENCODER = "IdentityEncoder"
    cfg.MODEL.SET_DETECTOR.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.SET_DETECTOR.LOSS.L1_FORMAT = "xyxy"
    return cfg


def transformer(node: str, **options: object) -> dict[str, object]:
    """Keys of a small encoder or decoder of transformer layers."""
    keys = {"FFN_DIM": 256, "DROPOUT": 0.0, **options}
    return {f"{node}__{key}": value for key, value in keys.items()}


def detr() -> CfgNode:
    cfg = small_config(
        IN_FEATURES=["p4"],
        ENCODER="TransformerEncoder",
        DECODER="TransformerDecoder",
        CLASS_HEAD="softmax",
        LOSS__CLASS_WEIGHT=1.0,
        LEVELS__OUT_CHANNELS=64,
        LEVELS__NORM="",
        **transformer("TRANSFORMER_ENCODER", NUM_LAYERS=2),
        **transformer("TRANSFORMER_DECODER", NUM_LAYERS=3, NUM_QUERIES=40),
    )
    cfg.MODEL.BACKBONE.NAME = "build_resnet_levels_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4"]
    return cfg


def smca() -> CfgNode:
    cfg = small_config(
        IN_FEATURES=["p4", "p5", "p6"],
        ENCODER="SMCAEncoder",
        DECODER="SMCADecoder",
        LEVELS__OUT_CHANNELS=64,
        LEVELS__NORM="",
        LEVELS__NUM_EXTRA=1,
        **transformer("SMCA_ENCODER"),
        **transformer("SMCA_DECODER", NUM_LAYERS=3, NUM_QUERIES=40),
    )
    cfg.MODEL.BACKBONE.NAME = "build_resnet_levels_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4", "res5"]
    return cfg


SYSTEMS = [  # with the iterations and the learning rate
    (dynamic, 240, 2e-3),
    (sparse_rcnn, 240, 2e-3),
    (deformable, 240, 2e-3),
    (deformable_two_stage, 240, 2e-3),
    (smca, 240, 1e-3),
    (detr, 960, 1e-3),
]


@pytest.mark.long
@pytest.mark.parametrize("system, iterations, learning_rate", SYSTEMS)
def test_three_photographs_are_learned_by_heart(
    system, iterations, learning_rate, three_images, r18_weights, tmp_path
):
    """Behind a frozen ResNet-18, pretrained to res4; all else is trained from scratch."""
    cfg = system()
    cfg.MODEL.SET_DETECTOR.NUM_CLASSES = 80
    cfg.MODEL.RESNETS.NORM = "FrozenBN"
    cfg.MODEL.BACKBONE.FREEZE_AT = 5
    model = build_model(cfg)
    DetectionCheckpointer(model).load(str(r18_weights))
    resize = [T.ResizeShortestEdge(*SIDES)]
    train = DatasetMapper(is_train=True, augmentations=resize, image_format="RGB")
    records = get_detection_dataset_dicts([three_images])
    batch = [train(record) for record in records]

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, iterations, pct_start=0.1
    )
    model.train()
    for _ in range(iterations):
        loss = sum(model(batch).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()

    model.eval()
    look = DatasetMapper(is_train=False, augmentations=resize, image_format="RGB")
    loader = build_detection_test_loader(records, mapper=look)
    evaluator = BoxEvaluator(three_images, str(tmp_path))
    average_precision = inference_on_dataset(model, loader, evaluator)["bbox"]["AP"]
    assert average_precision > 90, average_precision
