"""Reading a configuration: a YAML file, a model file or a model-zoo name, and keys on top."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import detectron2
from detectron2.config import CfgNode, get_cfg

from .. import compat
from ..config import add_dynamic_detr_config, check_config, value_of
from ..detectron2_keys import check_detectron2_config
from ..errors import UserError, did_you_mean, one_line
from .model_file import is_model_file, merge_described_config, require_model
from .plain_yaml import plain_yaml

__all__ = ["find_config", "model_among", "read_config"]

_WEIGHTS = "MODEL.WEIGHTS"


def model_among(opts: list[str]) -> str:
    """Return the model file that ``MODEL.WEIGHTS`` names among keys and values, or "".

    A model file holds its configuration, so it needs no ``--config-file``.
    """
    named = [value for key, value in zip(opts[::2], opts[1::2], strict=False) if key == _WEIGHTS]
    return named[-1] if named and is_model_file(named[-1]) else ""


def find_config(name: str) -> str:
    """Return the file of ``--config-file``: a path, or the name of a model-zoo configuration.

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
    # Read from the installed package: `model_zoo` of 0.5 imports `pkg_resources`.
    zoo = Path(detectron2.__file__).parent / "model_zoo" / "configs" / name
    if not os.path.isfile(zoo):
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
def _user_errors(cfg: CfgNode, source: str) -> Iterator[None]:
    """Turn errors of merging ``source``, a file or a key, into ``cfg`` into one line."""
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
    """Merge a configuration file and the keys of the command line.

    Args:
        config_file: a file; of a model file, its configuration and weights are used.
        opts: keys and values in turn.

    Returns:
        The configuration, not frozen.

    Raises:
        UserError: there is no such file, or a key or value is wrong.
    """
    cfg = get_cfg()
    compat.add_newer_keys(cfg)
    add_dynamic_detr_config(cfg)
    with _user_errors(cfg, config_file), plain_yaml():
        if is_model_file(config_file):
            merge_described_config(cfg, require_model(config_file))
        else:
            cfg.merge_from_file(config_file, allow_unsafe=False)
    if len(opts) % 2:
        raise UserError(
            f"configuration keys come in pairs KEY VALUE, and {opts[-1]!r} is left over"
        )
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        with _user_errors(cfg, key):
            if isinstance(value_of(cfg, key), CfgNode):
                raise ValueError(f"{key} is a group of keys; set one of them")
            cfg.merge_from_list([key, value])
    with _user_errors(cfg, ""):
        check_config(cfg)
        check_detectron2_config(cfg)
    for name in compat.unsupported_keys(cfg):
        raise UserError(f"{name} is set, but the installed Detectron2 is too old for it")
    return cfg
