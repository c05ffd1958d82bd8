#!/usr/bin/env python
"""Makes the synthetic datasets: COCO-format JSON and JPEGs, the same for the same arguments.

python tools/make_scenes.py --output datasets/scenes
"""

import argparse
import os
import sys
from pathlib import Path

from dynamic_detr.data.scenes import datasets_root, write_scenes
from dynamic_detr.data.synthetic import FAMILIES, SceneOptions


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT in pixels, such as 128x128")
    return int(width), int(height)


def _whole(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=datasets_root() / "scenes",
        help="folder to write to (default: %(default)s, where training looks for it)",
    )
    parser.add_argument(
        "--families", nargs="+", choices=sorted(FAMILIES), default=sorted(FAMILIES), help="which"
    )
    parser.add_argument(
        "--splits", nargs="+", choices=["train", "val"], default=["train", "val"], help="which"
    )
    parser.add_argument("--images", type=_positive, help="scenes per split instead of the default")
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=_size,
        default=[(128, 128)],
        metavar="WIDTHxHEIGHT",
        help="a scene has one of these sizes (default: 128x128)",
    )
    parser.add_argument("--seed", type=_whole, default=0, help="another seed, other scenes")
    parser.add_argument("--processes", type=_positive, default=os.cpu_count(), help="at once")
    args = parser.parse_args(argv)
    try:
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
    except (OSError, ValueError) as error:
        sys.exit(f"make_scenes: {error}")


if __name__ == "__main__":
    main()
