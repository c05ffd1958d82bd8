"""Differences between Detectron2 versions, from 0.5 to the newest.

No other module depends on the version. The pure-Python build of 0.5, which has no compiled
operators, counts as a version.
"""

import importlib.machinery
import importlib.util
import warnings

import torch
from detectron2.config import CfgNode
from detectron2.structures import ImageList
from detectron2.utils import comm
from torch import Tensor, nn

# Keys of newer versions and their defaults. A configuration dumped by a newer version has all of
# them, so 0.5 must accept them; it supports no other values.
_NEWER_KEYS = {
    "FLOAT32_PRECISION": "",
    "SOLVER.BASE_LR_END": 0.0,
    "SOLVER.NUM_DECAYS": 3,
    "SOLVER.RESCALE_INTERVAL": False,
    "DATALOADER.REPEAT_SQRT": True,
}


def _node_and_key(cfg: CfgNode, name: str) -> tuple[CfgNode, str]:
    *parents, key = name.split(".")
    for parent in parents:
        cfg = cfg[parent]
    return cfg, key


def add_newer_keys(cfg: CfgNode) -> list[str]:
    """Add the keys of newer versions to the defaults of 0.5.

    Args:
        cfg: Detectron2's defaults; changed in place.

    Returns:
        The added keys, which this Detectron2 ignores.
    """
    added = []
    for name, default in _NEWER_KEYS.items():
        node, key = _node_and_key(cfg, name)
        if key not in node:
            node[key] = default
            added.append(name)
    return added


def unsupported_keys(cfg: CfgNode) -> list[str]:
    """Return the keys with a value that this Detectron2 does not support."""
    from detectron2.config import get_cfg

    return [
        name
        for name in add_newer_keys(get_cfg())
        if _value(cfg, name) not in (None, _NEWER_KEYS[name])
    ]


def _value(cfg: CfgNode, name: str):
    node, key = _node_and_key(cfg, name)
    return node.get(key)


def has_compiled_ops() -> bool:
    """Return whether Detectron2 has its C++ extension; the pure-Python build does not."""
    spec = importlib.util.find_spec("detectron2._C")
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    return spec is not None and (spec.origin or "").endswith(suffixes)


def set_local_process_group(ranks_per_machine: int, machine_rank: int) -> None:
    """Create Detectron2's group of the processes of this machine; every process calls it once.

    Newer versions have a function for it; 0.5 keeps the group in a module attribute.
    """
    create = getattr(comm, "create_local_process_group", None)
    if create is not None:
        create(ranks_per_machine)
        return
    for machine in range(comm.get_world_size() // ranks_per_machine):
        first = machine * ranks_per_machine
        group = torch.distributed.new_group(list(range(first, first + ranks_per_machine)))
        if machine == machine_rank:
            comm._LOCAL_PROCESS_GROUP = group


def batch_images(images: list[Tensor], backbone: nn.Module) -> ImageList:
    """Pad images to one size that the backbone supports.

    Backbones of 0.5 have ``size_divisibility`` only; newer ones may have ``padding_constraints``.

    Args:
        images: tensors (C, H, W).
        backbone: Detectron2 backbone.
    """
    constraints = getattr(backbone, "padding_constraints", None)
    options = {"padding_constraints": constraints} if constraints else {}
    return ImageList.from_tensors(images, backbone.size_divisibility, **options)


def ignore_known_warnings() -> None:
    """Ignore deprecation warnings of a current PyTorch that Detectron2 0.5 and DDP cause.

    Detectron2 0.5 makes boxes from lists of arrays, and sends objects between processes through a
    typed storage. DDP's ``broadcast_buffers`` has no successor yet that leaves the buffers alone at
    the start.
    """
    for message in (
        "Creating a tensor from a list of numpy.ndarrays",
        "TypedStorage is deprecated",
        "`broadcast_buffers` is deprecated",
    ):
        warnings.filterwarnings("ignore", message=message)
