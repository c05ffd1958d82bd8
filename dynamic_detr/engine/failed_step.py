"""Files of a training step whose loss or gradient was not finite, for a replay.

| file in ``OUTPUT_DIR/failed_step`` | written by | content |
| --- | --- | --- |
| ``step.pth`` | process 0 | iteration, seed, precision, configuration, weights from before it |
| ``batch_R.pth`` | process R | iteration and the batch of the process, after augmentation |

``tools/replay_step.py`` reads them. Each machine has the batches of its own processes.
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
# Types in a batch besides tensors; polygons are NumPy arrays.
_TYPES = [BitMasks, Boxes, BoxMode, Instances, Keypoints, PolygonMasks, RotatedBoxes]
_TYPES += [np.empty(0).__reduce__()[0], np.ndarray, np.dtype]
_TYPES += [type(np.dtype(name)) for name in ("f4", "f8", "i4", "i8")]


@dataclass
class FailedStep:
    """Training step without its batches.

    Args:
        iteration: iteration, from 0.
        seed: seed of the run.
        processes: number of processes.
        dtype: dtype of mixed precision, "float16" or "bfloat16"; "" for none.
        scale: loss scale, with float16.
        config: configuration of the run, as YAML.
        model: weights from before the step.
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
            UserError: it does not exist or is damaged.
        """
        return cls(**_load(folder / _STEP))

    def cfg(self) -> CfgNode:
        """Return the configuration of the run."""
        cfg = get_cfg()
        compat.add_newer_keys(cfg)
        add_dynamic_detr_config(cfg)
        cfg.merge_from_other_cfg(CfgNode.load_cfg(self.config))
        return cfg

    def batches(self, folder: Path) -> dict[int, list[dict]]:
        """Return the batches of this step in a folder, by process."""
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
        raise UserError(f"{path} does not exist; pass the folder {FOLDER} of a run that diverged")
    try:
        check_archive(path)
        with torch.serialization.safe_globals(_TYPES):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and zip each have their own errors
        raise broken(path, error) from error


def save_failed_step(
    folder: Path, step: FailedStep | None, batch: list[dict], iteration: int, rank: int
) -> None:
    """Write the files of this process for a failed step; every process calls this.

    Args:
        folder: folder to write to; created if it does not exist.
        step: the step in process 0; None in the others.
        batch: batch of this process.
        iteration: iteration of the step.
        rank: rank of this process.

    Raises:
        OSError, RuntimeError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {"iteration": iteration, "batch": batch}
    path = folder / _BATCH.format(rank)
    write_atomically(path, lambda file: torch.save(content, file))
    if step is not None:
        write_atomically(folder / _STEP, lambda file: torch.save(vars(step), file))
