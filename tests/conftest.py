"""Fixtures of all tests: paths of real data, a fixed seed, and few threads.

The real images and weights are not part of the project (their licences differ). They are looked
for in ``../shared``, or in the folder that the variable DYNAMIC_DETR_SHARED names; tests that need
what is not there are skipped and say what was missing.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch reads it: runtime/threads.py

import numpy as np
import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # kernels are interpreted; Triton asks when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parents[1]
SHARED_VARIABLE = "DYNAMIC_DETR_SHARED"
THREADS = 2  # for the small tensors of tests, more threads are slower


def pytest_configure(config: pytest.Config) -> None:
    if "OMP_NUM_THREADS" not in os.environ:  # otherwise the user has chosen
        torch.set_num_threads(min(THREADS, os.cpu_count() or 1))
    # The same examples in every run, and no deadlines, which would depend on the load.
    settings.register_profile("project", derandomize=True, deadline=None, max_examples=25)
    settings.load_profile("project")


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed the random generators before every test."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real data and weights."""
    return _require(Path(os.environ.get(SHARED_VARIABLE) or ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def bccd(shared_dir: Path) -> Path:
    """Blood cells, 3 classes: ``annotations/instances_{train,val}.json``, ``train/``, ``val/``."""
    return _require(shared_dir / "datasets" / "bccd")


@pytest.fixture(scope="session")
def coco_cc(shared_dir: Path) -> Path:
    """COCO photographs, 80 classes: ``annotations/instances_{train,val}.json``, images."""
    return _require(shared_dir / "datasets" / "coco_cc")


@pytest.fixture(scope="session")
def demo_images(shared_dir: Path) -> list[Path]:
    """Photographs for a detector to look at."""
    images = sorted(_require(shared_dir / "datasets" / "demo").rglob("*.jpg"))
    assert images, "datasets/demo holds no photographs"
    return images


@pytest.fixture(scope="session")
def r18_weights(shared_dir: Path) -> Path:
    """ImageNet weights of a ResNet-18, stem to res4, in Detectron2's names."""
    return _require(shared_dir / "weights" / "R-18-C4.pth")


def _require(path: Path) -> Path:
    if not path.exists():
        pytest.skip(
            f"{path} is absent: put the real data and weights there, "
            f"or name their folder in the variable {SHARED_VARIABLE}"
        )
    return path
