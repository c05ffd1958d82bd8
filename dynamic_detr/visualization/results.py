"""Detections as COCO's list of results."""

from pathlib import Path

from detectron2.structures import Instances

from .draw import class_names

__all__ = ["coco_results"]


def coco_results(path: Path, instances: Instances, metadata=None) -> list[dict]:
    """One dictionary for each detection, as the COCO tools read them.

    Args:
        path: of the picture; a name of digits alone, as COCO's, becomes the number `image_id`,
            any other is the `image_id` itself.
        instances: with pred_boxes (corners in pixels), scores and pred_classes.
        metadata: Detectron2's; classes become the data set's category ids where it has them, else
            they are indices from 0.

    Returns:
        Dictionaries with image_id, file_name, category_id, category (its name), bbox (left, top,
        width, height in pixels) and score.
    """
    indices = getattr(metadata, "thing_dataset_id_to_contiguous_id", None) or {}
    ids = {index: category for category, index in indices.items()}
    classes = instances.pred_classes.tolist()
    boxes, scores = instances.pred_boxes.tensor.tolist(), instances.scores.tolist()
    return [
        {
            "image_id": int(path.stem) if path.stem.isdecimal() else path.name,
            "file_name": path.name,
            "category_id": ids.get(k, k),
            "category": name,
            "bbox": [round(value, 2) for value in (x0, y0, x1 - x0, y1 - y0)],
            "score": round(score, 5),
        }
        for k, name, (x0, y0, x1, y1), score in zip(
            classes, class_names(metadata, classes), boxes, scores, strict=True
        )
    ]
