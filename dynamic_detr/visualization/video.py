"""Reading and writing videos, and reading cameras, with OpenCV."""

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np

from ..errors import UserError, one_line

__all__ = ["VideoReader", "VideoWriter", "is_video", "open_camera", "require_cv2"]

# Every build of OpenCV with FFmpeg writes MPEG-4; every build writes MJPG in AVI.
_CODECS = ("mp4v", "MJPG")
_LAST_RESORT = ".avi"
_SUFFIXES = (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
_DEFAULT_RATE = 25.0  # frames per second if the file has none


def is_video(name: str) -> bool:
    """Return whether a file name has the suffix of a video."""
    return name.lower().endswith(_SUFFIXES)


def require_cv2(purpose: str) -> ModuleType:
    """Import OpenCV with its warnings turned off; callers report errors themselves.

    Args:
        purpose: subject of the error message.

    Raises:
        UserError: OpenCV is not installed.
    """
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # FFmpeg's "quiet"
    try:
        cv2 = importlib.import_module("cv2")
    except ImportError as error:
        raise UserError(
            f"{purpose} needs OpenCV ({one_line(error)}): pip install opencv-python"
        ) from error
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
    return cv2


class VideoReader:
    """Iterator over the frames of a video, (H, W, 3) uint8, RGB.

    Args:
        source: a file name, or the number of a camera.
        name: subject of error messages.

    Raises:
        UserError: the source cannot be opened.
    """

    def __init__(self, source: str | int, name: str) -> None:
        cv2 = require_cv2("video")
        self._to_rgb = lambda frame: cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        self.capture = cv2.VideoCapture(source)
        if not self.capture.isOpened():
            raise UserError(f"{name} cannot be opened")
        rate = self.capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate < 1000 else _DEFAULT_RATE
        # An estimate in some formats, 0 for a camera.
        self.expected = max(int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0)
        self.read = 0

    @classmethod
    def open_file(cls, path: str) -> "VideoReader":
        """Open a video file.

        Raises:
            UserError: the file does not exist or is not a video.
        """
        if not os.path.isfile(path):
            raise UserError(f"{path:.300} does not exist")
        return cls(path, f"{path} is broken or not a video: it")

    def __iter__(self) -> Iterator[np.ndarray]:
        try:
            while True:
                good, frame = self.capture.read()
                if not good:
                    return
                self.read += 1
                yield self._to_rgb(frame)
        finally:
            self.capture.release()

    @property
    def is_cut_short(self) -> bool:
        """Whether none or less than 90 % of the expected frames could be read, after iteration."""
        return self.read == 0 or self.read < 0.9 * self.expected


def open_camera(number: int = 0) -> VideoReader:
    """Open a camera.

    Raises:
        UserError: the camera cannot be opened.
    """
    return VideoReader(number, f"the camera {number}")


class VideoWriter:
    """Video file, written with the first codec that OpenCV supports.

    Args:
        path: the file; the attribute `path` has the suffix .avi if no codec supports this one.
        rate: frames per second.
        size: (height, width) of the frames in pixels.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path: Path, rate: float, size: tuple[int, int]) -> None:
        self.cv2 = cv2 = require_cv2("video")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({one_line(error)}); see --output"
            ) from error
        height, width = size
        attempts = [(path, codec) for codec in _CODECS]
        attempts.append((path.with_suffix(_LAST_RESORT), _CODECS[-1]))
        for self.path, codec in attempts:
            fourcc = cv2.VideoWriter_fourcc(*codec)
            self.writer = cv2.VideoWriter(str(self.path), fourcc, rate, (width, height))
            if self.writer.isOpened():
                return
        raise UserError(f"{path} cannot be written, or OpenCV has no codec for it; see --output")

    def write(self, frame: np.ndarray) -> None:
        """Append a frame (H, W, 3) uint8, RGB."""
        self.writer.write(self.cv2.cvtColor(frame, self.cv2.COLOR_RGB2BGR))

    def close(self) -> None:
        self.writer.release()
