"""From the command line to a checked configuration. Everything that a user can get wrong is told
here, in one line, before any process or model is started.
"""

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from torch import nn

from .. import compat
from ..config import add_dynamic_detr_config, check_config, class_count, value_of
from ..detectron2_keys import check_detectron2_config
from ..errors import UserError, did_you_mean, one_line
from ..plain_yaml import plain_yaml
from .class_names import check_test_sets, weights_class_names
from .disk import require_output_dir
from .launch import under_torchrun
from .model_file import is_model_file, merge_described_config, require_model

_WEIGHTS = "MODEL.WEIGHTS"
_UNBUILDABLE = (AssertionError, LookupError, ValueError)  # what constructors raise, and
_UNBUILDABLE += (MemoryError, OverflowError, RuntimeError, TypeError)  # sizes beyond all memory
_EPILOG = """
examples:
  train on COCO (under DETECTRON2_DATASETS) with 8 GPUs:
    train_net.py --num-gpus 8 --config-file configs/COCO-Detection/dynamic_detr_R_50_1x.yaml
  train on your own COCO-format boxes:
    train_net.py --config-file ... --train-json A.json --train-images DIR \\
                 --val-json B.json --val-images DIR
  go on after a stop:         add --resume
  evaluate a model file:      train_net.py --eval-only --val-json B.json --val-images DIR \\
                                MODEL.WEIGHTS output/model_best.safetensors
  change configuration keys:  add SOLVER.BASE_LR 0.0001 MODEL.DEVICE cpu ...
  a Detectron2 model-zoo configuration: --config-file COCO-Detection/retinanet_R_50_FPN_1x.yaml

exit codes: 0 done, or saved and stopped by SIGTERM or SIGUSR1; 1 unforeseen error; 2 wrong
arguments, configuration, data or weights; 3 training diverged; 4 another process was lost or made
no progress; 130 saved and stopped by Ctrl-C; 128 + n stopped by signal n with nothing to save
"""


def build_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments, and those of this project."""
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


def model_among(opts: list[str]) -> str:
    """The model file that configuration keys name as ``MODEL.WEIGHTS``; empty if there is none.

    Such a file needs no ``--config-file``.
    """
    named = [value for key, value in zip(opts[::2], opts[1::2], strict=False) if key == _WEIGHTS]
    return named[-1] if named and is_model_file(named[-1]) else ""


def find_config(name: str) -> str:
    """The file of ``--config-file``: a path, or the name of a model-zoo configuration.

    Raises:
        UserError: there is no such file in either place.
    """
    if not name:
        raise UserError(
            "--config-file is missing; for example "
            "--config-file configs/COCO-Detection/dynamic_detr_R_50_1x.yaml"
        )
    if os.path.isfile(name):
        return name
    if is_model_file(name):
        return require_model(name)
    zoo = compat.zoo_config(name)
    if zoo is None:
        folder = Path(name).parent
        here = folder.glob("*.yaml") if os.path.isdir(folder) else ()
        raise UserError(
            f"the configuration {name:.300} does not exist, neither as a file nor in Detectron2's "
            f"model zoo{did_you_mean(name, map(str, here))}"
        )
    return str(zoo)


def _keys(cfg: CfgNode, prefix: str = "") -> list[str]:
    names = []
    for key, value in cfg.items():
        names.append(prefix + key)
        if isinstance(value, CfgNode):
            names += _keys(value, f"{prefix}{key}.")
    return names


@contextlib.contextmanager
def _telling(cfg: CfgNode, source: str) -> Iterator[None]:
    """Say what is wrong with ``source``, a file or a key that is merged into ``cfg``."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # YAML and the parser of values each have their own errors
        text = str(error.args[0]) if isinstance(error, KeyError) else one_line(error)
        text = text if len(text) <= 300 else f"{text[:300]} ..."
        hint = did_you_mean(text.rpartition(" ")[2], _keys(cfg)) if "existent" in text else ""
        where = "" if source in text else f"{source:.100}: "
        raise UserError(f"wrong configuration: {where}{text}{hint}") from error


def read_config(config_file: str, opts: list[str]) -> CfgNode:
    """Merge a configuration file and the command line's keys.

    Args:
        config_file: path of a file; for a model file, its configuration and weights.
        opts: keys and values in turn.

    Returns:
        The configuration, not frozen.

    Raises:
        UserError: no such file, or a key or value that cannot work.
    """
    cfg = get_cfg()
    compat.add_newer_keys(cfg)
    add_dynamic_detr_config(cfg)
    with _telling(cfg, config_file), plain_yaml():
        if is_model_file(config_file):
            merge_described_config(cfg, require_model(config_file))
        else:
            cfg.merge_from_file(config_file, allow_unsafe=False)
    if len(opts) % 2:
        raise UserError(
            f"configuration keys come in pairs KEY VALUE, and {opts[-1]!r} is left over"
        )
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        with _telling(cfg, key):
            if isinstance(value_of(cfg, key), CfgNode):
                raise ValueError(f"{key} is a group of keys; name one of them")
            cfg.merge_from_list([key, value])
    with _telling(cfg, ""):
        check_config(cfg)
        check_detectron2_config(cfg)
    for name in compat.unsupported_keys(cfg):
        raise UserError(f"{name} is set, but the installed Detectron2 is too old to know it")
    return cfg


def load_config(args: argparse.Namespace) -> CfgNode:
    """Merge the configuration file, the command line's keys and its data sets, and check them.

    Every process of a run calls it, as data sets are registered by process.

    Returns:
        The frozen configuration.

    Raises:
        UserError: anything that cannot work.
    """
    args.config_file = find_config(args.config_file or model_among(args.opts or []))
    cfg = read_config(args.config_file, args.opts or [])
    require_output_dir(cfg.OUTPUT_DIR)  # a repaired copy of the annotations may go there
    _choose_device(cfg, args)
    names = weights_class_names(cfg, args.resume) if args.eval_only else None
    _register_data(cfg, args, names)
    _check_data(cfg, need_train=not args.eval_only)
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
        raise UserError("--num-gpus, --num-processes and --num-machines count from 0, 1 and 1")
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
    """How many processes this command starts on this machine."""
    return args.num_gpus if cfg.MODEL.DEVICE.startswith("cuda") else args.num_processes


def _register_data(cfg: CfgNode, args: argparse.Namespace, names: list[str] | None) -> None:
    given = [args.train_json, args.train_images, args.val_json, args.val_images]
    if not any(given):
        return
    from ..data.coco_json import apply_json_datasets

    apply_json_datasets(cfg, args, names)


def build_detector(cfg: CfgNode) -> nn.Module:
    """Build the model on ``MODEL.DEVICE``.

    Raises:
        UserError: the configuration cannot be built, or takes more memory than there is.
    """
    try:
        return build_model(cfg)
    except _UNBUILDABLE as error:
        text = one_line(error)[:300]
        raise UserError(f"the configured model cannot be built: {text}") from error


def _check_data(cfg: CfgNode, need_train: bool) -> None:
    """See that the data sets exist and have no more classes than the detector."""
    sets = [("TEST", name) for name in cfg.DATASETS.TEST]
    if need_train:
        sets += [("TRAIN", name) for name in cfg.DATASETS.TRAIN]
        if not cfg.DATASETS.TRAIN:
            raise UserError("DATASETS.TRAIN is empty; name a data set, or give --train-json")
    elif not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty; name a data set, or give --val-json")
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
