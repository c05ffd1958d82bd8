"""Writer of a wheel file (PEP 427) with files, metadata and RECORD.

The output is reproducible: entries are sorted and have a fixed time.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path

NAME = "detectron2"
VERSION = "0.5+dynamicdetr.1"
TAG = "py3-none-any"
WHEEL_NAME = f"{NAME}-{VERSION}-{TAG}.whl"
DIST_INFO = f"{NAME}-{VERSION}.dist-info"

# Packages that the Python code imports. As in Detectron2, the user chooses the builds of PyTorch
# and torchvision and the package of OpenCV (for drawing).
REQUIRES = (
    "Pillow>=7.1",
    "PyYAML>=5.1",
    "cloudpickle",
    "fvcore>=0.1.5,<0.1.6",
    "hydra-core>=1.1",
    "iopath>=0.1.7",
    "matplotlib",
    "numpy",
    "omegaconf>=2.1,<2.4",
    "packaging",
    "pycocotools>=2.0.2",
    "tabulate",
    "tensorboard",
    "termcolor>=1.1",
    "tqdm>4.29.0",
    "yacs>=0.1.8",
)

ZIP_TIME = (1980, 1, 1, 0, 0, 0)


def metadata_files(licence: str) -> dict[str, str]:
    """Return the ``.dist-info`` files except RECORD, as text by name."""
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {NAME}",
        f"Version: {VERSION}",
        "Summary: Detectron2 0.5 as pure Python, repaired for today's PyTorch and NumPy",
        "Home-page: https://github.com/facebookresearch/detectron2",
        "Author: FAIR",
        "License: Apache-2.0",
        "Requires-Python: >=3.10",
        *(f"Requires-Dist: {requirement}" for requirement in REQUIRES),
    ]
    wheel = [
        "Wheel-Version: 1.0",
        "Generator: detectron2_build",
        "Root-Is-Purelib: true",
        f"Tag: {TAG}",
    ]
    return {
        "METADATA": "\n".join(lines) + "\n",
        "WHEEL": "\n".join(wheel) + "\n",
        "LICENSE": licence,
        "top_level.txt": f"{NAME}\n",
    }


def write_wheel(directory: str | Path, files: dict[str, str], licence: str) -> str:
    """Write the wheel of ``files`` (text by path) into ``directory``; return its file name."""
    entries = {path: text.encode("utf-8") for path, text in sorted(files.items())}
    for name, text in metadata_files(licence).items():
        entries[f"{DIST_INFO}/{name}"] = text.encode("utf-8")
    record = f"{DIST_INFO}/RECORD"
    rows = [f"{path},{_digest(data)},{len(data)}" for path, data in entries.items()]
    entries[record] = ("\n".join([*rows, f"{record},,"]) + "\n").encode("utf-8")

    with zipfile.ZipFile(Path(directory) / WHEEL_NAME, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in entries.items():
            entry = zipfile.ZipInfo(path, ZIP_TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)
    return WHEEL_NAME


def _digest(data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=")
    return f"sha256={digest.decode('ascii')}"
