"""Conversion of published weights to the names of this project, one module per source.

Each module has a function

    def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]

from the published names to those of the model's `state_dict`. It keeps all rows of the class heads;
`tools/convert_weights.py` selects the rows of the 80 classes.
"""

import re
from collections.abc import Iterable

import torch
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from torch import Tensor

from dynamic_detr.errors import UserError

__all__ = ["CONFIGS", "SYSTEMS", "rename", "select_coco_classes"]

SYSTEMS = ("detr", "deformable-detr", "smca", "sparse-rcnn", "dyhead", "huggingface")
CONFIGS = {  # default of --config-file
    "detr": "DETR/detr_R_50.yaml",
    "deformable-detr": "Deformable-DETR/deformable_detr_R_50.yaml",
    "smca": "SMCA/smca_single_scale_R_50.yaml",
    "sparse-rcnn": "Sparse-RCNN/sparse_rcnn_R_50.yaml",
    "dyhead": "DyHead/faster_rcnn_R_50_FPN_dyhead.yaml",
}
COCO_ROWS = 91  # class heads of the DETR family have a row for each COCO id from 0 to 90


def rename(
    weights: dict[str, Tensor], rules: Iterable[tuple[str, str | None]]
) -> dict[str, Tensor]:
    r"""Rename weights.

    Args:
        weights: weights by name.
        rules: pairs of a pattern for the whole name and the new name, in which \1 is the first
            group of the pattern; None drops the weight. The first match applies.

    Returns:
        Weights by their new names.

    Raises:
        UserError: no rule matches a name, or two different weights get the same name.
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
    """Select the rows of the 80 COCO classes, sorted by id.

    Args:
        rows: (91, ...), row i for the category with id i; or (92, ...) with "no object" last.

    Returns:
        (80, ...), or (81, ...) with "no object" last.
    """
    ids = sorted(category["id"] for category in COCO_CATEGORIES if category["isthing"])
    return rows[[*ids, *range(COCO_ROWS, len(rows))]]
