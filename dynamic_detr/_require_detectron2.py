"""Imported first: without Detectron2 nothing here works, and one line says what to do."""

import importlib.util
import warnings

if importlib.util.find_spec("detectron2") is None:
    raise ImportError(
        "dynamic_detr needs Detectron2, which is not installed: build it from its source "
        "(see its INSTALL.md) or run `pip install ./packaging/detectron2` in this project's folder"
    )

# Importing Detectron2 0.5 says so twice on a current PyTorch, and a user can do nothing about it.
warnings.filterwarnings(
    "ignore", message="`torch.jit.script` is deprecated", category=FutureWarning
)
