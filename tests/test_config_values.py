"""Values of configuration keys: a wrong one raises one line that names the key."""

import argparse
import logging

import pytest
import yaml
from detectron2.config import get_cfg
from tiny_run import NAMES, register_json, write_config, write_data

from dynamic_detr import add_dynamic_detr_config, compat
from dynamic_detr.cli.arguments import build_parser, load_config
from dynamic_detr.config import KEYS
from dynamic_detr.detectron2_keys import RANGES
from dynamic_detr.engine.trainer import Trainer
from dynamic_detr.errors import UserError
from dynamic_detr.files.config_file import read_config

DETECTOR, DECODER, ENCODER = "MODEL.SET_DETECTOR", "MODEL.DYNAMIC_DECODER", "MODEL.DYNAMIC_ENCODER"
HUGE = "1" + 400 * "0"
WRONG = {
    f"{DETECTOR}.NUM_CLASSES": ["0", "-1", "1.5", "True", "None", HUGE],
    f"{DETECTOR}.CLASS_HEAD": ["sigmoid", "''", "None", "3"],
    f"{DETECTOR}.IN_FEATURES": ["[]", "['p2', 'p2']", "[2]", "p2", "None"],
    f"{DETECTOR}.HIDDEN_DIM": ["0", "-64"],
    f"{DETECTOR}.ENCODER": ["''", "None"],
    f"{DETECTOR}.LOSS.CLASS_TARGET": ["two", "None"],
    f"{DETECTOR}.LOSS.CLASS_WEIGHT": ["-1.0", "nan", "1e400"],
    f"{DETECTOR}.LOSS.FOCAL_ALPHA": ["1.5", "-0.1"],
    f"{DETECTOR}.LOSS.NO_OBJECT_WEIGHT": ["0.0", "-1.0"],
    f"{DETECTOR}.LOSS.L1_FORMAT": ["xywh"],
    f"{DETECTOR}.ACTIVATION_CHECKPOINT.ENCODER": ["1", "yes", "None"],
    f"{DETECTOR}.INFERENCE.CUDA_GRAPHS": ["-1", "True"],
    f"{DETECTOR}.INFERENCE.NMS_THRESHOLD": ["0.0", "1.5", "nan", "None"],
    f"{DECODER}.NUM_QUERIES": ["0", "-300", "2.5"],
    f"{DECODER}.NUM_STAGES": ["0"],
    f"{DECODER}.DROPOUT": ["1.0", "-0.1", "nan", "None"],
    f"{DECODER}.NOISED_BOXES": ["-1", "1.5"],
    f"{DECODER}.INITIAL_BOXES": ["random"],
    f"{ENCODER}.NUM_BLOCKS": ["0"],
    f"{ENCODER}.OFFSETS": ["absolute"],
    "SOLVER.OPTIMIZER": ["adamw", "LION", "None"],
    "SOLVER.BACKBONE_MULTIPLIER": ["-1.0"],
    "SOLVER.AMP.DTYPE": ["float32", "half"],
    "SOLVER.AMP.ENABLED": ["1", "None"],
    "SOLVER.EMA.DECAY": ["1.0", "-0.5", "nan"],
    "SOLVER.KEEP_CHECKPOINTS": ["1", "-2"],
    "SOLVER.MAX_SKIPPED_STEPS": ["0"],
    "SOLVER.MAX_ITER": ["0", "-5", "2.5", "None", HUGE, "many"],
    "SOLVER.BASE_LR": ["0.0", "-0.1", "nan", "1e400", "None", "fast"],
    "SOLVER.MOMENTUM": ["2.0", "1.0", "-0.9", "nan"],
    "SOLVER.NESTEROV": ["1"],
    "SOLVER.WEIGHT_DECAY": ["-0.1", "nan", "None"],
    "SOLVER.WEIGHT_DECAY_NORM": ["-0.1"],
    "SOLVER.WEIGHT_DECAY_BIAS": ["-0.1", "1e400"],
    "SOLVER.BIAS_LR_FACTOR": ["-1.0"],
    "SOLVER.GAMMA": ["0.0", "-0.1", "10.0"],
    "SOLVER.STEPS": ["(4, 2)", "(2, 2)", "(0,)", "(-1,)", "(1.5,)", "('a',)", "None", "3"],
    "SOLVER.WARMUP_ITERS": ["-1", "None"],
    "SOLVER.WARMUP_FACTOR": ["2.0", "-0.1"],
    "SOLVER.WARMUP_METHOD": ["quadratic"],
    "SOLVER.LR_SCHEDULER_NAME": ["StepLR", "None"],
    "SOLVER.CHECKPOINT_PERIOD": ["0", "-1"],
    "SOLVER.IMS_PER_BATCH": ["0", "-2", HUGE],
    "SOLVER.REFERENCE_WORLD_SIZE": ["-1"],
    "SOLVER.BASE_LR_END": ["-1.0", "5.0"],
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ["all"],
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": ["0.0", "-1.0", "nan"],
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": ["0.0", "-2.0", "nan"],
    "INPUT.MIN_SIZE_TRAIN": ["()", "(0,)", "(-5,)", "(64.5,)", "None", "('a',)", "(99999999,)"],
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ["random"],
    "INPUT.MAX_SIZE_TRAIN": ["0", "-1", HUGE],
    "INPUT.MIN_SIZE_TEST": ["-1", "None"],
    "INPUT.MAX_SIZE_TEST": ["0"],
    "INPUT.RANDOM_FLIP": ["both", "True"],
    "INPUT.CROP.TYPE": ["random"],
    "INPUT.CROP.SIZE": ["[0.9]", "[0.0, 0.5]", "[-1, 2]", "None"],
    "INPUT.FORMAT": ["rgb", "HSV", "None"],
    "INPUT.MASK_FORMAT": ["rle"],
    "INPUT.CROP_BRANCH.RESIZE": ["[]", "[600, 400]"],
    "INPUT.CROP_BRANCH.SIZE": ["[600, 384]", "[384]", "[0.5, 1]"],
    "DATALOADER.NUM_WORKERS": ["-1", "1000000", "None"],
    "DATALOADER.SAMPLER_TRAIN": ["Random"],
    "DATALOADER.REPEAT_THRESHOLD": ["-1.0", "2.0"],
    "DATALOADER.ASPECT_RATIO_GROUPING": ["None"],
    "DATASETS.TRAIN": ["(3,)", "None", "('',)"],
    "DATASETS.TEST": ["(None,)"],
    "MODEL.DEVICE": ["gpu", "cuda:x", "None", "''"],
    "MODEL.META_ARCHITECTURE": ["DynamicDeter", "None"],
    "MODEL.BACKBONE.NAME": ["resnet", "None"],
    "MODEL.BACKBONE.FREEZE_AT": ["-1", "9"],
    "MODEL.WEIGHTS": ["None"],
    "MODEL.PIXEL_MEAN": ["[1.0]", "[]", "['a', 'b', 'c']", "None", "[1.0, 2.0, nan]"],
    "MODEL.PIXEL_STD": ["[1.0]", "[0.0, 1.0, 1.0]", "[-1.0, 1.0, 1.0]", "None"],
    "MODEL.RESNETS.DEPTH": ["19", "0", "None"],
    "MODEL.RESNETS.NORM": ["BatchNorm", "None"],
    "MODEL.RESNETS.OUT_FEATURES": ["[]", "['res9']", "None"],
    "MODEL.RESNETS.RES2_OUT_CHANNELS": ["0", "256"],
    "MODEL.RESNETS.RES5_DILATION": ["3"],
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": ["[True]", "[1, 0, 0, 0]"],
    "MODEL.RESNETS.NUM_GROUPS": ["0"],
    "MODEL.FPN.OUT_CHANNELS": ["0"],
    "MODEL.FPN.FUSE_TYPE": ["max"],
    "MODEL.RETINANET.PRIOR_PROB": ["0.0", "1.0"],
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": ["2.0"],
    "TEST.EVAL_PERIOD": ["-1", "None"],
    "TEST.DETECTIONS_PER_IMAGE": ["0", "-1"],
    "TEST.AUG.MIN_SIZES": ["()", "(0,)"],
    "TEST.EXPECTED_RESULTS": ["[['bbox', 'AP', 1.0]]", "[3]", "[[1, 2, 3, 4]]", "None"],
    "SEED": ["-2", "99999999999", "None", "1.5"],
    "OUTPUT_DIR": ["''", "None", "3"],
    "VIS_PERIOD": ["-1"],
    # names that are not keys, and values of nodes
    "SOLVER": ["3", "None"],
    "MODEL.SET_DETECTOR": ["None"],
    "SOLVER.BASE_LR.X": ["1"],
    "SOLVER.NOTHING": ["1"],
    "SOLVER..MAX_ITER": ["1"],
    "": ["1"],
}
# Values that are wrong in combination with others: key, other options, value.
WRONG_TOGETHER = [
    ("SOLVER.MOMENTUM", ["SOLVER.OPTIMIZER", "SGD", "SOLVER.NESTEROV", "True"], "0.0"),
    ("INPUT.MIN_SIZE_TRAIN", ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"], "(64,)"),
    ("INPUT.MIN_SIZE_TRAIN", ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"], "(64, 32)"),
    ("INPUT.CROP.SIZE", ["INPUT.CROP.ENABLED", "True"], "[1.5, 0.5]"),
    ("INPUT.CROP.SIZE", ["INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", "absolute"], "[0.5, 9]"),
    ("INPUT.CROP.SIZE", ["INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", "absolute_range"]
     , "[9, 5]"),
    ("INPUT.CROP.ENABLED", ["INPUT.CROP_BRANCH.ENABLED", "True"], "True"),
    ("MODEL.PIXEL_MEAN", ["INPUT.FORMAT", "L"], "[1.0, 2.0, 3.0]"),
    ("TEST.PRECISE_BN.ENABLED", ["SOLVER.EMA.ENABLED", "True"], "True"),
    ("MODEL.MASK_ON", ["MODEL.META_ARCHITECTURE", "SetDetector"], "True"),
    ("MODEL.KEYPOINT_ON", ["MODEL.META_ARCHITECTURE", "DynamicDETR"], "True"),
    ("DATASETS.PROPOSAL_FILES_TRAIN", ["MODEL.LOAD_PROPOSALS", "True"], "('a', 'b')"),
]  # fmt: skip
RIGHT = [
    *("SOLVER.WEIGHT_DECAY_BIAS", "None", "SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", "0"),
    *("SOLVER.CLIP_GRADIENTS.NORM_TYPE", "1e999", "SOLVER.KEEP_CHECKPOINTS", "0", "SEED", "-1"),
    *("INPUT.MIN_SIZE_TRAIN", "[64, 80]", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"),
    *("INPUT.MIN_SIZE_TEST", "0", "INPUT.CROP.ENABLED", "True", "INPUT.CROP.SIZE", "[1, 0.5]"),
    *("TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 38.5, 0.2]]", "MODEL.DEVICE", "cuda:1"),
    *("SOLVER.GAMMA", "1.0", "SOLVER.MOMENTUM", "0.0", "MODEL.RESNETS.NORM", ""),
    *("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "MODEL.BACKBONE.FREEZE_AT", "5"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> argparse.Namespace:
    """Return valid arguments of a training run."""
    folder = tmp_path_factory.mktemp("tiny")
    register_json("tiny_train", *write_data(folder / "data"), NAMES)
    options = ["OUTPUT_DIR", str(folder / "output")]
    config = ["--config-file", str(write_config(folder)), "--num-gpus", "0"]
    return build_parser().parse_args([*config, *options])


def _error(args: argparse.Namespace, *options: str) -> str:
    try:
        load_config(argparse.Namespace(**{**vars(args), "opts": [*args.opts, *options]}))
    except UserError as error:
        return str(error)
    return ""


def test_wrong_values_are_one_line_that_names_the_key(tiny):
    tried, accepted, unnamed = 0, [], []
    for key, values in WRONG.items():
        for value in values:
            line = _error(tiny, key, value)
            tried += 1
            accepted += [] if line else [(key, value)]
            named = key.rpartition(".")[0] if key == "SOLVER.BASE_LR.X" else key
            unnamed += [] if named in line and "\n" not in line and len(line) < 600 else [line]
    assert (accepted, unnamed) == ([], []) and tried > 200


@pytest.mark.parametrize(("key", "others", "value"), WRONG_TOGETHER)
def test_wrong_combinations_name_the_key(tiny, key, others, value):
    line = _error(tiny, *others, key, value)
    assert f"{key} is " in line and "it must be" in line
    assert not _error(tiny)


def test_right_values_are_taken(tiny, caplog):
    caplog.set_level(logging.ERROR)
    assert _error(tiny, *RIGHT) == ""


def test_every_default_is_in_its_range():
    cfg = get_cfg()
    compat.add_newer_keys(cfg)
    add_dynamic_detr_config(cfg)
    for name, wanted in {**{key.name: key.range for key in KEYS}, **RANGES}.items():
        value = cfg
        for part in name.split("."):
            value = value[part]
        assert wanted.admits(value), name


@pytest.mark.parametrize(
    "options",
    [
        (f"{DETECTOR}.ENCODER", "DynamicEncodr"),
        (f"{DETECTOR}.IN_FEATURES", "['p9']"),
        (f"{DETECTOR}.HIDDEN_DIM", "63"),
        (f"{DECODER}.NUM_HEADS", "5"),
        (f"{DECODER}.NUM_QUERIES", "2000000000"),
        (f"{DECODER}.POOLING_SIZE", "2000000000"),
        ("MODEL.RESNETS.NUM_GROUPS", "7"),
        ("MODEL.RESNETS.STEM_OUT_CHANNELS", "7"),
        ("MODEL.META_ARCHITECTURE", "PanopticFPN"),
        ("MODEL.META_ARCHITECTURE", "RetinaNet"),
    ],
)
def test_what_cannot_be_built_is_one_line(tiny, options):
    cfg = read_config(tiny.config_file, [*tiny.opts, *options])
    with pytest.raises(UserError, match=r"^the configured model cannot be built: .+"):
        Trainer.build_model(cfg)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "wrong.yaml"),
        ("[1, 2]", "wrong.yaml"),
        ("3", "wrong.yaml"),
        ("MODEL: 3", "wrong.yaml"),
        ("MODEL: [", "expected"),
        ("MODEL:\n\tX: 1", "cannot start any token"),
        ("_BASE_: absent.yaml", "absent.yaml"),
        ("_BASE_: 3", ""),
        ("_BASE_: wrong.yaml", "recursion"),
        ("VERSION: 99", "v99"),
        ("\0", ""),
        ("SEED: !!python/object/apply:os.system ['touch {mark}']", "os.system"),
        ("SEED: !!python/name:os.system", "os.system"),
        ('SEED: !!python/object/apply:eval [\'open("{mark}", "w")\']', "a Call"),
        ("SEED: !!python/object/apply:eval ['().__class__']", "a Attribute"),
    ],
)
def test_configuration_files_run_no_code_and_are_one_line(tmp_path, text, message):
    path, mark = tmp_path / "wrong.yaml", tmp_path / "mark"
    path.write_text(text.replace("{mark}", str(mark)))
    with pytest.raises(UserError, match="^wrong configuration: .") as error:
        read_config(str(path), [])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not mark.exists()


def test_formulas_and_tuples_of_configuration_files_are_read(tmp_path):
    path = tmp_path / "right.yaml"
    path.write_text(
        "MODEL: {ANCHOR_GENERATOR: {SIZES: !!python/object/apply:eval "
        "['[[x, x * 2**(1.0/2)] for x in [32, -(-64)]]']}}\n"
        "INPUT: {MIN_SIZE_TRAIN: !!python/tuple [64, 80]}"
    )
    cfg = read_config(str(path), [])
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[32, 32 * 2**0.5], [64, 64 * 2**0.5]]
    assert cfg.INPUT.MIN_SIZE_TRAIN == (64, 80)
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load("!!python/tuple [64, 80]")


def test_values_nested_too_deeply_are_one_line(tiny):
    for value in ("(" * 5000, "(" * 90 + ")" * 90, "[" * 300 + "]" * 300, "-" * 9000 + "1"):
        assert "SOLVER.BASE_LR" in _error(tiny, "SOLVER.BASE_LR", value)
