"""Command line of ``train_net.py`` to a checked configuration.

User errors are reported in one line here, before any process is started or model built.
"""

import argparse
import os

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser

from ..config import class_count
from ..data.coco_json import apply_json_datasets
from ..data.loader import missing_data_set
from ..data.scenes import register_scenes, remedy
from ..engine.class_names import check_test_sets, data_class_names, weights_class_names
from ..errors import UserError, did_you_mean, is_text
from ..files.config_file import find_config, model_among, read_config
from .launch import under_torchrun
from .output_dir import require_output_dir

__all__ = ["build_parser", "load_config", "process_count"]

_EPILOG = """
examples:
  train on COCO (under DETECTRON2_DATASETS) with 8 GPUs:
    train_net.py --num-gpus 8 --config-file configs/COCO-Detection/dynamic_detr_R_50_1x.yaml
  train on your own COCO-format boxes:
    train_net.py --config-file ... --train-json A.json --train-images DIR \\
                 --val-json B.json --val-images DIR
  continue after a stop:      add --resume
  evaluate a model file:      train_net.py --eval-only --val-json B.json --val-images DIR \\
                                MODEL.WEIGHTS output/model_best.safetensors
  change configuration keys:  add SOLVER.BASE_LR 0.0001 MODEL.DEVICE cpu ...
  a Detectron2 model-zoo configuration: --config-file COCO-Detection/retinanet_R_50_FPN_1x.yaml

exit codes: 0 done, or saved and stopped by SIGTERM or SIGUSR1; 1 unforeseen error; 2 wrong
arguments, configuration, data or weights; 3 training diverged; 4 another process was lost or made
no progress; 130 saved and stopped by Ctrl-C; 128 + n stopped by signal n with nothing to save
"""


def build_parser() -> argparse.ArgumentParser:
    """Return a parser with Detectron2's arguments and those of this project."""
    parser = default_argument_parser(epilog=_EPILOG)
    parser.set_defaults(dist_url="auto")
    parser.add_argument(
        "--num-processes",
        type=int,
        default=1,
        help="processes per machine on the CPU (with Gloo between them)",
    )
    for split in ("train", "val"):
        parser.add_argument(
            f"--{split}-json", metavar="FILE", help=f"COCO-format annotations to use for {split}"
        )
        parser.add_argument(
            f"--{split}-images", metavar="DIR", help=f"folder of the images of --{split}-json"
        )
    parser.add_argument(
        "--note", default="", metavar="TEXT", help="kept in the model files that training writes"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of user errors")
    return parser


def load_config(args: argparse.Namespace) -> CfgNode:
    """Merge and check the configuration file, the keys and the data sets of the command line.

    Every process of a run calls it, because each has its own catalogue of data sets.

    Returns:
        The frozen configuration.

    Raises:
        UserError: an argument, key, file or data set is wrong.
    """
    args.config_file = find_config(args.config_file or model_among(args.opts or []))
    cfg = read_config(args.config_file, args.opts or [])
    if not is_text(args.note):
        raise UserError(f"--note {args.note!a} is not text in UTF-8")
    require_output_dir(cfg.OUTPUT_DIR)  # a repaired copy of the annotations may go there
    _choose_device(cfg, args)
    names = weights_class_names(cfg, args.resume) if args.eval_only else None
    register_scenes()
    if any((args.train_json, args.train_images, args.val_json, args.val_images)):
        apply_json_datasets(cfg, args, names)
    _check_data(cfg, need_train=not args.eval_only)
    if not args.eval_only and class_count(cfg) is not None:
        names = data_class_names(cfg)
    if names:
        check_test_sets(cfg, names)
    cfg.freeze()
    return cfg


def _choose_device(cfg: CfgNode, args: argparse.Namespace) -> None:
    available = torch.cuda.device_count()
    if args.num_gpus > max(available, 1):
        raise UserError(
            f"--num-gpus {args.num_gpus}, but this machine has {available} GPUs"
            + ("" if available else "; --num-processes starts several processes on the CPU")
        )
    if args.num_gpus < 0 or args.num_processes < 1 or args.num_machines < 1:
        raise UserError(
            "--num-gpus must be at least 0, --num-processes and --num-machines at least 1"
        )
    other = "--num-processes" if args.num_processes > 1 else f"MODEL.DEVICE {cfg.MODEL.DEVICE}"
    if args.num_gpus > 1 and other != "MODEL.DEVICE cuda":
        raise UserError(f"--num-gpus {args.num_gpus} contradicts {other}; omit one of them")
    if not 0 <= args.machine_rank < args.num_machines:
        raise UserError(
            f"--machine-rank {args.machine_rank} is not one of 0 to {args.num_machines - 1}"
        )
    if not available or not args.num_gpus or args.num_processes > 1:
        cfg.MODEL.DEVICE = "cpu"
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if cfg.MODEL.DEVICE.startswith("cuda") and under_torchrun() and local_rank >= available:
        raise UserError(
            f"torchrun has started more processes than this machine has GPUs ({available}); lower "
            "--nproc-per-node, or train on the CPU with --num-gpus 0"
        )


def process_count(cfg: CfgNode, args: argparse.Namespace) -> int:
    """Return the number of processes that this command starts on this machine."""
    return args.num_gpus if cfg.MODEL.DEVICE.startswith("cuda") else args.num_processes


def _check_data(cfg: CfgNode, need_train: bool) -> None:
    """Check that the data sets exist and have no more classes than the detector."""
    sets = [("TEST", name) for name in cfg.DATASETS.TEST]
    if need_train:
        sets += [("TRAIN", name) for name in cfg.DATASETS.TRAIN]
        if not cfg.DATASETS.TRAIN:
            raise UserError("DATASETS.TRAIN is empty; set it to a data set, or pass --train-json")
    elif not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty; set it to a data set, or pass --val-json")
    known = list(DatasetCatalog.list())
    classes = class_count(cfg)
    for split, name in sets:
        if name not in known:
            raise UserError(
                f"DATASETS.{split} names {name}, which is not registered"
                f"{did_you_mean(name, known)}; --train-json and --val-json take COCO files"
            )
        names = MetadataCatalog.get(name).get("thing_classes")
        if names is not None and classes is not None and len(names) > classes:
            raise UserError(
                f"the data set {name} has {len(names)} classes and the detector {classes}; set "
                "the NUM_CLASSES of its configuration"
            )
    for name in cfg.DATASETS.TEST if need_train else ():  # before hours of training
        metadata = MetadataCatalog.get(name)
        paths = [metadata.get(key) or "" for key in ("json_file", "image_root")]
        local = [path for path in paths if path and "://" not in path]
        if absent := [path for path in local if not os.path.exists(path)]:
            raise missing_data_set([name], f"no {absent[0]}{remedy(name)}")
