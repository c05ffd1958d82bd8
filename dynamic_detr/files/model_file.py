"""Model files: safetensors files with everything that inference needs.

Besides the weights, a file has a header, the metadata of safetensors: a dict of strings, in which
other types are encoded as JSON.

| name | content |
| --- | --- |
| ``project``, ``format``, ``version`` | "dynamic_detr", version of this file format, version of the package |
| ``config`` | the whole configuration, as YAML |
| ``class_names``, ``category_ids`` | names and COCO category ids of the classes, by class index |
| ``threshold`` | score threshold with the best F1 in the evaluation |
| ``metrics``, ``iteration`` | results of the evaluation, training iterations before the evaluation |
| ``note`` | any text |
| ``checksum`` | SHA-256 of weights and header; it detects corruption, not tampering |

Nothing in the file is executed.
"""  # noqa: E501

import contextlib
import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import UserError, did_you_mean, is_text, one_line
from ..version import __version__

__all__ = [
    "SUFFIX",
    "ModelInfo",
    "describe_config",
    "encode_model",
    "is_model_file",
    "locate_model",
    "merge_described_config",
    "read_header",
    "read_model",
    "require_model",
]

SUFFIX = ".safetensors"
PROJECT = "dynamic_detr"
FORMAT = 1
SHIPPED = Path(__file__).resolve().parents[1] / "weights"
# Other keys, such as those of losses, do not affect inference; unknown ones are ignored.
_USED_NODES = ("MODEL", "INPUT", "TEST")


@dataclass(frozen=True)
class ModelInfo:
    """Header of a model file.

    Args:
        config: configuration, as YAML.
        class_names: class names by class index; empty if unknown.
        category_ids: COCO category ids by class index; empty if unknown.
        threshold: minimum score of a detection; None if unknown.
        metrics: results of the evaluation by name.
        iteration: number of training iterations.
        note: any text.
        version: version of the package that wrote the file.

    Raises:
        ValueError: an argument has an invalid type or value.
    """

    config: str
    class_names: list[str] = field(default_factory=list)
    category_ids: list[int] = field(default_factory=list)
    threshold: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    iteration: int = 0
    note: str = ""
    version: str = __version__

    def __post_init__(self) -> None:
        numbers = list(self.metrics.values()) if isinstance(self.metrics, dict) else [None]
        checks = {
            "config": isinstance(self.config, str),
            "class_names": _are(self.class_names, str),
            "category_ids": _are(self.category_ids, int)
            and len(self.category_ids) in (0, len(self.class_names)),
            "threshold": self.threshold is None
            or (_are([self.threshold], float | int) and 0 <= self.threshold <= 1),
            "metrics": _are(numbers, float | int),
            "iteration": _are([self.iteration], int) and self.iteration >= 0,
            "note": isinstance(self.note, str) and is_text(self.note),
            "version": isinstance(self.version, str),
        }
        if wrong := [name for name, is_right in checks.items() if not is_right]:
            raise ValueError(f"its {wrong[0]} is {getattr(self, wrong[0])!r:.60}")


def _are(values: Any, kind: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(v, kind) and not isinstance(v, bool) and (isinstance(v, str) or math.isfinite(v))
        for v in values
    )


def locate_model(name: str) -> str:
    """Return the path of a shipped model for its name; return any other name unchanged."""
    shipped = str(SHIPPED / f"{name}{SUFFIX}")
    is_name = name and os.path.basename(name) == name and not os.path.isfile(name)
    return shipped if is_name and os.path.isfile(shipped) else name


def is_model_file(name: str) -> bool:
    """Return whether this is the path of a safetensors file or the name of a shipped model."""
    return locate_model(name).endswith(SUFFIX)


def require_model(name: str) -> str:
    """Return the path of an existing model file, from a path or the name of a shipped model.

    Raises:
        UserError: there is no such model.
    """
    path = locate_model(name)
    if not os.path.isfile(path):
        shipped = sorted(file.stem for file in SHIPPED.glob(f"*{SUFFIX}"))
        raise UserError(
            f"the model {name:.300} does not exist, neither as a file nor as a shipped model "
            f"({', '.join(shipped)}){did_you_mean(name, shipped)}"
        )
    return path


