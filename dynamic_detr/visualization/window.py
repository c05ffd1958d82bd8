"""A window that shows one picture at a time, where there is a screen."""

import os
import sys

import numpy as np

from ..errors import UserError, one_line
from .video import require_cv2

__all__ = ["Window"]

_STOP_KEYS = (27, ord("q"))
_WITHOUT = "add --output FOLDER to write files"


class Window:
    """OpenCV's window.

    Args:
        title: of the window.

    Raises:
        UserError: there is no screen, or this OpenCV knows no windows.
    """

    def __init__(self, title: str) -> None:
        variables = ("DISPLAY", "WAYLAND_DISPLAY")
        if sys.platform not in ("win32", "darwin") and not any(map(os.environ.get, variables)):
            raise UserError(f"there is no display to show anything on: {_WITHOUT}")
        self.cv2 = require_cv2("a window")
        self.title = title
        try:
            self.cv2.namedWindow(title, self.cv2.WINDOW_NORMAL)
        except self.cv2.error as error:  # opencv-python-headless
            raise UserError(
                f"this OpenCV has no windows (opencv-python has): {_WITHOUT}"
            ) from error

    def show(self, image: np.ndarray, milliseconds: int = 0) -> bool:
        """Shows a picture (H, W, 3) uint8, RGB until a key is pressed or the time is over (0: no
        limit); False if the key was Esc or q."""
        try:
            self.cv2.imshow(self.title, self.cv2.cvtColor(image, self.cv2.COLOR_RGB2BGR))
            return self.cv2.waitKey(milliseconds) & 0xFF not in _STOP_KEYS
        except self.cv2.error as error:
            raise UserError(f"the window is gone ({one_line(error)}): {_WITHOUT}") from error
