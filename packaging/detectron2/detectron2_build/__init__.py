"""PEP 517 backend: Detectron2 0.5 as a pure-Python wheel named ``detectron2``.

For machines where Detectron2 cannot be had from its source. The wheel is made from the source
distribution that the package index holds (``source.py``: pinned hash, never executed, fetched as
``index.py`` says), with the repairs of ``patches.py`` and a stand-in for the compiled module
(``stand_in.py``). Whoever has a Detectron2 needs none of this.

    pip install packaging/detectron2
    DETECTRON2_SDIST=/path/of/the.tar.gz pip install packaging/detectron2      # without an index

Needs nothing but the standard library.
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
    """PEP 517: write the wheel into ``wheel_directory``; returns its file name."""
    try:
        files, licence = read_files(read_archive())
        files = apply_patches(files)
    except PackagingError as error:
        raise SystemExit(f"error: Detectron2 cannot be built: {error}") from None
    stand_in = Path(__file__).with_name("stand_in.py")
    files["detectron2/_C.py"] = stand_in.read_text(encoding="utf-8")
    return write_wheel(wheel_directory, files, licence)


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None) -> str:
    """PEP 517: the wheel's metadata alone, without fetching anything; returns the folder's name."""
    folder = Path(metadata_directory) / DIST_INFO
    folder.mkdir()
    for name, text in metadata_files(licence="").items():
        if name != "LICENSE":
            (folder / name).write_text(text, encoding="utf-8")
    return DIST_INFO


def build_sdist(sdist_directory, config_settings=None) -> str:
    """PEP 517: an archive of this folder, which can build the wheel in turn; returns its name."""
    base = f"{NAME}-{VERSION}"
    name = f"{base}.tar.gz"
    with tarfile.open(Path(sdist_directory) / name, "w:gz", format=tarfile.PAX_FORMAT) as archive:
        for path in (ROOT / "pyproject.toml", *sorted(Path(__file__).parent.glob("*.py"))):
            archive.add(path, f"{base}/{path.relative_to(ROOT).as_posix()}")
    return name
