"""PEP 517 backend: Detectron2 0.5 as a pure-Python wheel named ``detectron2``.

For machines that cannot build Detectron2 from its source. The wheel contains the Python files of
the source distribution on the package index (``source.py``; its hash is pinned and none of it is
executed), with the changes in ``patches.py`` and a replacement of the compiled module
(``stand_in.py``). ``index.py`` downloads the source distribution.

    pip install packaging/detectron2
    DETECTRON2_SDIST=/path/of/the.tar.gz pip install packaging/detectron2      # without an index

The backend uses the standard library only.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

from .errors import PackagingError
from .patches import apply_patches
from .source import read_archive, read_files
from .wheel import DIST_INFO, NAME, VERSION, metadata_files, write_wheel

ROOT = Path(__file__).resolve().parents[1]


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None) -> str:
    """PEP 517: write the wheel into ``wheel_directory``; return its file name."""
    try:
        files, licence = read_files(read_archive())
        files = apply_patches(files)
    except PackagingError as error:
        raise SystemExit(f"error: Detectron2 cannot be built: {error}") from None
    stand_in = Path(__file__).with_name("stand_in.py")
    files["detectron2/_C.py"] = stand_in.read_text(encoding="utf-8")
    return write_wheel(wheel_directory, files, licence)


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None) -> str:
    """PEP 517: write the wheel's metadata, without a download; return the folder's name."""
    folder = Path(metadata_directory) / DIST_INFO
    folder.mkdir()
    for name, text in metadata_files(licence="").items():
        if name != "LICENSE":
            (folder / name).write_text(text, encoding="utf-8")
    return DIST_INFO


def build_sdist(sdist_directory, config_settings=None) -> str:
    """PEP 517: write an archive of this folder; return its name."""
    base = f"{NAME}-{VERSION}"
    name = f"{base}.tar.gz"
    with tarfile.open(Path(sdist_directory) / name, "w:gz", format=tarfile.PAX_FORMAT) as archive:
        for path in (ROOT / "pyproject.toml", *sorted(Path(__file__).parent.glob("*.py"))):
            archive.add(path, f"{base}/{path.relative_to(ROOT).as_posix()}")
    return name
