"""Fixtures of all tests: paths of real data, a fixed seed, and few threads.

Real images and weights are not part of the project because of their licences. They are expected in
``../shared``, or in the folder in the variable DYNAMIC_DETR_SHARED. Tests without their data are
skipped.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch reads it: runtime/threads.py

import numpy as np
import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # Triton reads the variable when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parents[1]
SHARED_VARIABLE = "DYNAMIC_DETR_SHARED"
THREADS = 2  # more threads are slower for small tensors


def pytest_configure(config: pytest.Config) -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(THREADS, os.cpu_count() or 1))
    # The same examples in every run, and no deadline, as the machine may be busy.
    settings.register_profile("project", derandomize=True, deadline=None, max_examples=25)
    settings.load_profile("project")


@pytest.fixture(params=["plain", "kernel"])
def device(request: pytest.FixtureRequest) -> str:
    """Return the device of the plain path, or that of the kernels by the module's `on_kernel`."""
    return "cpu" if request.param == "plain" else request.getfixturevalue("on_kernel")


@pytest.fixture(autouse=True)
def seed() -> int:
    """Set the same random state before every test."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """Forget compiled graphs before and after a test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of six held-out scenes with the classes of the shipped detector."""
    # not at the top, where TRITON_INTERPRET is not set yet
    from dynamic_detr.data.scenes import write_scenes
    from dynamic_detr.data.synthetic import FAMILIES

    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, FAMILIES["shapes"], "val", 6)
    return root / "shapes"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Return the folder of real data and weights."""
    return _require(Path(os.environ.get(SHARED_VARIABLE) or ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def bccd(shared_dir: Path) -> Path:
    """Return the folder of blood cells, 3 classes.

    It has ``annotations/instances_{train,val}.json``, ``train/`` and ``val/``.
    """
    return _require(shared_dir / "datasets" / "bccd")


@pytest.fixture(scope="session")
def coco_cc(shared_dir: Path) -> Path:
    """Return the folder of COCO photographs, 80 classes: annotations as in `bccd`, and images."""
    return _require(shared_dir / "datasets" / "coco_cc")


@pytest.fixture(scope="session")
def demo_images(shared_dir: Path) -> list[Path]:
    """Return the paths of photographs."""
    images = sorted(_require(shared_dir / "datasets" / "demo").rglob("*.jpg"))
    assert images, "datasets/demo has no photographs"
    return images


@pytest.fixture(scope="session")
def r18_weights(shared_dir: Path) -> Path:
    """Return ImageNet weights of a ResNet-18, stem to res4, with Detectron2's names."""
    return _require(shared_dir / "weights" / "R-18-C4.pth")


def _require(path: Path) -> Path:
    if not path.exists():
        pytest.skip(
            f"{path} is absent: put the real data and weights there, "
            f"or set the variable {SHARED_VARIABLE} to their folder"
        )
    return path
