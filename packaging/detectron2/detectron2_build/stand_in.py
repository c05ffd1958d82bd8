"""Stand-in for Detectron2's compiled module, installed as ``detectron2._C``.

The module imports, so that everything around it does. An operator that it would hold is an
AttributeError that says so: ``hasattr`` answers False, and whoever calls the operator reads why.
RoIAlign and NMS do not come from here but from torchvision.
"""


def get_compiler_version() -> str:
    """For ``detectron2.utils.collect_env``: the compiler of this module."""
    return "none (pure-Python build)"


def get_cuda_version() -> str:
    """For ``detectron2.utils.collect_env``: the CUDA compiler of this module."""
    return "none (pure-Python build)"


def has_cuda() -> bool:
    """For ``detectron2.utils.collect_env``: whether CUDA operators were compiled."""
    return False


def __getattr__(name: str):
    raise AttributeError(
        f"detectron2._C.{name} is a compiled operator, and this Detectron2 was built without them; "
        "install Detectron2 from its source to have rotated boxes, its own deformable convolution "
        "and the fast COCO evaluator"
    )
