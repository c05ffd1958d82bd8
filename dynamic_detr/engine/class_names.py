"""Class names of data and weights; comparing their number would not notice another order."""

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import nn

from ..errors import UserError
from .checkpoint import SafeCheckpointer

__all__ = ["check_test_sets", "data_class_names", "weights_class_names"]


def data_class_names(cfg: CfgNode) -> list[str] | None:
    """Return the class names of the first training data set; None if they are unknown."""
    if not cfg.DATASETS.TRAIN:
        return None
    names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes")
    return None if names is None else [str(name) for name in names]


def weights_class_names(cfg: CfgNode, resume: bool) -> list[str] | None:
    """Return the class names in the weights to evaluate; None if the file has none.

    Args:
        cfg: configuration; reads ``MODEL.WEIGHTS``, or ``OUTPUT_DIR`` with ``resume``.
        resume: read the last checkpoint.

    Raises:
        UserError: the weights do not exist or cannot be read.
    """
    checkpointer = SafeCheckpointer(nn.Module(), cfg.OUTPUT_DIR)
    path = checkpointer.last_whole_file() if resume else cfg.MODEL.WEIGHTS
    return checkpointer.read(path).get("class_names") if path else None


def check_test_sets(cfg: CfgNode, names: list[str]) -> None:
    """Check that the test data sets have the classes of the detector, in the same order.

    Args:
        cfg: configuration; reads ``DATASETS.TEST``.
        names: class names of the weights, or of the training data.

    Raises:
        UserError: a data set has other classes.
    """
    for data_set in cfg.DATASETS.TEST:
        own = [str(name) for name in MetadataCatalog.get(data_set).get("thing_classes") or names]
        if own != list(names):
            at = next((k for k, (a, b) in enumerate(zip(own, names, strict=False)) if a != b), None)
            at = min(len(own), len(names)) if at is None else at
            pair = [part[at] if at < len(part) else "no class" for part in (own, names)]
            raise UserError(
                f"class {at} is {pair[0]!r} in the data set {data_set} and {pair[1]!r} in the "
                "detector; give both the same classes, or name its file with --val-json and "
                "--val-images, which pair classes by name"
            )
