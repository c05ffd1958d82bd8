"""Patches that make Detectron2 0.5 run, uncompiled, with current versions of its dependencies.

The archive is pinned, so a text that is not found exactly as often as expected is an error of this
list.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import PackagingError


@dataclass(frozen=True)
class Patch:
    """Replacement of ``old``, found ``count`` times in ``file``, by ``new``, with a reason."""

    file: str
    why: str
    old: str
    new: str
    count: int = 1


NUMPY_ALIAS = "NumPy 1.24 removed its aliases of the builtin types"
PKG_RESOURCES = "setuptools 82 removed pkg_resources; Python has importlib.resources"
NO_EVALUATOR = "the fast COCO evaluator is compiled; pycocotools' evaluator replaces it"

PATCHES = (
    Patch("detectron2/data/build.py", NUMPY_ALIAS, "dtype=np.int)", "dtype=int)"),
    Patch("detectron2/data/build.py", NUMPY_ALIAS, "dtype=np.int\n", "dtype=int\n"),
    Patch("detectron2/data/datasets/pascal_voc.py", NUMPY_ALIAS, "np.str)", "str)"),
    Patch("detectron2/evaluation/pascal_voc_evaluation.py", NUMPY_ALIAS, "np.bool)", "bool)", 2),
    Patch("detectron2/evaluation/sem_seg_evaluation.py", NUMPY_ALIAS, "np.int)", "int)", 2),
    Patch("detectron2/evaluation/sem_seg_evaluation.py", NUMPY_ALIAS, "np.float)", "float)", 5),
    Patch("detectron2/structures/masks.py", NUMPY_ALIAS, "np.bool)", "bool)", 2),
    Patch("detectron2/utils/visualizer.py", NUMPY_ALIAS, "np.bool)", "bool)", 3),
    Patch("detectron2/utils/video_visualizer.py", NUMPY_ALIAS, "np.bool)", "bool)"),
    Patch(
        "detectron2/data/transforms/transform.py",
        "Pillow 10 removed Image.LINEAR, an alias of Image.BILINEAR",
        "Image.LINEAR",
        "Image.BILINEAR",
    ),
    Patch(
        "detectron2/model_zoo/model_zoo.py",
        PKG_RESOURCES,
        "import os\nfrom typing import Optional\nimport pkg_resources\n",
        "import importlib.resources\nimport os\nfrom typing import Optional\n",
    ),
    Patch(
        "detectron2/model_zoo/model_zoo.py",
        PKG_RESOURCES,
        "    cfg_file = pkg_resources.resource_filename(\n"
        '        "detectron2.model_zoo", os.path.join("configs", config_path)\n'
        "    )\n",
        "    cfg_file = str(\n"
        '        importlib.resources.files("detectron2.model_zoo") / "configs" / config_path\n'
        "    )\n",
    ),
    Patch(
        "detectron2/evaluation/coco_evaluation.py",
        NO_EVALUATOR,
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n",
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt, HAS_FAST_EVAL\n",
    ),
    Patch(
        "detectron2/evaluation/coco_evaluation.py",
        NO_EVALUATOR,
        "        self._use_fast_impl = use_fast_impl\n",
        "        self._use_fast_impl = use_fast_impl and HAS_FAST_EVAL\n",
    ),
    Patch(
        "detectron2/evaluation/coco_evaluation.py",
        NO_EVALUATOR,
        "(COCOeval_opt if use_fast_impl else COCOeval)",
        "(COCOeval_opt if use_fast_impl and HAS_FAST_EVAL else COCOeval)",
    ),
    Patch(
        "detectron2/evaluation/fast_eval_api.py",
        NO_EVALUATOR,
        "logger = logging.getLogger(__name__)\n",
        "logger = logging.getLogger(__name__)\n"
        'HAS_FAST_EVAL = hasattr(_C, "COCOevalEvaluateImages")\n',
    ),
)


def apply_patches(files: dict[str, str], patches: tuple[Patch, ...] = PATCHES) -> dict[str, str]:
    """Return a copy of ``files`` (text by path) with all patches applied in order."""
    files = dict(files)
    for patch in patches:
        if patch.file not in files:
            raise PackagingError(f"patch of {patch.file}: there is no such file ({patch.why})")
        found = files[patch.file].count(patch.old)
        if found != patch.count:
            raise PackagingError(
                f"patch of {patch.file}: {patch.old!r} was found {found} times, "
                f"expected {patch.count} ({patch.why})"
            )
        files[patch.file] = files[patch.file].replace(patch.old, patch.new)
    return files
