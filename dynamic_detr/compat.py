"""What differs between Detectron2 versions, from 0.5 to the newest; nothing else in the project
asks for a version.

The pure-Python build of 0.5 counts as a version here: it has no compiled operators.
"""

import importlib.machinery
import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.structures import ImageList
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# Keys of newer versions, with their defaults. A configuration that a newer version dumped names
# all of them, so 0.5 must know them; other values than these it cannot act upon.
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
    """Give 0.5 the keys that newer versions have.

    Args:
        cfg: Detectron2's defaults; changed in place.

    Returns:
        The keys that were added: this Detectron2 does nothing with them.
    """
    added = []
    for name, default in _NEWER_KEYS.items():
        node, key = _node_and_key(cfg, name)
        if key not in node:
            node[key] = default
            added.append(name)
    return added


def unsupported_keys(cfg: CfgNode) -> list[str]:
    """Keys that are set to something that this Detectron2 has no notion of."""
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
    """Whether this Detectron2 has its C++ extension (the pure-Python build does not)."""
    spec = importlib.util.find_spec("detectron2._C")
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    return spec is not None and (spec.origin or "").endswith(suffixes)


def coco_evaluator(dataset_name: str, output_dir: str, evaluator: type | None = None):
    """Detectron2's COCO evaluator; its fast C++ implementation only where that was compiled.

    Args:
        dataset_name: as registered with Detectron2.
        output_dir: where the detections are written.
        evaluator: a subclass to make in its place.
    """
    from detectron2.evaluation import COCOEvaluator

    evaluator = evaluator or COCOEvaluator
    return evaluator(dataset_name, output_dir=output_dir, use_fast_impl=has_compiled_ops())


def distribute(model: nn.Module) -> nn.Module:
    """Wrap a model for data-parallel training if there are several processes.

    Detectron2's ``create_ddp_model`` names a GPU even where the model is on the CPU.

    Args:
        model: on the device where it is trained.
    """
    if comm.get_world_size() == 1:
        return model
    on_gpu = next(model.parameters()).is_cuda
    device_ids = [torch.cuda.current_device()] if on_gpu else None
    return DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)


def set_local_process_group(ranks_per_machine: int, machine_rank: int) -> None:
    """Tell Detectron2 which processes share this machine; called once, by every process.

    0.5 keeps the group in a module attribute; newer versions have a function that makes it.
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
    """Pads images to one size, as the backbone asks for.

    0.5 knows ``size_divisibility`` alone; newer backbones may also have ``padding_constraints``.

    Args:
        images: (C, H, W) each.
        backbone: a Detectron2 backbone.
    """
    constraints = getattr(backbone, "padding_constraints", None)
    options = {"padding_constraints": constraints} if constraints else {}
    return ImageList.from_tensors(images, backbone.size_divisibility, **options)


def writer_makers(output_dir: str, max_iter: int) -> list[Callable]:
    """Makers of the writers of metrics: terminal, ``metrics.json``, and TensorBoard where it is
    installed. A writer makes its file when it is made.

    Detectron2's ``default_writers`` fails without TensorBoard.
    """
    from detectron2.utils.events import CommonMetricPrinter, JSONWriter, TensorboardXWriter

    metrics = str(Path(output_dir) / "metrics.json")
    makers = [partial(CommonMetricPrinter, max_iter), partial(JSONWriter, metrics)]
    if importlib.util.find_spec("tensorboard") is not None:
        makers.append(partial(TensorboardXWriter, output_dir))
    return makers


def report_rate(hooks: list, base_lr: float) -> None:
    """Let Detectron2's ``LRScheduler`` hook report the rate of a group that has the base rate.

    It picks the group with the most parameters, which may well be the backbone's.

    Args:
        hooks: of a trainer, after their ``before_train``.
        base_lr: ``SOLVER.BASE_LR``.
    """
    from detectron2.engine.hooks import LRScheduler

    for hook in hooks:
        if isinstance(hook, LRScheduler):
            rates = [group["initial_lr"] for group in hook.scheduler.optimizer.param_groups]
            if base_lr in rates:
                hook._best_param_group_id = rates.index(base_lr)


def zoo_config(name: str) -> Path | None:
    """The file of a model-zoo configuration such as ``COCO-Detection/retinanet_R_50_FPN_1x.yaml``.

    Read from the installed package directly: ``model_zoo`` imports ``pkg_resources`` in 0.5.

    Returns:
        None if this Detectron2 has no configuration of that name.
    """
    folder = Path(detectron2.__file__).parent / "model_zoo" / "configs"
    path = folder / name
    return path if name and os.path.isfile(path) else None


def ignore_known_warnings() -> None:
    """Silence, in this process, what a current PyTorch says of harmless habits.

    Detectron2 0.5 makes boxes from lists of arrays, and processes exchange objects by way of a
    typed storage; :func:`distribute` must name ``broadcast_buffers`` until what replaces it can
    also leave the buffers alone at the start.
    """
    for message in (
        "Creating a tensor from a list of numpy.ndarrays",
        "TypedStorage is deprecated",
        "`broadcast_buffers` is deprecated",
    ):
        warnings.filterwarnings("ignore", message=message)
