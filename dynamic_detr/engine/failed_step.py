"""A training step whose loss or gradient was not finite, kept so that it can be run again.

| file in ``OUTPUT_DIR/failed_step`` | written by | what |
| --- | --- | --- |
| ``step.pth`` | process 0 | iteration, seed, precision, configuration, the weights from before it |
| ``batch_R.pth`` | process R | iteration, and the process's batch as it was after augmentation |

``tools/replay_step.py`` reads them. With several machines each has the batches of its own
processes.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.structures import (
    BitMasks,
    Boxes,
    BoxMode,
    Instances,
    Keypoints,
    PolygonMasks,
    RotatedBoxes,
)
from torch import Tensor

from .. import compat
from ..config import add_dynamic_detr_config
from ..errors import UserError
from ..files.reading import broken, check_archive
from ..files.writing import write_atomically

__all__ = ["FOLDER", "FailedStep", "save_failed_step"]

FOLDER = "failed_step"
_STEP = "step.pth"
_BATCH = "batch_{}.pth"
# What a batch holds beside tensors; polygons are NumPy's arrays.
_TYPES = [BitMasks, Boxes, BoxMode, Instances, Keypoints, PolygonMasks, RotatedBoxes]
_TYPES += [np.empty(0).__reduce__()[0], np.ndarray, np.dtype]
_TYPES += [type(np.dtype(name)) for name in ("f4", "f8", "i4", "i8")]


@dataclass
class FailedStep:
    """What is known of the step.

    Args:
        iteration: from 0.
        seed: of the run.
        processes: how many took part.
        dtype: of mixed precision: "float16", "bfloat16", or "" for none.
        scale: that the loss was multiplied by, with float16.
        config: as YAML.
        model: the weights from before the step.
    """

    iteration: int
    seed: int
    processes: int
    dtype: str
    scale: float
    config: str
    model: dict[str, Tensor]

    @classmethod
    def load(cls, folder: Path) -> "FailedStep":
        """Read the file of process 0.

        Raises:
            UserError: it is not there, or broken.
        """
        return cls(**_load(folder / _STEP))

    def cfg(self) -> CfgNode:
        """The configuration of the run."""
        cfg = get_cfg()
        compat.add_newer_keys(cfg)
        add_dynamic_detr_config(cfg)
        cfg.merge_from_other_cfg(CfgNode.load_cfg(self.config))
        return cfg

    def batches(self, folder: Path) -> dict[int, list[dict]]:
        """The batches of this step that the folder has, by process."""
        found = {}
        for rank in range(self.processes):
            path = folder / _BATCH.format(rank)
            if path.is_file():
                content = _load(path)
                if content["iteration"] == self.iteration:
                    found[rank] = content["batch"]
        return found


def _load(path: Path) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise UserError(f"{path} is not there; name the folder {FOLDER} of a run that diverged")
    try:
        check_archive(path)
        with torch.serialization.safe_globals(_TYPES):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and zip each have their own errors
        raise broken(path, error) from error


def save_failed_step(
    folder: Path, step: FailedStep | None, batch: list[dict], iteration: int, rank: int
) -> None:
    """Write one process's share of a failed step; called by every process.

    Args:
        folder: to write to; made if it is not there.
        step: of process 0; None for the others.
        batch: of this process.
        iteration: of the step.
        rank: of this process.

    Raises:
        OSError, RuntimeError: it could not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {"iteration": iteration, "batch": batch}
    path = folder / _BATCH.format(rank)
    write_atomically(path, lambda file: torch.save(content, file))
    if step is not None:
        write_atomically(folder / _STEP, lambda file: torch.save(vars(step), file))
