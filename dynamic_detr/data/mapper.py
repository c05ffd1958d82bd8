"""Reproducible mapping of records to model inputs, with errors that name the image file.

The augmentations of Detectron2's ``DatasetMapper`` draw from the global generators of NumPy, Python
and PyTorch. These are seeded from (seed, position) for each image and restored afterwards, so an
image is augmented in the same way in any process.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.data.detection_utils import SizeMismatchError, read_image
from PIL import Image
from torch.utils.data import Dataset

from ..errors import UserError, one_line

__all__ = [
    "Failure",
    "GuardedMapper",
    "SeededDataset",
    "seeded",
]

Mapper = Callable[[dict], dict]


@contextlib.contextmanager
def seeded(seed: int, position: int) -> Iterator[None]:
    """Seed the global CPU generators from both numbers; restore them on exit."""
    state_numpy, state_python = np.random.get_state(), random.getstate()
    words = np.random.SeedSequence([seed, position]).generate_state(4)
    with torch.random.fork_rng(devices=[]):
        np.random.seed(words)
        random.seed(int(words[0]) << 32 | int(words[1]))
        # torch.manual_seed would also set the GPUs' generators.
        torch.default_generator.manual_seed(int(words[2]) << 32 | int(words[3]))
        try:
            yield
        finally:
            np.random.set_state(state_numpy)
            random.setstate(state_python)


@dataclass(frozen=True)
class Failure:
    """Error of an image, returned as a value: an exception leaves a worker with its traceback."""

    message: str

    @staticmethod
    def check(items: list) -> list[dict]:
        """Return the items.

        Raises:
            UserError: an item is a failure.
        """
        for item in items:
            if isinstance(item, Failure):
                raise UserError(item.message)
        return items


@dataclass(frozen=True)
class GuardedMapper:
    """Mapper that returns a :class:`Failure` if the image cannot be used.

    Other exceptions of ``mapper`` are raised.
    """

    mapper: Mapper

    def __call__(self, record: dict) -> dict | Failure:
        try:
            return self.mapper(record)
        except SizeMismatchError as error:
            return Failure(
                f"{one_line(error)} The file and its annotations do not belong together."
            )
        except Exception:
            name = record.get("file_name", "")
            try:
                read_image(name, "RGB")
            except Image.DecompressionBombError:
                return Failure(
                    f"the image {name} is too large (more than {2 * Image.MAX_IMAGE_PIXELS} "
                    "pixels); make it smaller, or take it out of the annotations"
                )
            except Exception as error:  # each format of Pillow raises its own errors
                return Failure(
                    f"the image {name} cannot be read ({one_line(error)}); replace the file, or "
                    "take it out of the annotations"
                )
            raise


class SeededDataset(Dataset):
    """Dataset of model inputs, indexed by (position, index of the record).

    Args:
        records: records in Detectron2's format.
        mapper: maps a record to a model input.
        seed: seed of the augmentation.
    """

    def __init__(self, records, mapper: Mapper, seed: int) -> None:
        self.records = records
        self.mapper = GuardedMapper(mapper)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, item: tuple[int, int]) -> dict | Failure:
        position, index = item
        with seeded(self.seed, position):
            return self.mapper(self.records[index])
