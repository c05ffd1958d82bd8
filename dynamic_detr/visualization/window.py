"""Showing images in a window or a notebook."""

import os
import sys
import tempfile

import numpy as np
from PIL import Image

from ..errors import UserError, one_line
from .images import write_image
from .video import require_cv2

__all__ = ["Window", "show"]

_STOP_KEYS = (27, ord("q"))
_WITHOUT = "add --output FOLDER to write files"


class Window:
    """Window of OpenCV.

    Args:
        title: title of the window.

    Raises:
        UserError: there is no display, or OpenCV is built without windows.
    """

    def __init__(self, title: str) -> None:
        variables = ("DISPLAY", "WAYLAND_DISPLAY")
        if sys.platform not in ("win32", "darwin") and not any(map(os.environ.get, variables)):
            raise UserError(f"there is no display: {_WITHOUT}")
        self.cv2 = require_cv2("a window")
        self.title = title
        try:
            self.cv2.namedWindow(title, self.cv2.WINDOW_NORMAL)
        except self.cv2.error as error:  # opencv-python-headless
            raise UserError(
                f"this build of OpenCV has no windows (opencv-python has them): {_WITHOUT}"
            ) from error

    def show(self, image: np.ndarray, milliseconds: int = 0) -> bool:
        """Show an image (H, W, 3) uint8, RGB for some time (0: no limit) or until a key is pressed.

        Returns:
            False if the key was Esc or q.
        """
        try:
            self.cv2.imshow(self.title, self.cv2.cvtColor(image, self.cv2.COLOR_RGB2BGR))
            return self.cv2.waitKey(milliseconds) & 0xFF not in _STOP_KEYS
        except self.cv2.error as error:
            raise UserError(f"the window was closed ({one_line(error)}): {_WITHOUT}") from error


def show(image: np.ndarray, title: str) -> None:
    """Show an image in a notebook cell, or in a window until a key is pressed.

    Without a display, the image is written to a temporary file and its path is printed.

    Args:
        image: (H, W, 3) uint8, RGB.
        title: title of the window.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if getattr(shell, "kernel", None) is not None:
        ipython.display.display(Image.fromarray(image))
        return
    try:
        window = Window(title)
    except UserError:  # no display, or an OpenCV without windows
        handle, path = tempfile.mkstemp(prefix="detections_", suffix=".png")
        os.close(handle)
        write_image(path, image)
        print(path)
    else:
        window.show(image)
