"""Problems of annotations in COCO format, and the report of one file.

An *error* cannot be repaired without guessing (two images with one id). A problem is *repaired* if
the repair is obvious (a box that exceeds the image is clipped, one without area is left out), and
*noted* if it is harmless (a category without boxes). ``KINDS`` lists all of them.
"""

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "Report", "Severity"]

LONGEST = 300  # characters of an example; the middle of longer ones is cut


class Severity(Enum):
    ERROR = "error"
    REPAIRED = "repaired"
    NOTED = "noted"


_E, _R, _N = Severity.ERROR, Severity.REPAIRED, Severity.NOTED
KINDS: dict[str, tuple[Severity, str]] = {
    # the file
    "unreadable file": (_E, "give a JSON file in COCO's instances format"),
    "byte-order mark": (_R, "left out"),
    "missing list": (_E, "the file needs the lists images, annotations and categories"),
    "no images": (_E, "list at least one image"),
    "no categories": (_E, "list at least one category"),
    "record that is not an object": (_E, "every list must contain JSON objects"),
    # categories
    "category without id or name": (_E, "give every category an id and a name"),
    "category name of broken characters": (_E, "write it in whole Unicode characters"),
    "duplicate category id": (_E, "give every category its own id"),
    "duplicate category name": (_E, "give every category its own name"),
    "category without boxes": (_N, "it cannot be learned or measured here"),
    # images
    "image without id or file_name": (_E, "give every image an id and a file_name"),
    "duplicate image id": (_E, "give every image its own id"),
    "no image file found": (_E, "check the images folder"),
    "size differs from the file": (_E, "correct width and height (after EXIF rotation)"),
    "image of more than 8 bits": (_E, "convert it: Detectron2 would read nearly all as white"),
    "missing image file": (_R, "left out"),
    "file that is not an image": (_R, "left out"),
    "image of too many pixels": (_R, "left out; Pillow reads no more than 178 million"),
    "image without width or height": (_R, "read from the file"),
    "image listed under several ids": (_N, "used once per id"),
    "image without boxes": (_N, "used as background"),
    # annotations
    "no usable boxes": (_E, "nothing can be learned or measured"),
    "annotation of an unknown image": (_R, "left out"),
    "unknown category": (_R, "left out"),
    "box that is not 4 numbers": (_R, "left out"),
    "box with NaN or infinity": (_R, "left out"),
    "box without area": (_R, "left out"),
    "box outside the image": (_R, "left out"),
    "box partly outside the image": (_R, "clipped"),
    "missing, duplicate or non-positive annotation id": (_R, "renumbered"),
    "id that is not an integer": (_R, "renumbered"),
    "missing or invalid area": (_R, "taken from the box"),
    "missing or invalid iscrowd": (_R, "set to 1 if it means true, else 0"),
    "ignored box": (_R, "treated as a crowd region"),
    "invalid segmentation": (_R, "invalid parts left out, box kept"),
    "invalid keypoints": (_R, "left out, box kept"),
}


def printable(text: str) -> str:
    """Return a text from a file so that it can be printed: shortened, lone surrogates escaped."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return _escaped(text)


def _escaped(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


@dataclass
class Report:
    """Problems found in one file.

    Args:
        path: the file.
        counts: number of problems by kind.
        examples: first example by kind.
        data: repaired content in COCO format; empty if there are errors.
    """

    path: Path
    counts: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    def add(self, kind: str, example: str) -> None:
        self.counts[kind] += 1
        if kind not in self.examples:
            self.examples[kind] = printable(example)

    def kinds(self, severity: Severity) -> list[str]:
        """Return the kinds found of a severity, in the order of ``KINDS``."""
        return [kind for kind in KINDS if self.counts[kind] and KINDS[kind][0] is severity]

    @property
    def repaired(self) -> bool:
        """Whether ``data`` differs from the file."""
        return bool(self.kinds(Severity.REPAIRED))

    def describe(self, kind: str) -> str:
        """Describe one kind in one line: name, count, repair or advice, first example."""
        return f"{kind}: {self.counts[kind]}, {KINDS[kind][1]} (first: {self.examples[kind]})"

    def error(self) -> str:
        """Return all errors in one line, or an empty string."""
        errors = [self.describe(kind) for kind in self.kinds(Severity.ERROR)]
        return f"{self.path} cannot be used: {'; '.join(errors)}" if errors else ""

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {len(self.data.get('images', []))} images, "
            f"{len(self.data.get('annotations', []))} boxes, "
            f"{len(self.data.get('categories', []))} classes"
        ]
        for severity in Severity:
            lines += [f"  {severity.value}: {self.describe(k)}" for k in self.kinds(severity)]
        return _escaped("\n".join(lines))
