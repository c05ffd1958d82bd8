"""Batches are a pure function of (seed, iteration), and bad images are named in one line."""

import itertools
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.structures import BoxMode
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dynamic_detr import add_dynamic_detr_config
from dynamic_detr.data.batches import BatchSchedule, aspect_ratio_groups
from dynamic_detr.data.loader import build_test_loader, build_train_loader
from dynamic_detr.data.mapper import SeededDataset, seeded
from dynamic_detr.errors import UserError

NAME = "test_loader_images"
SIZES = [(40, 30), (30, 40), (36, 30), (32, 32), (30, 44), (48, 30), (40, 32)]


def _record(file: Path, index: int, width: int, height: int) -> dict:
    box = {"bbox": [2.0, 3.0, 14.0, 12.0], "bbox_mode": BoxMode.XYWH_ABS, "iscrowd": 0}
    return {
        "file_name": str(file),
        "image_id": index,
        "width": width,
        "height": height,
        "annotations": [{**box, "category_id": index % 2}] if index else [],
    }


@pytest.fixture
def records(tmp_path: Path):
    made = []
    for index, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(index).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        made.append(_record(tmp_path / f"{index}.png", index, width, height))
    DatasetCatalog.register(NAME, lambda: made)
    MetadataCatalog.get(NAME).set(thing_classes=["a", "b"])
    yield made
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


@pytest.fixture
def cfg(records):
    cfg = get_cfg()
    add_dynamic_detr_config(cfg)
    cfg.DATASETS.TRAIN = (NAME,)
    cfg.DATASETS.TEST = (NAME,)
    cfg.INPUT.MIN_SIZE_TRAIN = (28, 32, 36, 40)
    cfg.INPUT.MAX_SIZE_TRAIN = 60
    cfg.INPUT.MIN_SIZE_TEST = 32
    cfg.INPUT.CROP.ENABLED = True
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    return cfg


def _take(loader, count: int) -> list[list[dict]]:
    return list(itertools.islice(iter(loader), count))


def _assert_same(first: list[list[dict]], second: list[list[dict]]) -> None:
    assert len(first) == len(second)
    for one, other in zip(itertools.chain(*first), itertools.chain(*second), strict=True):
        assert one["file_name"] == other["file_name"]
        assert torch.equal(one["image"], other["image"])
        boxes, others = one["instances"].gt_boxes.tensor, other["instances"].gt_boxes.tensor
        assert torch.equal(boxes, others)


schedules = st.builds(
    BatchSchedule,
    groups=st.lists(st.integers(0, 1), min_size=1, max_size=30),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**31 - 1),
)


def _first_batches(schedule: BatchSchedule, count: int) -> list[list[tuple[int, int]]]:
    return list(itertools.islice(schedule.batches(), count))


@given(schedules, st.integers(0, 3000))
def test_batch_depends_on_seed_and_iteration_alone(schedule, start):
    *_, last = _first_batches(schedule, start + 1)
    assert next(schedule.batches(start)) == last


@given(schedules)
def test_batches_hold_one_group_and_every_position_once(schedule):
    batches = _first_batches(schedule, 40)
    for batch in batches:
        assert len(batch) == schedule.batch_size
        assert len({schedule.groups[index] for _, index in batch}) == 1
    positions = [position for batch in batches for position, _ in batch]
    assert len(set(positions)) == len(positions)
    # At most one incomplete batch per group is waiting.
    waiting = max(positions) + 1 - len(positions)
    assert waiting <= len(set(schedule.groups)) * (schedule.batch_size - 1)


def test_no_position_is_lost_over_many_epochs():
    batches = _first_batches(BatchSchedule([0, 1, 1] * 40 + [0], 7, seed=3), 3000)
    positions = {position for batch in batches for position, _ in batch}
    assert len(positions) == 3000 * 7
    assert max(positions) + 1 - len(positions) <= 2 * 6


