#!/usr/bin/env python
"""Look at what a detector finds in pictures, a video, or before a camera.

Every flag of Detectron2's demo works here, with Dynamic DETR and with Detectron2's own detectors.
"""

import argparse
import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dynamic_detr.engine.exits import report_user_errors
from dynamic_detr.engine.setup import find_config, read_config
from dynamic_detr.errors import UserError, one_line, tell
from dynamic_detr.visualization import Predictor, draw_detections, draw_stages
from dynamic_detr.visualization.draw import confident, new_canvas
from dynamic_detr.visualization.files import find_images, output_paths
from dynamic_detr.visualization.images import read_image, write_image
from dynamic_detr.visualization.predictor import require_stages
from dynamic_detr.visualization.results import coco_results
from dynamic_detr.visualization.video import VideoReader, VideoWriter, open_camera
from dynamic_detr.visualization.window import Window

PROGRAM = "demo.py"
TITLE = "Esc or q: stop"
EXIT_SKIPPED = 1

EPILOG = """
examples:
  demo.py --config-file configs/COCO-Detection/dynamic_detr_R_50_1x.yaml \\
          --input photos/ more/*.png --output drawn/ --opts MODEL.WEIGHTS model_final.pth
  demo.py ... --stages                  every decoder stage side by side
  demo.py ... --video-input clip.mp4 --output clip_drawn.mp4
  demo.py ... --opts MODEL.WEIGHTS model_final.pth MODEL.DEVICE cpu

exit codes: 0 done; 1 something was broken and skipped; 2 wrong arguments, configuration or
weights; 130 stopped by Ctrl-C
"""


def build_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments, `--stages` and `--json`."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config-file", default="", metavar="FILE", help="configuration of the detector"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        metavar="IMAGE",
        help="pictures, folders of them, or patterns such as 'folder/*.jpg'",
    )
    source.add_argument("--video-input", metavar="FILE", help="a video")
    source.add_argument("--webcam", action="store_true", help="the first camera")
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="folder or file to write to; without it a window is opened",
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="lowest score that is shown (default: 0.5)",
    )
    parser.add_argument(
        "--stages",
        action="store_true",
        help="show the boxes of every decoder stage side by side (DynamicDETR)",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="also write the detections of --input as COCO results"
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="configuration keys to change, such as MODEL.WEIGHTS model.pth",
    )
    return parser


def load_predictor(args: argparse.Namespace) -> Predictor:
    """The detector that the arguments describe.

    Raises:
        UserError: it cannot be built, or cannot do what is asked.
    """
    cfg = read_config(find_config(args.config_file), args.opts)
    # Detectron2's own detectors drop what is below their threshold before they merge boxes.
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = args.confidence_threshold
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = args.confidence_threshold
    if args.stages:
        require_stages(cfg.MODEL.META_ARCHITECTURE)
    return Predictor.from_config(cfg)


def run_images(args: argparse.Namespace) -> int:
    """Draws every picture that can be read; the exit code."""
    images = find_images(args.input)
    targets = output_paths(images, args.output) if args.output else [None] * len(images)
    window = None if args.output or args.json else Window(TITLE)
    predictor = load_predictor(args)
    results, skipped, found = [], 0, 0
    for path, target in zip(tqdm(images, unit="image", disable=None), targets, strict=True):
        try:
            image = read_image(path)
        except UserError as error:
            tqdm.write(f"{PROGRAM}: skipped: {one_line(error)}", file=sys.stderr)
            skipped += 1
            continue
        stages = predictor.stages(image, args.confidence_threshold) if args.stages else []
        if stages and not args.json:
            instances = stages[-1]
        else:
            instances = confident(predictor(image), args.confidence_threshold)
        found += len(instances)
        if args.json:
            results += coco_results(path, instances, predictor.metadata)
        if target or window:
            if stages:
                drawing = draw_stages(image, stages, predictor.metadata)
            else:
                drawing = draw_detections(
                    image, instances, predictor.metadata, args.confidence_threshold
                )
            if target:
                write_image(target, drawing)
            elif not window.show(drawing):
                break
    if args.json:
        write_json(args.json, results)
    done = f"; drawn in {args.output}" if args.output else ""
    tell(f"pictures: {len(images) - skipped}, objects: {found}, skipped: {skipped}{done}")
    return EXIT_SKIPPED if skipped else 0


