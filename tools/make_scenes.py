#!/usr/bin/env python
"""Draw the synthetic datasets as JPEG files with annotations in COCO format.

python tools/make_scenes.py --output datasets/scenes
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from dynamic_detr.cli.exits import report_user_errors
from dynamic_detr.data.scenes import datasets_root, write_scenes
from dynamic_detr.data.synthetic import FAMILIES, SceneOptions
from dynamic_detr.errors import UserError, one_line
from dynamic_detr.files.writing import as_user_error


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT in pixels, such as 128x128")
    return int(width), int(height)


def at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer >= {least}")
        return int(text)

    return parse


def make(args: argparse.Namespace) -> None:
    """Draw the scenes of all families and splits."""
    options = SceneOptions(sizes=tuple(args.sizes))
    for family in args.families:
        for split in args.splits:
            written = write_scenes(
                args.output,
                FAMILIES[family],
                split,
                args.images,
                args.seed,
                options,
                args.processes,
            )
            folder = args.output / family / split
            print(f"{folder}: {'made' if written else 'already there'}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=datasets_root() / "scenes",
        help="folder of the datasets (default: %(default)s, where training expects them)",
    )
    names = sorted(FAMILIES)
    parser.add_argument("--families", nargs="+", choices=names, default=names, help="default: all")
    splits = ["train", "val"]
    parser.add_argument("--splits", nargs="+", choices=splits, default=splits, help="default: both")
    parser.add_argument("--images", type=at_least(1), help="number of scenes per split")
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=_size,
        default=[(128, 128)],
        metavar="WIDTHxHEIGHT",
        help="possible sizes of a scene (default: 128x128)",
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the dataset")
    parser.add_argument(
        "--processes", type=at_least(1), default=os.cpu_count(), help="default: number of cores"
    )
    args = parser.parse_args(argv)
    with report_user_errors("make_scenes.py"):
        try:
            with as_user_error(str(args.output)):
                make(args)
        except ValueError as error:
            raise UserError(one_line(error)) from error


if __name__ == "__main__":
    main()
