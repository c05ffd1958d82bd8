"""Published weights of other projects under this project's names: one table for each system.

Each system's module, named like the system, has a function

    def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]

from the published names to those of the model's `state_dict`; `rename` does most of it. It keeps
the rows of class heads as they are published: `tools/convert_weights.py` selects them.
"""

import re
from collections.abc import Iterable

import torch
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from torch import Tensor

from dynamic_detr.errors import UserError

__all__ = ["CONFIGS", "SYSTEMS", "rename", "select_coco_classes"]

SYSTEMS = ("detr", "deformable-detr", "smca", "sparse-rcnn", "dyhead", "huggingface")
CONFIGS = {  # what each is converted for where --config-file does not say
    "detr": "DETR/detr_R_50.yaml",
    "deformable-detr": "Deformable-DETR/deformable_detr_R_50.yaml",
    "smca": "SMCA/smca_single_scale_R_50.yaml",
    "sparse-rcnn": "Sparse-RCNN/sparse_rcnn_R_50.yaml",
    "dyhead": "DyHead/faster_rcnn_R_50_FPN_dyhead.yaml",
}
COCO_ROWS = 91  # the DETR family's class heads have a row for each COCO id from 0 to 90


def rename(
    weights: dict[str, Tensor], rules: Iterable[tuple[str, str | None]]
) -> dict[str, Tensor]:
    r"""Weights under other names.

    Args:
        weights: by name.
        rules: a pattern that a whole name must match, and the new name, in which \1 stands for
            the pattern's first group; None leaves the weight out. The first rule that fits counts.

    Returns:
        The weights by their new names.

    Raises:
        UserError: no rule fits a name, or two different weights get the same name.
    """
    compiled = [(re.compile(pattern), name) for pattern, name in rules]
    renamed = {}
    for old, weight in weights.items():
        match, name = next(
            ((m, new) for pattern, new in compiled if (m := pattern.fullmatch(old))), (None, None)
        )
        if match is None:
            raise UserError(f"{old} is left over: no weight of the model has that name there")
        if name is None:
            continue
        new = match.expand(name)
        if new in renamed and not torch.equal(renamed[new], weight):
            raise UserError(f"{old} is one of two different weights for {new}")
        renamed[new] = weight
    return renamed


def select_coco_classes(rows: Tensor) -> Tensor:
    """The rows of a class head by COCO id, reduced to the 80 classes in the order of their ids.

    Args:
        rows: (91, …), row i for the category with id i; or (92, …) with "no object" last.

    Returns:
        (80, …), or (81, …) with "no object" last.
    """
    ids = sorted(category["id"] for category in COCO_CATEGORIES if category["isthing"])
    return rows[[*ids, *range(COCO_ROWS, len(rows))]]