@given(st.integers(1, 50), st.integers(0, 1000))
def test_every_epoch_shows_every_record_once(count, seed):
    schedule = BatchSchedule([0] * count, 1, seed)
    shown = [index for ((_, index),) in _first_batches(schedule, 4 * count)]
    epochs = [shown[e * count : (e + 1) * count] for e in range(4)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 20:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[3]


@given(schedules, st.integers(0, 60))
def test_processes_share_each_batch(schedule, start):
    size = schedule.batch_size
    processes = [schedule.batches(start, rank, size) for rank in range(size)]
    for batch in itertools.islice(schedule.batches(start), 5):
        assert [item for process in processes for item in next(process)] == batch


def test_schedule_refuses_what_it_cannot_batch():
    for groups, batch_size in (([], 2), ([0], 0)):
        with pytest.raises(ValueError, match=f"batches of {batch_size} from {len(groups)} records"):
            BatchSchedule(groups, batch_size, 0)


def test_wide_and_tall_images_are_told_apart():
    records = [{"width": width, "height": height} for width, height in SIZES]
    assert aspect_ratio_groups(records).tolist() == [0, 1, 0, 1, 1, 0, 0]


def test_rare_classes_are_repeated():
    repeats = [1.0, 2.25, 1.5]
    schedule = BatchSchedule([0, 0, 0], 1, 7, repeats)
    drawn = np.bincount([index for ((_, index),) in _first_batches(schedule, 9500)])
    assert drawn / 2000 == pytest.approx(repeats, rel=0.05)


def test_augmentation_is_seeded_and_leaves_no_trace():
    def draw() -> tuple:
        return np.random.rand(), random.random(), torch.rand(1).item()

    before = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
    with seeded(3, 14):
        first = draw()
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert random.getstate() == before[1] and torch.equal(torch.get_rng_state(), before[2])
    with seeded(3, 14):
        assert draw() == first
    for other in ((3, 15), (4, 14)):
        with seeded(*other):
            assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_workers_change_nothing(cfg):
    alone = _take(build_train_loader(cfg, seed=5), 5)
    cfg.DATALOADER.NUM_WORKERS = 2
    _assert_same(alone, _take(build_train_loader(cfg, seed=5), 5))


def test_loading_draws_nothing_from_the_global_generators(cfg):
    before = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
    _take(build_train_loader(cfg, seed=5), 3)
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert random.getstate() == before[1] and torch.equal(torch.get_rng_state(), before[2])


def test_resumed_training_sees_the_same_batches(cfg):
    whole = _take(build_train_loader(cfg, seed=5), 6)
    _assert_same(whole[4:], _take(build_train_loader(cfg, 4, seed=5), 2))


def test_two_processes_see_what_one_sees(cfg):
    whole = _take(build_train_loader(cfg, seed=5), 4)
    shares = [
        _take(build_train_loader(cfg, seed=5, rank=rank, world_size=2), 4) for rank in range(2)
    ]
    _assert_same(whole, [one + other for one, other in zip(*shares, strict=True)])


def test_augmentation_varies_with_seed_and_epoch(cfg):
    cfg.SOLVER.IMS_PER_BATCH = 1
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    views = [b for b, *_ in _take(build_train_loader(cfg, seed=5), 28)]
    views += [b for b, *_ in _take(build_train_loader(cfg, seed=6), 28)]
    same = [v["image"] for v in views if v["image_id"] == 3]
    assert len(same) == 8
    distinct = {image.numpy().tobytes() + bytes(image.shape) for image in same}
    assert len(distinct) > 5


def test_batches_keep_aspect_ratios_and_empty_images(cfg):
    batches = _take(build_train_loader(cfg, seed=0), 12)
    for batch in batches:
        assert len({r["width"] > r["height"] for r in batch}) == 1
    empty = [r for batch in batches for r in batch if r["image_id"] == 0]
    assert empty and all(len(r["instances"]) == 0 for r in empty)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    batches = _take(build_train_loader(cfg, seed=0), 12)
    assert all(r["image_id"] != 0 for batch in batches for r in batch)


def test_dataset_reaches_spawned_workers(cfg, records):
    dataset = SeededDataset(records, DatasetMapper(cfg, True), 5)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(dataset[9, 2]["image"], copy[9, 2]["image"])


def test_grayscale_and_rotated_photographs_load(cfg, records):
    for record in records:
        width, height = record["width"], record["height"]
        image = Image.new("L", (height, width), 100)
        image.putpixel((0, 0), 255)
        exif = Image.Exif()
        exif[274] = 6  # to be turned clockwise by a quarter
        image.save(record["file_name"], exif=exif)
    cfg.INPUT.CROP.ENABLED = False
    for inputs in build_test_loader(cfg, NAME):
        image = inputs[0]["image"]
        assert image.shape[0] == 3 and torch.equal(image[0], image[2])
        assert (image.shape[2] > image.shape[1]) == (inputs[0]["width"] > inputs[0]["height"])
        assert image[0, 0, -1] > 110  # the corner, turned


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_is_named(cfg, records, workers):
    cfg.DATALOADER.NUM_WORKERS = workers
    broken = Path(records[5]["file_name"])
    broken.write_bytes(broken.read_bytes()[:200])
    for loader in (build_train_loader(cfg, seed=0), build_test_loader(cfg, NAME)):
        with pytest.raises(UserError) as error:
            _take(loader, 20)
        message = str(error.value)
        assert f"the image {broken} cannot be read" in message
        assert "\n" not in message and "Traceback" not in message


def test_missing_image_is_named(cfg, records):
    Path(records[2]["file_name"]).unlink()
    with pytest.raises(UserError, match=r"2\.png cannot be read .*No such file"):
        _take(build_train_loader(cfg, seed=0), 20)


def test_image_of_another_size_is_named(cfg, records):
    Image.new("RGB", (10, 20)).save(records[4]["file_name"])
    with pytest.raises(UserError, match=r"4\.png, got \(10, 20\), expect \(30, 44\)"):
        _take(build_train_loader(cfg, seed=0), 20)


def test_an_image_of_too_many_pixels_is_named_for_what_it_is(cfg, records, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"is too large \(more than 200 pixels\); make it smaller"):
        _take(build_train_loader(cfg, seed=1), 1)


@pytest.mark.parametrize("size", [(3000, 1), (1, 3000)])
def test_an_image_of_one_pixel_across_is_loaded(cfg, records, size):
    cfg.INPUT.CROP.ENABLED = False
    Image.new("RGB", size).save(records[1]["file_name"])
    records[1].update(width=size[0], height=size[1])
    (inputs,) = (i for (i,) in build_test_loader(cfg, NAME) if i["image_id"] == 1)
    assert inputs["image"].shape == (3, *((1, 1333) if size[0] > 1 else (1333, 1)))
    seen = itertools.chain(*_take(build_train_loader(cfg, seed=0), 6))
    assert any(min(inputs["image"].shape) == 1 for inputs in seen)


def test_other_errors_keep_their_traceback(cfg, records):
    def mapper(record: dict) -> dict:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _take(build_train_loader(cfg, seed=0, mapper=mapper), 1)


def test_dead_worker_is_one_line(cfg):
    def mapper(record: dict) -> dict:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)

    cfg.DATALOADER.NUM_WORKERS = 1
    with pytest.raises(UserError, match="process was killed .*lower DATALOADER.NUM_WORKERS") as e:
        _take(build_train_loader(cfg, seed=0, mapper=mapper), 1)
    assert "\n" not in str(e.value)


