#!/usr/bin/env python
"""Draw the detections in pictures, a video or a camera stream.

Takes a model file of this project, or a configuration and weights. All flags of Detectron2's demo
work, also with Detectron2's own detectors.
"""

import argparse
import contextlib
import logging
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch reads it: runtime/threads.py

import numpy as np
from tqdm import tqdm

from dynamic_detr.cli.exits import report_user_errors
from dynamic_detr.errors import UserError, one_line, tell
from dynamic_detr.files.config_file import find_config, model_among, read_config
from dynamic_detr.files.model_file import locate_model
from dynamic_detr.inference import Detections, Detector
from dynamic_detr.inference.detector import require_stages
from dynamic_detr.inference.listing import Listing, list_pictures, use_category_ids
from dynamic_detr.inference.pictures import file_picture
from dynamic_detr.inference.results_file import ResultsFile
from dynamic_detr.runtime.threads import choose_threads
from dynamic_detr.visualization.draw import literal_labels, new_canvas
from dynamic_detr.visualization.files import output_paths
from dynamic_detr.visualization.video import VideoReader, VideoWriter, open_camera
from dynamic_detr.visualization.window import Window

PROGRAM = "demo.py"
TITLE = "Esc or q: stop"
EXIT_SKIPPED = 1

EPILOG = """
examples:
  demo.py --model output/model_best.safetensors --input photos/ more/*.png --output drawn/
  demo.py --model quickstart --input scene.jpg --output drawn/ --stages
  demo.py ... --classes person,car
  demo.py ... --video-input clip.mp4 --output clip_drawn.mp4
  demo.py ... --input val.json --images val/ --json results.json
  demo.py --config-file configs/COCO-Detection/dynamic_detr_R_50_1x.yaml \\
          --input photos/ --output drawn/ --opts MODEL.WEIGHTS model_final.pth MODEL.DEVICE cpu

exit codes: 0 success; 1 unreadable input was skipped; 2 wrong arguments, configuration or
weights; 130 stopped by Ctrl-C
"""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser: the arguments of Detectron2's demo and those of this project."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        "--config-file",
        dest="config_file",
        default="",
        metavar="FILE",
        help="a model file, the name of a shipped model, or a configuration (with its weights in "
        "--opts)",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        metavar="IMAGE",
        help="pictures, folders, patterns such as 'folder/*.jpg', or annotations in COCO format, "
        "for their images",
    )
    source.add_argument("--video-input", metavar="FILE", help="a video")
    source.add_argument("--webcam", action="store_true", help="the first camera")
    parser.add_argument(
        "--images", metavar="DIR", help="folder of the images, if --input is annotations"
    )
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="folder or file of the drawings; default: show them in a window",
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        metavar="SCORE",
        help="minimum score to draw (default: the model's own, else 0.5)",
    )
    parser.add_argument(
        "--classes",
        metavar="A,B",
        help="names of the classes to draw, and to write to --json (default: all)",
    )
    parser.add_argument(
        "--stages",
        action="store_true",
        help="draw the boxes of every decoder stage side by side (DynamicDETR)",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write the detections of --input, of all scores, as COCO results",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted run: skip the finished pictures of --input",
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="configuration keys and values, such as MODEL.WEIGHTS model.pth",
    )
    return parser


def load_detector(args: argparse.Namespace) -> Detector:
    """Build the detector; print the threshold and its origin, and on a CPU the number of threads.

    Raises:
        UserError: the detector cannot be built, or does not support the arguments.
    """
    cfg = read_config(find_config(args.config_file or model_among(args.opts)), args.opts)
    if args.stages:
        require_stages(cfg.MODEL.META_ARCHITECTURE)
    if args.confidence_threshold is not None:
        # Detectron2's own detectors apply their threshold before non-maximum suppression.
        for node in (cfg.MODEL.RETINANET, cfg.MODEL.ROI_HEADS):
            node.SCORE_THRESH_TEST = min(node.SCORE_THRESH_TEST, args.confidence_threshold)
    detector = Detector.from_config(cfg, threshold=args.confidence_threshold)
    if args.classes is not None:
        args.classes = [name.strip() for name in args.classes.split(",")]
        detector.class_indices(args.classes)
    source = "of the best F1 in the model's evaluation"
    if args.confidence_threshold is not None:
        source = "from --confidence-threshold"
    elif detector.info is None or detector.info.threshold is None:
        source = "the default, as the weights have none; see --confidence-threshold"
    tell(f"score threshold: {detector.threshold:.3g}, {source}")
    if detector.cfg.MODEL.DEVICE == "cpu":
        tell(choose_threads())
    return detector


def chosen(found: Detections, args: argparse.Namespace) -> Detections:
    """Return the detections of the classes of `--classes`."""
    return found if args.classes is None else found.where(classes=args.classes)


def open_results(
    args: argparse.Namespace, detector: Detector, listing: Listing
) -> ResultsFile | None:
    """Open the file of `--json`, if any; the detector gets the category ids of annotations."""
    if not args.json:
        return None
    if listing.category_ids is not None:
        shared = use_category_ids(detector, listing.category_ids)
        if len(shared) < len(detector.class_names):
            tell(f"{len(shared)} classes are in the annotations; the others are left out")
            args.classes = [name for name in shared if name in (args.classes or shared)]
    weights = locate_model(detector.cfg.MODEL.WEIGHTS)
    stamp = os.stat(weights) if os.path.isfile(weights) else None
    origin = [os.path.realpath(weights), stamp and [stamp.st_size, stamp.st_mtime_ns], args.classes]
    return ResultsFile(args.json, origin, args.resume)


