"""What can be wrong with COCO-format annotations, and what was found in one file.

A problem is an *error* where going on would mean guessing (two images with one id, a picture of
another size than its record says); *repaired* where there is only one sensible thing to do (a box
that leaves the image is clipped, one without area is left out); or *noted* where nothing is wrong
but a person may want to know. ``KINDS`` lists them all.
"""

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "Report", "Severity", "printable"]

LONGEST = 300  # characters of an example


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
    "record that is no object": (_E, "every list holds objects with named fields"),
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
    "image file that is no image": (_R, "left out"),
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
    "missing or duplicate annotation id": (_R, "numbered anew"),
    "id that is no whole number": (_R, "numbered anew"),
    "missing or impossible area": (_R, "taken from the box"),
    "missing or odd iscrowd": (_R, "0, or 1 where it says something like yes"),
    "ignored box": (_R, "treated as a crowd region"),
    "outline that is no polygon": (_R, "outline left out, box kept"),
    "keypoints that are no numbers": (_R, "left out, box kept"),
}


def printable(text: str) -> str:
    """What can be printed of a text from a file: without its middle if it is long, and without
    halves of characters."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return _whole(text)


def _whole(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


@dataclass
class Report:
    """What was found in one file.

    ``data`` is its repaired content, in COCO's format; empty if there are errors. ``repaired``
    says whether it differs from the file.
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
        """The kinds of problems found that are of this severity, in the order of ``KINDS``."""
        return [kind for kind in KINDS if self.counts[kind] and KINDS[kind][0] is severity]

    @property
    def repaired(self) -> bool:
        return bool(self.kinds(Severity.REPAIRED))

    def describe(self, kind: str) -> str:
        """One problem in one line: its name, how often, what is done or to do, an example."""
        return f"{kind}: {self.counts[kind]}, {KINDS[kind][1]} (first: {self.examples[kind]})"

    def error(self) -> str:
        """All errors in one line, or an empty string."""
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
        return _whole("\n".join(lines))
