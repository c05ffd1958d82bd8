"""Which archive the wheel is made from: its name, its SHA-256, and how it is opened.

The index holds Detectron2 0.5 under the name of a community upload, as a source distribution
without the C++ sources. Nothing in it is executed and nothing is unpacked to disk: the files that
belong in the wheel are read from the archive into memory.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

from .errors import PackagingError
from .index import download

PROJECT = "detectron2-cdo"
FILENAME = "detectron2_cdo-0.5.tar.gz"
SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"
SDIST_VARIABLE = "DETECTRON2_SDIST"

# Folders of the archive and where they belong in the wheel, as its own setup.py places them.
FOLDERS = {
    "detectron2/": "detectron2/",
    "projects/PointRend/point_rend/": "detectron2/projects/point_rend/",
    "projects/DeepLab/deeplab/": "detectron2/projects/deeplab/",
    "projects/Panoptic-DeepLab/panoptic_deeplab/": "detectron2/projects/panoptic_deeplab/",
}
LICENSE = "LICENSE"


def read_archive(environ: Mapping[str, str] = os.environ) -> bytes:
    """The verified source archive: from ``DETECTRON2_SDIST`` where set, else from pip's index."""
    path = environ.get(SDIST_VARIABLE)
    if path:
        try:
            data = Path(path).expanduser().read_bytes()
        except OSError as error:
            raise PackagingError(
                f"{SDIST_VARIABLE}={path} cannot be read ({error.strerror}); "
                f"give the path of {FILENAME}"
            ) from error
        return verify(data, path)
    try:
        data, url = download(PROJECT, FILENAME)
    except PackagingError as error:
        raise PackagingError(f"{error}; or set {SDIST_VARIABLE} to a copy of the file") from error
    return verify(data, url)


def verify(data: bytes, origin: str, sha256: str = SHA256) -> bytes:
    """Return ``data`` if it has the pinned hash, else refuse it."""
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise PackagingError(
            f"{origin} is not the expected {FILENAME}: its SHA-256 is {found}, expected {sha256}"
        )
    return data


def read_files(archive: bytes) -> tuple[dict[str, str], str]:
    """Files of the wheel by path, and the licence's text, from the archive's bytes."""
    files: dict[str, str] = {}
    licence = ""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for member in tar:
            if not member.isfile():
                continue
            _, _, path = member.name.partition("/")
            target = _wheel_path(path)
            if target is None and path != LICENSE:
                continue
            text = tar.extractfile(member).read().decode("utf-8")
            if target is None:
                licence = text
            else:
                files[target] = text
    return files, licence


def _wheel_path(path: str) -> str | None:
    for folder, target in FOLDERS.items():
        if path.startswith(folder):
            return target + path[len(folder) :]
    return None
