"""Set-up of the project: the import without Detectron2, ``setup.py`` and the Makefile."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def test_import_without_detectron2_says_what_to_do_in_one_line():
    code = "import sys; sys.modules['detectron2'] = None\nimport dynamic_detr"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ImportError: dynamic_detr needs Detectron2")
    assert "pip install ./packaging/detectron2" in last


def test_setup_requires_no_detectron2(monkeypatch):
    setuptools = pytest.importorskip("setuptools")
    arguments = {}
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: arguments.update(kwargs))
    exec(
        compile((ROOT / "setup.py").read_text(), str(ROOT / "setup.py"), "exec"),
        {"__file__": str(ROOT / "setup.py"), "__name__": "__main__"},
    )
    requirements = arguments["install_requires"] + sum(arguments["extras_require"].values(), [])
    assert "torch>=2.11" in requirements
    assert not [text for text in requirements if "detectron2" in text]
    assert arguments["packages"] and arguments["python_requires"] == ">=3.10"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """Return a folder with the files that the Makefile's set-up depends on."""
    if shutil.which("make") is None:
        pytest.skip("there is no `make` on this machine")
    for name in ("Makefile", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "packaging", tmp_path / "packaging")
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["make", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def test_make_refuses_an_old_python_in_one_line(checkout):
    old = checkout / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = make(checkout, "--no-print-directory", "venv", f"PYTHON={old}")
    assert result.returncode != 0
    assert result.stderr.startswith(f"error: {old} is not Python 3.10 or newer")
    assert not (checkout / ".venv").exists()


def test_make_sets_up_once(checkout):
    assert make(checkout, "--question", "venv").returncode == 1
    ready = checkout / ".venv" / ".ready"
    ready.parent.mkdir()
    ready.touch()
    assert make(checkout, "--question", "venv").returncode == 0


def test_make_without_a_command_lists_them(checkout):
    listing = make(checkout).stdout
    for command in ("quickstart", "test", "pretrain", "clean"):
        assert re.search(rf"^{command}\s+\w", listing, re.MULTILINE)
