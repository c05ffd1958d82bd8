"""Safe loading of weights and checkpoints, which checks checksums, types and values.

``torch.save`` writes a zip archive with a CRC-32 of every tensor, which ``torch.load`` ignores: a
flipped bit can become a weight of 1e30.
"""

import re
import zipfile
from collections.abc import Iterable
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError, one_line

__all__ = [
    "UNNAMED_RUN",
    "BrokenCheckpoint",
    "broken",
    "check_archive",
    "check_class_names",
    "check_weights",
    "peek_checkpoint",
    "read_checkpoint",
    "require_finite",
]

_ZIP_MAGIC = b"PK\x03\x04"
_CHUNK = 1 << 20
_RUN_ID = re.compile("[0-9a-f]{8}")
_RUN_TYPES = {"id": str, "started": float, "processes": int}
# For checkpoints that do not record their run.
UNNAMED_RUN = {"id": "0" * 8, "started": 0.0, "processes": 0}


class BrokenCheckpoint(UserError):
    """The file is truncated, damaged, or not a checkpoint."""


def broken(path: str | PathLike, error: Exception) -> BrokenCheckpoint:
    """Return an error that names the reason in one line."""
    reason = one_line(error).partition(". ")[0][:120]
    return BrokenCheckpoint(f"{path} is not a valid checkpoint ({reason})")


def check_archive(path: str | PathLike) -> None:
    """Verify the checksum of every record of a ``torch.save`` archive.

    Files in PyTorch's older format have no checksums. Neither have records with checksum 0
    (``torch.serialization.set_crc32_options(False)``).

    Raises:
        Exception: the archive is damaged.
    """
    with open(path, "rb") as file:
        if file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
            return
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                if record.CRC == 0:
                    continue
                with archive.open(record) as data:  # verifies the checksum at the end
                    while data.read(_CHUNK):
                        pass


def check_weights(weights: Any, what: str = "model") -> None:
    """Check that weights are a dict of dense tensors or arrays of numbers.

    Args:
        weights: object from a file.
        what: name of the object in the error message.

    Raises:
        ValueError: they are not.
    """
    if not isinstance(weights, dict):
        raise ValueError(f"its {what} is a {type(weights).__name__}, not a dict of tensors")
    for name, value in weights.items():
        if not isinstance(name, str):
            raise ValueError(f"its {what} has the key {name!r:.40}, which is not a string")
        is_plain = (
            value.layout is torch.strided and not value.is_meta and not value.is_quantized
            if isinstance(value, Tensor)
            else isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf"
        )
        if not is_plain:
            kind = f"{value.layout}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name:.80} in its {what} is not a dense tensor ({kind})")


def check_class_names(names: Any) -> None:
    """Check that class names from a file are a list of strings, or None.

    Raises:
        ValueError: they are not.
    """
    are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if names is not None and not are_names:
        raise ValueError(f"its class_names are {names!r:.40}, not a list of strings")


def peek_checkpoint(path: str | PathLike, parts: Iterable[str] = ()) -> dict[str, Any]:
    """Read a checkpoint as :func:`read_checkpoint` does, without the values of its tensors.

    Returns:
        Its content. The tensors are memory-mapped, so the file must not change while they are
        in use.
    """
    try:
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception:  # the file system does not support it, or the file is in the older format
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        _check_contents(checkpoint, parts)
    except Exception as error:  # torch, pickle and zip each have their own errors
        raise broken(path, error) from error
    return checkpoint


def read_checkpoint(path: str | PathLike, parts: Iterable[str] = ()) -> dict[str, Any]:
    """Read and check a checkpoint for resuming.

    Args:
        path: file of :class:`SafeCheckpointer`.
        parts: names of the states that it must contain besides model and iteration.

    Returns:
        Its content, on the CPU.

    Raises:
        BrokenCheckpoint: it cannot be read, a checksum is wrong, or a part is missing or has a
            wrong type.
    """
    try:
        check_archive(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        _check_contents(checkpoint, parts)
    except Exception as error:  # torch, pickle and zip each have their own errors
        raise broken(path, error) from error
    return checkpoint


def _check_contents(checkpoint: Any, parts: Iterable[str]) -> None:
    if not isinstance(checkpoint, dict):
        raise ValueError(f"it contains a {type(checkpoint).__name__}")
    if missing := [name for name in ("model", "iteration", *parts) if name not in checkpoint]:
        raise ValueError(f"it has no {' and no '.join(missing)}")
    check_weights(checkpoint["model"])
    counts = {"iteration": -1}
    if "model_training" in checkpoint:
        check_weights(checkpoint["model_training"], "model_training")
        counts["ema_updates"] = 0
    for name, least in counts.items():
        value = checkpoint.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**53:
            raise ValueError(f"its {name} is {value!r:.40}")
    run = checkpoint.get("run", UNNAMED_RUN)
    if not isinstance(run, dict) or {k: type(v) for k, v in run.items()} != _RUN_TYPES:
        raise ValueError(f"its run is {run!r:.40}")
    if not _RUN_ID.fullmatch(run["id"]) or not 0 <= run["processes"] < 2**31:
        raise ValueError(f"its run is {run!r:.80}")
    for name in parts:
        if not isinstance(checkpoint[name], dict):
            raise ValueError(f"its {name} is a {type(checkpoint[name]).__name__}")


def require_finite(model: nn.Module, source: str) -> None:
    """Check that no weight is NaN or infinite.

    Args:
        model: the model.
        source: file of its weights, for the error message.

    Raises:
        UserError: a weight is not finite.
    """
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(
                f"the weights {source or 'of the model'} contain non-finite values "
                f"({name}); use an earlier checkpoint"
            )