def run_images(args: argparse.Namespace) -> int:
    """Draw all readable pictures; return the exit code."""
    listing = list_pictures(args.input, args.images)
    ids = defaultdict(list)  # an image may be listed under several ids
    numbers = listing.image_ids or [None] * len(listing.paths)
    for path, number in zip(listing.paths, numbers, strict=True):
        ids[path].append(number)
    images = list(ids)
    targets = output_paths(images, args.output) if args.output else [None] * len(images)
    window = None if args.output or args.json else Window(TITLE)
    detector = load_detector(args)
    results = open_results(args, detector, listing)

    def is_done(path: Path, target: Path | None) -> bool:
        drawn = target is None or os.path.exists(target)
        return args.resume and drawn and (results is None or str(path) in results.done)

    todo = {p: t for p, t in zip(images, targets, strict=True) if not is_done(p, t)}
    if args.resume:
        tell(f"already done: {len(images) - len(todo)} of {len(images)} pictures")
    skipped, drawn, count, best = 0, 0, 0, 0.0

    def skip(picture, error: UserError) -> None:
        nonlocal skipped
        skipped += 1
        tqdm.write(f"{PROGRAM}: skipped: {one_line(error)}", file=sys.stderr)

    for found in detector.stream([file_picture(path) for path in todo], on_error=skip):
        found = chosen(found, args)
        target = todo[found.path]
        drawn += 1
        count += len(found.stages[-1] if args.stages else found)
        best = max(best, found.best_score)
        if target:
            found.save(target, stages=args.stages)
        if results and str(found.path) not in results.done:
            detections = [d for number in ids[found.path] for d in found.to_coco(number)]
            results.add(str(found.path), detections)
        if window and not window.show(found.draw(stages=args.stages)):
            break
    if results:
        results.finish()
    if drawn and not count:
        tell(
            f"nothing scored {detector.threshold:.3g} or more; the best score was {best:.3g}"
            + (f" (--confidence-threshold {best * 0.99:.3g} shows it)" if best else "")
        )
    done = f"; drawn in {args.output}" if args.output else ""
    tell(f"pictures: {drawn}, objects: {count}, skipped: {skipped}{done}")
    return EXIT_SKIPPED if skipped else 0


def frame_drawer(
    args: argparse.Namespace, detector: Detector
) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that draws a frame; an object keeps its colour across frames."""
    if args.stages:
        return lambda frame: chosen(detector(frame), args).draw(stages=True)
    from detectron2.utils.video_visualizer import VideoVisualizer

    visualizer = VideoVisualizer(detector.metadata)

    def draw(frame: np.ndarray) -> np.ndarray:
        found = chosen(detector(frame), args)
        with literal_labels():
            return visualizer.draw_instance_predictions(frame, found.instances).get_image()

    return draw


def video_target(source: str, output: str) -> Path:
    """Return the path of the drawn video: the file `output`, or a file in the folder `output`."""
    target = Path(os.path.expanduser(output))
    if os.path.isdir(target) or not target.suffix:
        target /= f"{Path(source).stem}.mp4"
    if os.path.realpath(target) == os.path.realpath(source):
        raise UserError(f"--output {output} would overwrite the video; choose another name")
    return target


def run_video(args: argparse.Namespace) -> int:
    """Draw a video into another video or a window; return the exit code."""
    reader = VideoReader.open_file(args.video_input)
    target = video_target(args.video_input, args.output) if args.output else None
    window = None if target else Window(TITLE)
    draw = frame_drawer(args, load_detector(args))
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
    """Draw the camera stream in a window until Esc or q is pressed; return the exit code."""
    if args.output:
        raise UserError("--webcam opens a window; leave --output out")
    window = Window(TITLE)
    reader = open_camera()
    draw = frame_drawer(args, load_detector(args))
    for frame in reader:
        if not window.show(draw(frame), 1):
            break
    return 0


class _Notes(logging.Handler):
    """Log handler that writes one line per record and keeps the progress bar intact."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"{PROGRAM}: note: {one_line(record.getMessage())}", file=sys.stderr)


@contextlib.contextmanager
def notes() -> Iterator[None]:
    """Show warnings of the log, and hide Python warnings of the libraries."""
    handler = _Notes(logging.WARNING)
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch|detectron2|fvcore")
            yield
    finally:
        logging.getLogger().removeHandler(handler)


def main(argv: list[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: command-line arguments; None for those of the process.

    Returns:
        0, or 1 if unreadable input was skipped.

    Raises:
        SystemExit: with code 2 and one line, if arguments, configuration or weights are wrong.
    """
    args = build_parser().parse_args(argv)
    with report_user_errors(PROGRAM), notes():
        if not 0 <= (args.confidence_threshold or 0) <= 1:
            raise UserError(
                f"--confidence-threshold {args.confidence_threshold} is not between 0 and 1"
            )
        for name in ("json", "resume", "images"):
            if getattr(args, name) and not args.input:
                raise UserError(f"--{name} goes with --input")
        if args.resume and not (args.output or args.json):
            raise UserError("--resume goes with --output or --json")
        new_canvas(np.zeros((1, 1, 3), np.uint8))  # fails if packages are missing
        if args.webcam:
            return run_webcam(args)
        return run_video(args) if args.video_input else run_images(args)


if __name__ == "__main__":
    sys.exit(main())
