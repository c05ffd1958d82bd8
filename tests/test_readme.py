"""Commands of the READMEs: all are parsed; those without GPUs and network are run."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_compare import compare
from tiny_run import write_data

from demo import demo
from dynamic_detr.cli.arguments import build_parser
from dynamic_detr.files.config_file import find_config, read_config
from dynamic_detr.files.model_file import is_model_file

READMES = ("README.md", "demo/README.md")
# Commands that are run in order, as they need each other's output. The others need COCO or weights
# from a network.
RUN = re.compile(r"configs/quickstart/own_data|output/cells|--model quickstart")
WINDOW = "--webcam"


def blocks(language: str) -> list[str]:
    """Return the code blocks of a language in all READMEs."""
    text = "\n".join((ROOT / name).read_text() for name in READMES)
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_can_be_parsed(words):
    program, *arguments = words
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if program == "pip":
        assert arguments[0] == "install"
        return
    assert program == "python" and (ROOT / arguments[0]).is_file()
    if arguments[0] == "demo/demo.py":
        config_file, opts = _demo_configuration(arguments[1:])
    elif arguments[0] == "tools/compare.py":
        for config_file in compare.parse(arguments[1:]).config_file or []:
            read_config(str(find_config(str(_here(config_file)))), [])
        return
    elif arguments[0] == "train_net.py":
        args = build_parser().parse_args(arguments[1:])
        config_file, opts = args.config_file, args.opts
    else:
        return
    if config_file and not (is_model_file(config_file) and "/" in config_file):
        read_config(str(find_config(str(_here(config_file)))), opts)


def _demo_configuration(arguments: list[str]) -> tuple[str, list[str]]:
    args = demo.build_parser().parse_args(arguments)
    return args.config_file, args.opts


def _here(name: str) -> Path | str:
    return ROOT / name if (ROOT / name).exists() else name


def workplace(folder: Path) -> dict[str, str]:
    """Make a folder like a clone with the data of the READMEs' commands.

    Returns:
        Environment variables for commands in the folder.
    """
    for name in ("train_net.py", "configs", "demo", "tools"):
        (folder / name).symlink_to(ROOT / name)
    for split in ("train", "val"):
        json_file, images = write_data(folder / "cells" / split)
        shutil.move(json_file, folder / "cells" / f"{split}.json")
    shutil.copytree(images, folder / "photos")
    shutil.copytree(images, folder / "val")
    shapes = (folder / "cells" / "val.json").read_text().replace("dark", "disc")
    (folder / "val.json").write_text(shapes)
    shutil.copy(images / "0.png", folder / "photo.jpg")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        environment.pop(name, None)
    return environment


@pytest.mark.long
def test_commands_and_code_run(tmp_path):
    """Run the commands in order, with two training iterations, and then the Python code."""
    from test_demo import write_video

    environment = workplace(tmp_path)
    write_video(tmp_path / "clip.mp4")
    ran = 0
    for words in commands():
        line = shlex.join(words)
        if not RUN.search(line) or WINDOW in words:
            continue
        words = [sys.executable, *words[1:]]
        if "configs/quickstart/own_data.yaml" in line:
            words += ["SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "(1,)"]
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{line}: {done.stderr[-2000:]}"
        ran += 1
    assert ran >= 8
    for name in ("results.json", "drawn/0.png", "output/cells/curves.svg", "clip_drawn.mp4"):
        assert (tmp_path / name).stat().st_size > 0

    model = tmp_path / "output" / "quickstart" / "finetune" / "model_final.safetensors"
    model.parent.mkdir(parents=True)
    shutil.copy(tmp_path / "output" / "cells" / "model_final.safetensors", model)
    code = "array = __import__('numpy').zeros((8, 8, 3), 'uint8')\n" + "\n".join(blocks("python"))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "stages.png").is_file() and (tmp_path / "discs.png").is_file()