def write_json(name: str, results: list[dict]) -> None:
    try:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(json.dumps(results, indent=1))
    except OSError as error:
        raise UserError(f"--json {name} cannot be written ({one_line(error)})") from error


def frame_drawer(
    args: argparse.Namespace, predictor: Predictor
) -> Callable[[np.ndarray], np.ndarray]:
    """How a frame becomes a drawing of it; colours stay with an object from frame to frame."""
    threshold = args.confidence_threshold
    if args.stages:
        return lambda frame: draw_stages(
            frame, predictor.stages(frame, threshold), predictor.metadata
        )
    from detectron2.utils.video_visualizer import VideoVisualizer

    visualizer = VideoVisualizer(predictor.metadata)
    return lambda frame: visualizer.draw_instance_predictions(
        frame, confident(predictor(frame), threshold)
    ).get_image()


def video_target(source: str, output: str) -> Path:
    """Where the drawn video goes: the file `output`, or into the folder `output`."""
    target = Path(os.path.expanduser(output))
    if os.path.isdir(target) or not target.suffix:
        target /= f"{Path(source).stem}.mp4"
    if os.path.realpath(target) == os.path.realpath(source):
        raise UserError(f"--output {output} would overwrite the video; choose another name")
    return target


def run_video(args: argparse.Namespace) -> int:
    """Draws a video frame by frame into another, or into a window; the exit code."""
    reader = VideoReader.open_file(args.video_input)
    target = video_target(args.video_input, args.output) if args.output else None
    window = None if target else Window(TITLE)
    draw = frame_drawer(args, load_predictor(args))
    writer = None
    try:
        for frame in tqdm(reader, total=reader.expected or None, unit="frame", disable=None):
            drawing = draw(frame)
            if window:
                if not window.show(drawing, 1):
                    return 0
                continue
            if writer is None:
                writer = VideoWriter(target, reader.rate, drawing.shape[:2])
            writer.write(drawing)
    finally:
        if writer:
            writer.close()
    if writer:
        tell(f"{reader.read} frames drawn in {writer.path}")
    if reader.is_cut_short:
        print(
            f"{PROGRAM}: {args.video_input} is broken: {reader.read} of {reader.expected} frames "
            "could be read",
            file=sys.stderr,
        )
        return EXIT_SKIPPED
    return 0


def run_webcam(args: argparse.Namespace) -> int:
    """Shows what the camera sees until Esc or q is pressed; the exit code."""
    if args.output:
        raise UserError("--webcam is shown in a window; leave --output out")
    window = Window(TITLE)
    reader = open_camera()
    draw = frame_drawer(args, load_predictor(args))
    for frame in reader:
        if not window.show(draw(frame), 1):
            break
    return 0


class _Notes(logging.Handler):
    """Warnings as one line each that leave the progress bar whole."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"{PROGRAM}: note: {one_line(record.getMessage())}", file=sys.stderr)


@contextlib.contextmanager
def notes() -> Iterator[None]:
    """Show the project's notes, and not what libraries tell their callers' programmers."""
    handler = _Notes(logging.WARNING)
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch|detectron2|fvcore")
            yield
    finally:
        logging.getLogger().removeHandler(handler)


def main(argv: list[str] | None = None) -> int:
    """Runs the demo.

    Args:
        argv: the command line without the program's name; `sys.argv` when None.

    Returns:
        0, or 1 if something was broken and skipped.

    Raises:
        SystemExit: with 2 and one line for what a user can mend.
    """
    args = build_parser().parse_args(argv)
    with report_user_errors(PROGRAM), notes():
        if not 0 <= args.confidence_threshold <= 1:
            raise UserError(
                f"--confidence-threshold {args.confidence_threshold} is not between 0 and 1"
            )
        if args.json and not args.input:
            raise UserError("--json goes with --input")
        new_canvas(np.zeros((1, 1, 3), np.uint8))  # whether drawing is possible at all
        if args.webcam:
            return run_webcam(args)
        return run_video(args) if args.video_input else run_images(args)


if __name__ == "__main__":
    sys.exit(main())
