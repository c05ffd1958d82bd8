"""Batches for training and images for evaluation.

A training batch is a pure function of (seed, iteration), independent of the number of workers and
processes. ``batches.py`` determines the order and ``mapper.py`` the augmentation.
"""

import signal
import threading
from collections.abc import Iterator, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import build as detectron2_data
from detectron2.data import (
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.common import DatasetFromList
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader

from .. import compat
from ..errors import UserError, one_line
from ..files.plain_pickle import plain_pickles
from .augmentation import build_mapper
from .batches import BatchSchedule, aspect_ratio_groups
from .mapper import Failure, GuardedMapper, Mapper, SeededDataset

__all__ = [
    "EvalLoader",
    "TrainLoader",
    "build_test_loader",
    "build_train_loader",
    "missing_data_set",
]


class WorkerDied(UserError, RuntimeError):
    """A data-loading process was killed."""


def _one_by_one(loader: DataLoader) -> Iterator[list[dict]]:
    """Yield batches; raise one-line errors for failed images and dead workers."""
    iterator = _started(loader)
    try:
        for items in iterator:
            yield Failure.check(items)
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error) and "is killed by" not in str(error):
            raise
        raise WorkerDied(
            f"a data-loading process was killed ({one_line(error)}); if memory ran out, lower "
            "DATALOADER.NUM_WORKERS"
        ) from error
    finally:
        del iterator  # ends the workers, even if a traceback keeps this frame alive


def _started(loader: DataLoader) -> Iterator[list]:
    """Return an iterator without PyTorch's SIGCHLD handler.

    The handler raises for a dead worker anywhere in the main thread, even during an update of the
    weights. ``next`` also raises for a dead worker.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def _prepare_worker(worker_id: int) -> None:
    """Ignore Ctrl-C, which a terminal sends to all processes; the parent process handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    compat.ignore_known_warnings()


def _as_list(items: list) -> list:
    return items