def test_wrong_settings_are_explained(cfg):
    with pytest.raises(UserError, match="IMS_PER_BATCH is 4 .*among 3 processes"):
        build_train_loader(cfg, seed=0, rank=0, world_size=3)
    cfg.DATALOADER.SAMPLER_TRAIN = "RandomSampler"
    with pytest.raises(UserError, match="SAMPLER_TRAIN is 'RandomSampler'; it must be"):
        build_train_loader(cfg, seed=0)


def test_repeat_factor_sampler_is_used(cfg, monkeypatch):
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.9
    schedule = build_train_loader(cfg, seed=0).schedule
    # 3 of the 7 images hold either class; the first holds none.
    assert schedule.repeats.tolist() == pytest.approx([1] + [(0.9 * 7 / 3) ** 0.5] * 6)

    def newer(records: list, threshold: float, sqrt: bool = True) -> list[float]:
        return [threshold if sqrt else 2.0] * len(records)

    monkeypatch.setattr(
        RepeatFactorTrainingSampler, "repeat_factors_from_category_frequency", staticmethod(newer)
    )
    cfg.DATALOADER.REPEAT_SQRT = False
    assert build_train_loader(cfg, seed=0).schedule.repeats.tolist() == [2.0] * 7


def test_absent_data_set_says_where_it_is_looked_for(cfg, tmp_path, monkeypatch):
    from detectron2.data.datasets import register_coco_instances

    register_coco_instances("test_absent", {}, str(tmp_path / "no.json"), str(tmp_path))
    cfg.DATASETS.TRAIN = ("test_absent",)
    for build in (
        lambda: build_train_loader(cfg, seed=0),
        lambda: build_test_loader(cfg, "test_absent"),
    ):
        with pytest.raises(UserError, match=r"test_absent does not exist .*no\.json.*DETECTRON2_"):
            build()


def test_data_set_without_a_usable_image_is_named(cfg, records):
    for record in records:
        record["annotations"] = []
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    with pytest.raises(UserError, match=f"{NAME} cannot be used: No valid data found"):
        build_train_loader(cfg, seed=0)


def test_data_sets_of_other_classes_are_not_mixed(cfg):
    name = "test_other_classes"
    DatasetCatalog.register(name, lambda: DatasetCatalog.get(NAME))
    MetadataCatalog.get(name).thing_classes = ["another class"]
    cfg.DATASETS.TRAIN = (NAME, name)
    try:
        with pytest.raises(UserError, match=f"{NAME}, {name} cannot be used: .*thing_classes"):
            build_train_loader(cfg, seed=0)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_test_loader_shows_every_image_once(cfg):
    loader = build_test_loader(cfg, NAME)
    seen = [inputs[0]["image_id"] for inputs in loader]
    assert len(loader) == len(SIZES) and seen == list(range(len(SIZES)))
