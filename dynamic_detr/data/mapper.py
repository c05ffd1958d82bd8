"""From a record to what the model takes, repeatably, and with errors that name the file.

Detectron2's ``DatasetMapper`` does the work. Its augmentations draw from the global generators of
NumPy, Python and PyTorch: these are seeded for one image at a time from (seed, position), so that
an image is augmented the same way in whichever process, and set back afterwards.
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
    """Seeds the global CPU generators from both numbers, and restores them at the end."""
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
    """What went wrong with an image; a value, as exceptions leave workers with their traceback."""

    message: str

    @staticmethod
    def check(items: list) -> list[dict]:
        """The items themselves.

        Raises:
            UserError: one of them is a failure.
        """
        for item in items:
            if isinstance(item, Failure):
                raise UserError(item.message)
        return items


@dataclass(frozen=True)
class GuardedMapper:
    """A mapper that says which image cannot be used, and why.

    An exception of ``mapper`` becomes a :class:`Failure` if the image is at fault; any other is
    let through.
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
            except Exception as error:  # Pillow's readers raise whatever their format makes them
                return Failure(
                    f"the image {name} cannot be read ({one_line(error)}); replace the file, or "
                    "take it out of the annotations"
                )
            raise


class SeededDataset(Dataset):
    """Maps (position, index of a record) to an image that is ready for the model.

    Args:
        records: in Detectron2's format.
        mapper: what to do with one of them.
        seed: of the augmentation.
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
