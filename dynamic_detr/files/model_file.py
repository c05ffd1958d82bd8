"""Models that describe themselves: one safetensors file holds all that using a detector takes.

Beside the weights, the header (strings by name, as the format wants them) holds

| name | what |
| --- | --- |
| ``project``, ``format``, ``version`` | "dynamic_detr", the number of this layout, the version that wrote it |
| ``config`` | the whole configuration, as YAML |
| ``class_names``, ``category_ids`` | of the classes in the detector's order: names, and ids in the JSON that it was trained on |
| ``threshold`` | of scores, with the best F1 where the model was evaluated |
| ``metrics``, ``iteration`` | of that evaluation |
| ``note`` | of whoever trained it |
| ``checksum`` | SHA-256 of weights and header; finds damage, proves no origin |

The file is data alone: nothing in it is run. Values other than strings are JSON.
"""  # noqa: E501

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

from ..errors import UserError, did_you_mean, one_line
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
# A key outside of these nodes changes nothing that the finished detector does, so one that this
# version does not know is passed over.
_USED_NODES = ("MODEL", "INPUT", "TEST")


@dataclass(frozen=True)
class ModelInfo:
    """What a model file says of its model.

    Args:
        config: YAML of the configuration.
        class_names: in the order of the detector's classes; empty where they are not known.
        category_ids: the ids of these classes in the annotations; empty where they are not known.
        threshold: lowest score that counts as a detection; None where none was found.
        metrics: numbers by name.
        iteration: how many the model was trained for.
        note: any text.
        version: of the project.
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
        """See that every part is what it should be.

        Raises:
            ValueError: one is not.
        """
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
            "note": isinstance(self.note, str),
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
    """The path of a model, for the name of a shipped one too; any other name stays as it is."""
    shipped = str(SHIPPED / f"{name}{SUFFIX}")
    is_name = name and os.path.basename(name) == name and not os.path.isfile(name)
    return shipped if is_name and os.path.isfile(shipped) else name


def is_model_file(name: str) -> bool:
    """Whether this is the path of a safetensors file, or the name of a shipped model."""
    return locate_model(name).endswith(SUFFIX)


def require_model(name: str) -> str:
    """The path of a model that is there.

    Raises:
        UserError: there is none.
    """
    path = locate_model(name)
    if not os.path.isfile(path):
        shipped = sorted(file.stem for file in SHIPPED.glob(f"*{SUFFIX}"))
        raise UserError(
            f"the model {name:.300} does not exist, neither as a file nor among those that come "
            f"with the project ({', '.join(shipped)}){did_you_mean(name, shipped)}"
        )
    return path


def describe_config(cfg: CfgNode) -> str:
    """YAML of a configuration, without what belongs to the machine it was trained on."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE, cfg.OUTPUT_DIR = "", "cuda", "./output"
    return cfg.dump()


def merge_described_config(cfg: CfgNode, path: str) -> None:
    """Merge the configuration that a model file holds; ``MODEL.WEIGHTS`` is then the file, and
    ``MODEL.DEVICE`` what this machine has.

    Raises:
        UserError: the file cannot be read.
        KeyError, ValueError: a key that the detector needs is not known here, or has a wrong value.
    """
    described = yaml.safe_load(read_header(path).config)
    if not isinstance(described, dict):
        raise UserError(f"{path} is damaged: its configuration is a {type(described).__name__}")
    for name in [name for name in described if name not in _USED_NODES]:
        if name not in cfg:
            del described[name]
        elif isinstance(described[name], dict):
            _drop_unknown(described[name], cfg[name])
    cfg.merge_from_other_cfg(CfgNode(described))
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
    """The content of a model file.

    Args:
        weights: by the names of the model's state.
        info: what is said of them.
    """
    # Copies, as the format refuses tensors that share their memory.
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
    """What a model file says of its model; the weights are not looked at.

    Raises:
        UserError: it is missing, damaged, of another tool, or of a newer version.
    """
    return _read(path, with_weights=False)[0]


def read_model(path: str) -> tuple[ModelInfo, dict[str, Tensor]]:
    """A model file's header and weights, on the CPU, after a comparison with its checksum.

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
        raise UserError(f"{path} is not a whole model file ({one_line(error)[:160]})") from error
    if with_weights:
        checksum = header.pop("checksum", "")
        if _checksum(header, weights) != checksum:
            raise UserError(
                f"{path} is damaged, or was changed by hand: its checksum is that of another "
                "content"
            )
    return info, weights


def _parse(header: dict[str, str]) -> ModelInfo:
    if header.get("project") != PROJECT:
        raise ValueError("it was written by another tool: its header has no configuration")
    layout, version = header.get("format", ""), header.get("version", "")
    if layout != str(FORMAT):
        raise ValueError(
            f"it has layout {layout:.20} of version {version:.20}, and this is version "
            f"{__version__}, which reads layout {FORMAT}; update the project"
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