def describe_config(cfg: CfgNode) -> str:
    """Return a configuration as YAML, with weights, device and output folder reset to defaults."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE, cfg.OUTPUT_DIR = "", "cuda", "./output"
    return cfg.dump()


def merge_described_config(cfg: CfgNode, path: str) -> None:
    """Merge the configuration of a model file into ``cfg``.

    Also sets ``MODEL.WEIGHTS`` to the file and ``MODEL.DEVICE`` to the device of this machine.

    Raises:
        UserError: the file cannot be read.
        KeyError, ValueError: a key that inference needs is unknown or has an invalid value.
    """
    described = yaml.safe_load(read_header(path).config)
    if not isinstance(described, dict):
        raise UserError(f"{path} is damaged: its configuration is a {type(described).__name__}")
    for name in [name for name in described if name not in _USED_NODES]:
        if name not in cfg:
            del described[name]
        elif isinstance(described[name], dict):
            _drop_unknown(described[name], cfg[name])
    described = CfgNode(described)
    with contextlib.suppress(AttributeError, TypeError):  # the merge names what is wrong
        _drop_unknown(described.MODEL.SET_DETECTOR.LOSS, cfg.MODEL.SET_DETECTOR.LOSS)
    cfg.merge_from_other_cfg(described)
    cfg.MODEL.WEIGHTS = path
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _drop_unknown(described: dict, cfg: Any) -> None:
    for key in list(described):
        if not isinstance(cfg, CfgNode) or key not in cfg:
            del described[key]
        elif isinstance(described[key], dict):
            _drop_unknown(described[key], cfg[key])


def _checksum(header: dict[str, str], weights: dict[str, Tensor]) -> str:
    total = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(weights):
        tensor = weights[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def encode_model(weights: dict[str, Tensor], info: ModelInfo) -> bytes:
    """Return the content of a model file.

    Args:
        weights: state dict of the model.
        info: the header.
    """
    # Copies, because the format rejects tensors that share memory.
    weights = {
        name: value.detach().to("cpu", copy=True).contiguous() for name, value in weights.items()
    }
    header = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in asdict(info).items()
    }
    header |= {"project": PROJECT, "format": str(FORMAT)}
    return save(weights, {**header, "checksum": _checksum(header, weights)})


def read_header(path: str) -> ModelInfo:
    """Read the header of a model file, without the weights.

    Raises:
        UserError: the file is missing, damaged, or written by another tool or a newer version.
    """
    return _read(path, with_weights=False)[0]


def read_model(path: str) -> tuple[ModelInfo, dict[str, Tensor]]:
    """Read the header and weights of a model file to the CPU, and verify the checksum.

    Raises:
        UserError: see :func:`read_header`.
    """
    return _read(path, with_weights=True)


def _read(path: str, with_weights: bool) -> tuple[ModelInfo, dict[str, Tensor]]:
    path = require_model(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            info = _parse(header)
            weights = {name: file.get_tensor(name) for name in file.keys() if with_weights}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a valid model file ({one_line(error)[:160]})") from error
    if with_weights:
        checksum = header.pop("checksum", "")
        if _checksum(header, weights) != checksum:
            raise UserError(
                f"{path} is damaged, or was changed by hand: its checksum does not match"
            )
    return info, weights


def _parse(header: dict[str, str]) -> ModelInfo:
    if header.get("project") != PROJECT:
        raise ValueError("it was written by another tool: its header has no configuration")
    format_version, version = header.get("format", ""), header.get("version", "")
    if format_version != str(FORMAT):
        raise ValueError(
            f"it has format {format_version:.20}, written by dynamic_detr {version:.20}; this is "
            f"dynamic_detr {__version__}, which reads format {FORMAT}; update dynamic_detr"
        )
    names = {part.name: part.type for part in fields(ModelInfo)}
    if missing := [name for name in names if name not in header]:
        raise ValueError(f"its header has no {missing[0]}")
    return ModelInfo(
        **{
            name: header[name] if kind is str else json.loads(header[name])
            for name, kind in names.items()
        }
    )
