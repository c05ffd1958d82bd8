"""Every configuration key and command-line flag, so that none disappears unnoticed.

`python -m tests.test_frozen_surface` writes the list anew.
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from dynamic_detr.cli.arguments import build_parser
from dynamic_detr.config import KEYS

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests" / "golden" / "surface.txt"


def flags(program: str, parser: argparse.ArgumentParser) -> list[str]:
    return [f"{program} {name}" for a in parser._actions for name in a.option_strings or [a.dest]]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def surface() -> list[str]:
    sys.path.insert(0, str(ROOT / "tools"))  # of which compare.py is made
    programs = {"train_net.py": build_parser()}
    for path in ("demo/demo.py", "tools/compare.py"):
        programs[Path(path).name] = load(ROOT / path).build_parser()
    lines = [key.name for key in KEYS]
    for program, parser in programs.items():
        lines += flags(program, parser)
    return sorted(lines)


def test_nothing_disappears_unnoticed():
    assert surface() == LIST.read_text().splitlines()


if __name__ == "__main__":
    LIST.write_text("\n".join(surface()) + "\n")