class TrainLoader:
    """Endless loader of this process's equal part of each training batch.

    Args:
        records: records in Detectron2's format.
        mapper: maps a record to a model input.
        schedule: records of each batch.
        start_iter: iteration of the first batch.
        rank, world_size: rank of this process and number of processes.
        num_workers: number of data-loading processes; 0 loads in this process.

    Raises:
        UserError: a batch cannot be divided equally. While iterating: an image cannot be used, or
            a data-loading process died.
    """

    def __init__(
        self,
        records: Sequence[dict],
        mapper: Mapper,
        schedule: BatchSchedule,
        *,
        start_iter: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        if schedule.batch_size % world_size:
            raise UserError(
                f"SOLVER.IMS_PER_BATCH is {schedule.batch_size} and cannot be divided equally "
                f"among {world_size} processes; set it to a multiple of {world_size}"
            )
        # Serialised in one block of memory, which forked workers share.
        records = DatasetFromList(list(records), copy=False)
        self.dataset = SeededDataset(records, mapper, schedule.seed)
        self.schedule = schedule
        self.start_iter, self.rank, self.world_size = start_iter, rank, world_size
        self.num_workers = num_workers

    def __iter__(self) -> Iterator[list[dict]]:
        compat.ignore_known_warnings()
        loader = DataLoader(
            self.dataset,
            batch_sampler=self.schedule.batches(self.start_iter, self.rank, self.world_size),
            num_workers=self.num_workers,
            collate_fn=_as_list,
            worker_init_fn=_prepare_worker,
            generator=torch.Generator(),  # the default draws from the global one
        )
        return _one_by_one(loader)


class EvalLoader:
    """Detectron2's test loader with one-line errors.

    Args:
        loader: result of ``build_detection_test_loader`` with a :class:`GuardedMapper`.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[dict]]:
        return _one_by_one(self.loader)


def _records(cfg: CfgNode) -> list[dict]:
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    proposals = cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None
    try:
        with plain_pickles(detectron2_data):  # of proposals
            return get_detection_dataset_dicts(
                cfg.DATASETS.TRAIN,
                filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
                min_keypoints=keypoints if cfg.MODEL.KEYPOINT_ON else 0,
                proposal_files=proposals,
            )
    except FileNotFoundError as error:
        raise missing_data_set(cfg.DATASETS.TRAIN, one_line(error)) from error
    except (AssertionError, ValueError) as error:
        raise _unusable(cfg.DATASETS.TRAIN, error) from error


def _unusable(names: Sequence[str], error: Exception) -> UserError:
    return UserError(f"the data set {', '.join(names)} cannot be used: {one_line(error)}")


def missing_data_set(names: Sequence[str], what: str) -> UserError:
    """Return the error of data sets without a file, `what` in words."""
    return UserError(
        f"the data set {', '.join(names)} does not exist ({what}); set "
        "DETECTRON2_DATASETS to the folder of Detectron2's data sets"
    )


def _repeats(cfg: CfgNode, records: list[dict]) -> Sequence[float] | None:
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return None
    if name == "RepeatFactorTrainingSampler":
        # Detectron2 0.5 always takes the square root; compat.py refuses the key there.
        options = {} if cfg.DATALOADER.get("REPEAT_SQRT", True) else {"sqrt": False}
        return RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, cfg.DATALOADER.REPEAT_THRESHOLD, **options
        )
    raise UserError(
        f"DATALOADER.SAMPLER_TRAIN is {name!r}; it must be 'TrainingSampler' or "
        "'RepeatFactorTrainingSampler'"
    )


def build_train_loader(
    cfg: CfgNode,
    start_iter: int = 0,
    *,
    seed: int,
    rank: int | None = None,
    world_size: int | None = None,
    mapper: Mapper | None = None,
) -> TrainLoader:
    """Build the loader of training batches for any Detectron2 detector.

    Args:
        cfg: configuration; reads ``DATASETS.TRAIN``, ``DATALOADER``, ``INPUT`` and
            ``SOLVER.IMS_PER_BATCH``.
        start_iter: iteration of the first batch.
        seed: seed of order and augmentation, at least 0.
        rank, world_size: rank of this process and number of processes; None for Detectron2's.
        mapper: maps a record to a model input; None for :func:`build_mapper`.

    Returns:
        An endless iterable of lists of dicts, in Detectron2's format for models.

    Raises:
        UserError: see :class:`TrainLoader`; or the data are missing or empty.
    """
    records = _records(cfg)
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        groups = aspect_ratio_groups(records)
    else:
        groups = [0] * len(records)
    return TrainLoader(
        records,
        mapper or build_mapper(cfg, True),
        BatchSchedule(groups, cfg.SOLVER.IMS_PER_BATCH, seed, _repeats(cfg, records)),
        start_iter=start_iter,
        rank=comm.get_rank() if rank is None else rank,
        world_size=comm.get_world_size() if world_size is None else world_size,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def build_test_loader(cfg: CfgNode, dataset_name: str, mapper: Mapper | None = None) -> EvalLoader:
    """Build the loader of single images for evaluation; processes share the images.

    Args:
        cfg: configuration; reads ``INPUT`` and ``DATALOADER.NUM_WORKERS``.
        dataset_name: name in Detectron2's catalogues.
        mapper: maps a record to a model input; None for :func:`build_mapper`.

    Raises:
        UserError: the data are missing. While iterating: an image cannot be used, or a
            data-loading process died.
    """
    guarded = GuardedMapper(mapper or build_mapper(cfg, False))
    try:
        with plain_pickles(detectron2_data):  # of proposals
            return EvalLoader(build_detection_test_loader(cfg, dataset_name, mapper=guarded))
    except FileNotFoundError as error:
        raise missing_data_set([dataset_name], one_line(error)) from error
    except (AssertionError, ValueError) as error:
        raise _unusable([dataset_name], error) from error
