"""Which pictures the command line means, and under which names their drawings are written."""

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import UserError, one_line

__all__ = ["IMAGE_SUFFIXES", "find_images", "output_paths"]

_NAMES = ("avif", "bmp", "gif", "jfif", "jp2", "jpe", "jpeg", "jpg", "pbm", "pgm", "png", "pnm")
_NAMES += ("ppm", "tga", "tif", "tiff", "webp")
IMAGE_SUFFIXES = tuple(f".{name}" for name in _NAMES)
# Others, that may hold no 8-bit RGB or lose too much, are written as PNG.
_WRITTEN_AS_THEY_ARE = (".jpg", ".jpeg", ".png")


def find_images(inputs: Iterable[str]) -> list[Path]:
    """The files that the arguments name, each once.

    Args:
        inputs: files, whatever their suffix; folders, whose pictures are taken (not those of
            folders inside); patterns such as ``"dir/*.jpg"`` or ``"dir/**/*.jpg"``.

    Raises:
        UserError: an argument names nothing.
    """
    found: dict[str, Path] = {}
    for name in inputs:
        # Of os.path, as Path's methods stumble over long names and loops of links.
        path = Path(os.path.expanduser(name))
        if os.path.isdir(path):
            files = sorted(file for file in _entries(path) if _is_picture(file))
            problem = f"the folder {name} holds no pictures"
        elif os.path.exists(path):
            files, problem = [path], ""
        else:
            matches = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(name) else []
            files = [Path(match) for match in matches if not os.path.isdir(match)]
            problem = "matches no file" if glob.has_magic(name) else "does not exist"
            problem = f"{name:.300} {problem}"
        if not files:
            raise UserError(problem)
        for file in files:
            found.setdefault(os.path.realpath(file), file)
    return list(found.values())


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({one_line(error)})") from error


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")


def output_paths(images: Sequence[Path], output: str) -> list[Path]:
    """Where the drawing of each picture goes.

    A folder receives them under their own names; where two would collide, or an input would be
    overwritten, ``_2``, ``_3``, ... is added.

    Args:
        images: the inputs.
        output: a folder, made where it does not exist; or a picture's name for a single input.

    Raises:
        UserError: one file for several pictures, or for the input itself.
    """
    target = Path(os.path.expanduser(output))
    if target.suffix.lower() in IMAGE_SUFFIXES and not os.path.isdir(target):
        if len(images) > 1:
            raise UserError(
                f"--output {output} is one file and there are {len(images)} pictures; name a folder"
            )
        if os.path.realpath(target) == os.path.realpath(images[0]):
            raise UserError(f"--output {output} would overwrite the input; choose another name")
        return [target]
    if os.path.lexists(target) and not os.path.isdir(target):
        raise UserError(f"--output {output} is neither a folder nor a picture's name")
    # In lower case, as some file systems take a.jpg and A.JPG for the same.
    taken = {os.path.realpath(image).lower() for image in images}
    folder = Path(os.path.realpath(target))
    paths = []
    for image in images:
        suffix = image.suffix if image.suffix.lower() in _WRITTEN_AS_THEY_ARE else ".png"
        name, count = f"{image.stem}{suffix}", 1
        while str(folder / name).lower() in taken:
            count += 1
            name = f"{image.stem}_{count}{suffix}"
        taken.add(str(folder / name).lower())
        paths.append(target / name)
    return paths
