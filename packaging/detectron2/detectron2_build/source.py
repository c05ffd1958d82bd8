"""The source archive of the wheel: name, SHA-256 and reading.

The package index has a community upload of Detectron2 0.5, a source distribution without the C++
sources. None of it is executed or unpacked to disk: the files of the wheel are read into memory.
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

# Folders of the archive, and their places in the wheel, as in its setup.py.
FOLDERS = {
    "detectron2/": "detectron2/",
    "projects/PointRend/point_rend/": "detectron2/projects/point_rend/",
    "projects/DeepLab/deeplab/": "detectron2/projects/deeplab/",
    "projects/Panoptic-DeepLab/panoptic_deeplab/": "detectron2/projects/panoptic_deeplab/",
}
LICENSE = "LICENSE"


def read_archive(environ: Mapping[str, str] = os.environ) -> bytes:
    """Return the verified archive from the path in ``DETECTRON2_SDIST``, else from pip's index."""
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
    """Return ``data`` if it has the pinned hash, else raise."""
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise PackagingError(
            f"{origin} is not the expected {FILENAME}: its SHA-256 is {found}, expected {sha256}"
        )
    return data


def read_files(archive: bytes) -> tuple[dict[str, str], str]:
    """Return the files of the wheel by path, and the text of the licence."""
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
