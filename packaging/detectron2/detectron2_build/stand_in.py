"""Replacement of Detectron2's compiled module, installed as ``detectron2._C``.

Modules that import it work. Access to one of its operators raises AttributeError with an
explanation, and ``hasattr`` returns False. RoIAlign and NMS are those of torchvision.
"""


def get_compiler_version() -> str:
    """Return the compiler of this module, for ``detectron2.utils.collect_env``."""
    return "none (pure-Python build)"


def get_cuda_version() -> str:
    """Return the CUDA compiler of this module, for ``detectron2.utils.collect_env``."""
    return "none (pure-Python build)"


def has_cuda() -> bool:
    """Return whether CUDA operators were compiled, for ``detectron2.utils.collect_env``."""
    return False


def __getattr__(name: str):
    raise AttributeError(
        f"detectron2._C.{name} is a compiled operator, and this Detectron2 was built without them; "
        "install Detectron2 from its source for rotated boxes, its own deformable convolution and "
        "the fast COCO evaluator"
    )
