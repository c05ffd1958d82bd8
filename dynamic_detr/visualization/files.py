"""Image files named on a command line, and the file names of their drawings."""

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import UserError, one_line

__all__ = ["find_images", "output_paths"]

# Not all of Pillow's registered extensions: these include PDF, HDF5 and MPEG.
_NAMES = ("avif", "bmp", "gif", "jfif", "jp2", "jpe", "jpeg", "jpg", "pbm", "pgm", "png", "pnm")
_NAMES += ("ppm", "tga", "tif", "tiff", "webp")
_IMAGE_SUFFIXES = tuple(f".{name}" for name in _NAMES)
# Other formats may not hold 8-bit RGB, or lose too much: their drawings are written as PNG.
_OUTPUT_SUFFIXES = (".jpg", ".jpeg", ".png")


def find_images(inputs: Iterable[str]) -> list[Path]:
    """Return the files that the arguments name, without duplicates.

    Args:
        inputs: files with any suffix; folders, searched for images without their subfolders;
            patterns such as ``"dir/*.jpg"`` or ``"dir/**/*.jpg"``.

    Raises:
        UserError: an argument matches no file.
    """
    found: dict[str, Path] = {}
    for name in inputs:
        # Path's methods raise on names that are too long and on loops of links; os.path's do not.
        path = Path(os.path.expanduser(name))
        if os.path.isdir(path):
            files = sorted(file for file in _entries(path) if _is_picture(file))
            problem = f"the folder {name} contains no images"
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
    return file.suffix.lower() in _IMAGE_SUFFIXES and not file.name.startswith(".")


def output_paths(images: Sequence[Path], output: str) -> list[Path]:
    """Return the path of each image's drawing.

    In a folder, drawings have the names of their images. ``_2``, ``_3``, ... is added if a name is
    taken or would overwrite an input.

    Args:
        images: the input files.
        output: a folder, which need not exist; or a file name if there is one image.

    Raises:
        UserError: one file is given for several images, or is the input itself.
    """
    target = Path(os.path.expanduser(output))
    if target.suffix.lower() in _IMAGE_SUFFIXES and not os.path.isdir(target):
        if len(images) > 1:
            raise UserError(
                f"--output {output} is one file for {len(images)} images; pass a folder"
            )
        if os.path.realpath(target) == os.path.realpath(images[0]):
            raise UserError(f"--output {output} would overwrite the input; choose another name")
        return [target]
    if os.path.lexists(target) and not os.path.isdir(target):
        raise UserError(f"--output {output} is neither a folder nor an image file name")
    # In lower case: on some file systems, a.jpg and A.JPG are one file.
    taken = {os.path.realpath(image).lower() for image in images}
    folder = Path(os.path.realpath(target))
    paths = []
    for image in images:
        suffix = image.suffix if image.suffix.lower() in _OUTPUT_SUFFIXES else ".png"
        name, count = f"{image.stem}{suffix}", 1
        while str(folder / name).lower() in taken:
            count += 1
            name = f"{image.stem}_{count}{suffix}"
        taken.add(str(folder / name).lower())
        paths.append(target / name)
    return paths
