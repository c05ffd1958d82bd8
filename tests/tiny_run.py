"""A training run of seconds: a few small images and a small detector."""

import json
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN, build_resnet_backbone
from PIL import Image

from dynamic_detr import add_dynamic_detr_config
from dynamic_detr.data.coco_json import register_json
from dynamic_detr.engine.trainer import Trainer

NAMES = ["dark", "light"]
# Options for two levels and an encoder; the backbone is registered in this module.
TWO_LEVELS = [
    *("MODEL.BACKBONE.NAME", "build_two_level_backbone", "MODEL.RESNETS.OUT_FEATURES"),
    *(["res2", "res3"], "MODEL.FPN.IN_FEATURES", ["res2", "res3"], "MODEL.FPN.OUT_CHANNELS", 64),
    *("MODEL.SET_DETECTOR.IN_FEATURES", ["p2", "p3"]),
    *("MODEL.SET_DETECTOR.ENCODER", "DynamicEncoder"),
    *("MODEL.DYNAMIC_ENCODER.NUM_BLOCKS", 1),
]
YAML = """
VERSION: 2
MODEL:
  META_ARCHITECTURE: DynamicDETR
  DEVICE: cpu
  WEIGHTS: ""
  BACKBONE: {NAME: build_resnet_backbone, FREEZE_AT: 0}
  RESNETS: {DEPTH: 18, NORM: GN, RES2_OUT_CHANNELS: 64, OUT_FEATURES: [res2]}
  SET_DETECTOR:
    NUM_CLASSES: 2
    HIDDEN_DIM: 64
    IN_FEATURES: [res2]
    ENCODER: IdentityEncoder
  DYNAMIC_DECODER:
    {NUM_QUERIES: 8, NUM_STAGES: 2, NUM_HEADS: 2, FFN_DIM: 32, DYNAMIC_DIM: 8, POOLING_SIZE: 3}
DATASETS: {TRAIN: [tiny_train], TEST: []}
DATALOADER: {NUM_WORKERS: 0, ASPECT_RATIO_GROUPING: False, FILTER_EMPTY_ANNOTATIONS: False}
INPUT: {FORMAT: RGB, MIN_SIZE_TRAIN: [64], MAX_SIZE_TRAIN: 64, MIN_SIZE_TEST: 64}
SOLVER:
  OPTIMIZER: ADAMW
  BASE_LR: 0.001
  IMS_PER_BATCH: 2
  MAX_ITER: 6
  STEPS: [4]
  WARMUP_ITERS: 2
  CHECKPOINT_PERIOD: 2
  CLIP_GRADIENTS: {ENABLED: True, CLIP_TYPE: full_model, CLIP_VALUE: 1.0}
SEED: 5
"""


@BACKBONE_REGISTRY.register()
def build_two_level_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    bottom_up = build_resnet_backbone(cfg, input_shape)
    return FPN(bottom_up, cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS)


def write_data(folder: Path, images: int = 6) -> tuple[Path, Path]:
    """Write images of 64×64 pixels with one or two rectangles each.

    Returns:
        Path of the JSON file, and folder of the images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    records, annotations = [], []
    for index in range(images):
        pixels = random.integers(100, 150, (64, 64, 3), dtype=np.uint8)
        for _ in range(1 + index % 2):
            x, y = (int(v) for v in random.integers(0, 32, 2))
            width, height = (int(v) for v in random.integers(16, 32, 2))
            light = int(random.integers(2))
            pixels[y : y + height, x : x + width] = 250 if light else 5
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": light + 1,
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
        Image.fromarray(pixels).save(folder / f"{index}.png")
        records.append({"id": index, "file_name": f"{index}.png", "width": 64, "height": 64})
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(NAMES)]
    path = folder / "boxes.json"
    data = {"images": records, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(data))
    return path, folder


def write_config(folder: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(YAML)
    return path


def make_config(folder: Path, *options) -> CfgNode:
    """Return the tiny configuration with data and output in ``folder``."""
    register_json("tiny_train", *write_data(folder / "data"), NAMES)
    cfg = get_cfg()
    add_dynamic_detr_config(cfg)
    cfg.merge_from_file(str(write_config(folder)))
    cfg.merge_from_list(["OUTPUT_DIR", str(folder / "output"), *options])
    return cfg


def losses_of(trainer: Trainer) -> dict[int, float]:
    """Return the total loss by iteration since the trainer started or resumed."""
    losses = trainer.storage.history("total_loss").values()
    return {i: value for value, i in losses if i >= trainer.start_iter}


def train(cfg: CfgNode, resume: bool = False) -> Trainer:
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer
