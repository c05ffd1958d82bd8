"""Untrusted files: no code is executed, and damaged files are rejected in one line."""

import collections
import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import detection_checkpoint
from detectron2.config import CfgNode
from detectron2.data import build as detectron2_data
from helpers import small_config
from tiny_run import make_config, train
from torch import nn

from dynamic_detr.cli import train_net as command
from dynamic_detr.engine.checkpoint import SafeCheckpointer
from dynamic_detr.engine.trainer import Trainer
from dynamic_detr.errors import UserError
from dynamic_detr.files.plain_pickle import RefusedPickle, load_plain_pickle, plain_pickles
from dynamic_detr.files.reading import BrokenCheckpoint, read_checkpoint, require_finite
from dynamic_detr.inference import Detector


class Call:
    """Object whose pickle calls any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _dump(path: Path, data: object, protocol: int = 2) -> Path:
    path.write_bytes(pickle.dumps(data, protocol=protocol))
    return path


def _fields(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_of_every_protocol_are_read(protocol):
    plain = {
        "none": [None, (1, 2.5, True), "ä", b"\xff", {1, 2}, 10**30],
        "ordered": collections.OrderedDict(a=1),
        "scalar": np.int64(4),
    }
    arrays = {
        "float": np.arange(6, dtype=np.float32).reshape(2, 3),
        "bool": np.array([True, False]),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big-endian": np.arange(3, dtype=">f4"),
        "text": np.array(["a", "bc"]),
        "empty": np.zeros((0, 4), np.float16),
    }
    read = load_plain_pickle(io.BytesIO(pickle.dumps((plain, arrays), protocol=protocol)))
    assert read[0] == plain and type(read[0]["scalar"]) is np.int64
    for name, array in arrays.items():
        assert read[1][name].dtype == array.dtype.newbyteorder("=")  # PyTorch requires native order
        np.testing.assert_array_equal(read[1][name], array)


def test_pickles_of_python_2_are_read():
    """Return the array [1.5, 2] as Python 2 and its NumPy pickled it, with byte strings."""
    text = (
        b"(dp0\nS'conv_w'\np1\ncnumpy.core.multiarray\n_reconstruct\np2\n(cnumpy\nndarray\np3\n"
        b"(I0\ntp4\nS'b'\np5\ntp6\nRp7\n(I1\n(I2\ntp8\ncnumpy\ndtype\np9\n(S'f4'\np10\nI0\nI1\n"
        b"tp11\nRp12\n(I3\nS'<'\np13\nNNNI-1\nI-1\nI0\ntp14\nbI00\n"
        b"S'\\x00\\x00\\xc0?\\x00\\x00\\x00@'\np15\ntp16\nbs."
    )
    np.testing.assert_array_equal(load_plain_pickle(io.BytesIO(text))["conv_w"], [1.5, 2.0])


@pytest.mark.parametrize(
    ("value", "refused"),
    [
        (Call(os.system, "touch {mark}"), "posix.system"),
        (Call(eval, "open('{mark}', 'w')"), "__builtin__.eval"),
        (Call(exec, "open('{mark}', 'w')"), "__builtin__.exec"),
        (Call(open, "{mark}", "w"), "io.open"),
        (Call(np.fromfile, "{mark}"), "numpy.fromfile"),
        (Call(getattr, "a", "join"), "__builtin__.getattr"),
        (torch.zeros(2), "torch._utils._rebuild_tensor_v2"),
        (np.array([None, 1], dtype=object), "an array of type object"),
        (np.zeros(2, "f4,f4"), "an array of type"),
        (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_code_in_a_pickle_is_refused_by_name(tmp_path, value, refused):
    mark = tmp_path / "mark"
    if isinstance(value, Call):
        function, arguments = value.call
        value = Call(function, *(a.format(mark=mark) for a in arguments))
    path = _dump(tmp_path / "weights.pkl", {"model": {"w": value}, "__author__": "x"})
    with pytest.raises(UserError, match=refused.replace(".", r"\.")) as error:
        SafeCheckpointer(nn.Linear(2, 2)).load(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not mark.exists()


@pytest.mark.parametrize(
    "text",
    [
        b"cnumpy\nndarray\n(I1\ntR.",  # the class itself must not be called
        b"cnumpy.core.multiarray\n_reconstruct\n(tR(I1\n(I9\ntS'O'\nI00\nS''\ntb.",
        b"cnumpy\ndtype\n(S'f4'\ntRp0\n0cnumpy.core.multiarray\n_reconstruct\n(tR"
        b"(I1\n(I1000000000\ntg0\nI00\nS'abcd'\ntb.",
        b"c_codecs\nencode\n(Va\nVzip\ntR.",
        b"ccollections\nOrderedDict.__init__\n.",
        b"(lp0\n0" * 3 + b"R.",
        b"\x80\x05\x95",
        b"",
    ],
)
def test_crafted_pickles_end_in_an_error_of_python(text):
    with pytest.raises(Exception):  # noqa: B017  (any error, as long as no code is executed)
        load_plain_pickle(io.BytesIO(text))


def test_proposals_are_read_plainly(tmp_path):
    path = _dump(tmp_path / "proposals.pkl", Call(os.system, f"touch {tmp_path}/mark"))
    with (
        pytest.raises(RefusedPickle, match="posix.system"),
        plain_pickles(detectron2_data),
    ):
        detectron2_data.load_proposals_into_dataset([], str(path))
    assert not (tmp_path / "mark").exists() and detectron2_data.pickle is pickle
    assert detection_checkpoint.pickle is pickle


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> CfgNode:
    """Return a configuration with a finished run in OUTPUT_DIR."""
    folder = tmp_path_factory.mktemp("tiny")
    cfg = make_config(folder, "SOLVER.MAX_ITER", 4, "DATASETS.TEST", ("tiny_train",))
    cfg.TEST.EVAL_PERIOD = 100
    cfg.DATASETS.TEST = ()
    train(cfg)
    cfg.DATASETS.TEST = ("tiny_train",)
    return cfg


def _with(cfg: CfgNode, *options) -> CfgNode:
    cfg = cfg.clone()
    cfg.merge_from_list(options)
    return cfg


def test_training_evaluation_and_demo_refuse_code(tiny, tmp_path):
    path = _dump(tmp_path / "R-50.pkl", {"model": Call(os.system, f"touch {tmp_path}/mark")})
    cfg = _with(tiny, "MODEL.WEIGHTS", str(path), "OUTPUT_DIR", str(tmp_path))
    for use in (
        lambda: Trainer(cfg).resume_or_load(resume=False),
        lambda: command.evaluate(cfg, resume=False),
        lambda: Detector.from_config(cfg),
    ):
        with pytest.raises(RefusedPickle, match=r"posix\.system"):
            use()
    assert not (tmp_path / "mark").exists()


def test_zoo_files_load_by_name_matching(tmp_path):
    """Write a backbone as in the model zoo: arrays, names without prefix, heuristic matching."""
    from detectron2.modeling import build_model

    source, target = build_model(small_config()), build_model(small_config())
    body = {k: v + 1 for k, v in _fields(source.backbone.bottom_up).items()}
    zoo = {"model": body, "__author__": "somebody", "matching_heuristics": True}
    SafeCheckpointer(target).load(str(_dump(tmp_path / "zoo.pkl", zoo)))
    for name, value in target.backbone.bottom_up.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), body[name], err_msg=name)


def test_caffe2_files_load_by_their_own_names(tmp_path):
    blobs = {"conv1_w": np.ones((4, 3, 1, 1), np.float32), "conv1_b": np.ones(4, np.float32)}
    model = nn.ModuleDict({"stem": nn.ModuleDict({"conv1": nn.Conv2d(3, 4, 1)})})
    blobs["conv1_w_momentum"] = np.zeros(1, np.float32)
    path = _dump(tmp_path / "caffe2.pkl", {"blobs": blobs, "cfg": "text"})
    SafeCheckpointer(model).load(str(path))
    assert model["stem"]["conv1"].weight.eq(1).all()


def _last(cfg: CfgNode) -> Path:
    return Path(cfg.OUTPUT_DIR) / "model_final.pth"


def _flip(path: Path, record: zipfile.ZipInfo, byte: int, bit: int) -> None:
    """Change one bit of a record of a zip archive."""
    content = bytearray(path.read_bytes())
    name, extra = (
        int.from_bytes(content[record.header_offset + k :][:2], "little") for k in (26, 28)
    )
    content[record.header_offset + 30 + name + extra + byte] ^= 1 << bit
    path.write_bytes(content)


def test_a_flipped_bit_is_noticed_wherever_it_is(tiny, tmp_path):
    path = tmp_path / "model.pth"
    random = np.random.default_rng(0)
    with zipfile.ZipFile(_last(tiny)) as archive:
        records = archive.infolist()
    for record in random.choice(records, 30):
        shutil.copy(_last(tiny), path)
        _flip(path, record, int(random.integers(record.file_size)), int(random.integers(8)))
        with pytest.raises(BrokenCheckpoint, match="CRC-32"):
            read_checkpoint(path)
        with pytest.raises(BrokenCheckpoint, match="CRC-32"):
            SafeCheckpointer(nn.Linear(1, 1)).load(str(path))
    shutil.copy(_last(tiny), path)
    assert read_checkpoint(path, ["trainer"])["iteration"] == 3


def test_files_without_checksums_are_read(tmp_path):
    model = nn.Linear(2, 2)
    torch.save(model.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(model.state_dict(), tmp_path / "none.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    for name in ("old.pth", "none.pth"):
        loaded = nn.Linear(2, 2)
        SafeCheckpointer(loaded).load(str(tmp_path / name))
        assert torch.equal(loaded.weight, model.weight)


def test_a_resumed_run_falls_back_from_flipped_bits(tiny, tmp_path, caplog):
    cfg = _copy(tiny, tmp_path)
    with zipfile.ZipFile(_last(cfg)) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    _flip(_last(cfg), largest, 1000, 6)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 4  # model_0000003.pth has the same content
    assert "model_final.pth" in caplog.text and "falling back" in caplog.text


def _copy(cfg: CfgNode, folder: Path) -> CfgNode:
    shutil.copytree(cfg.OUTPUT_DIR, folder / "output")
    return _with(cfg, "OUTPUT_DIR", str(folder / "output"))


def _set(checkpoint: dict, where: str, value: object) -> None:
    *parents, key = (int(part) if part.isdecimal() else part for part in where.split("/"))
    for parent in parents:
        checkpoint = checkpoint[parent]
    if value is ...:
        del checkpoint[key]
    else:
        checkpoint[key] = value


BROKEN = {  # invalid for any configuration: the checkpoint before it is loaded
    "iteration": (..., None, "3", 3.0, True, -2, 10**20, float("nan"), [3], torch.tensor(3)),
    "trainer": (..., None, [], "state", torch.zeros(2)),
    "model": (..., None, [], {"a": "text"}, {"a": {}}, {3: torch.zeros(1)}, torch.zeros(2)),
    "model/pixel_mean": (None, [1.0], torch.zeros(2).to_sparse(), torch.zeros(3, device="meta")),
    "model_training": (None, [], {"a": 3}),
}
UNFIT = {  # does not fit the trainer: resuming is refused
    "trainer/iteration": (..., None, "3", -5, 2.5),
    "trainer/seed": (..., None, -1, "5", 10**30),
    "trainer/images_per_batch": (..., "2", None),
    "trainer/optimizer_name": (..., None, "SGD", 3),
    "trainer/hooks": (None, [], {"LRScheduler": {"base_lrs": "a", "last_epoch": 3}}),
    "trainer/hooks/LRScheduler": (None, {}, {"base_lrs": [0.1], "last_epoch": "3"}),
    "trainer/step": (..., None, {}, []),
    "trainer/step/skipped": (..., "0", -1),
    "trainer/step/optimizer": (..., None, {}, {"state": {}, "param_groups": []}),
    "trainer/step/optimizer/state": (..., None, []),
    "trainer/step/optimizer/state/0": (None, [], {"step": torch.tensor(4.0)}),
    "trainer/step/optimizer/state/0/step": (None, "4", float("nan"), torch.zeros(3), -1),
    "trainer/step/optimizer/state/0/exp_avg": (
        *(..., None, 0.0, "a", [0.0], torch.zeros(1), torch.zeros(0), torch.zeros(7, 7, 7)),
        *(torch.zeros(64, 3, 7, 7).to_sparse(), torch.zeros(64, 3, 7, 7, device="meta")),
        torch.zeros(64, 3, 7, 7, dtype=torch.int64),
    ),
    "trainer/step/optimizer/state/1/exp_avg_sq": (torch.zeros(2, 32), None),
    "trainer/step/optimizer/param_groups": (..., None, {}, [], [{}]),
    "trainer/step/optimizer/param_groups/0": (None, {}, {"params": [0]}),
    "trainer/step/optimizer/param_groups/0/params": (..., None, [], ["a"], [[0]]),
    "trainer/step/optimizer/param_groups/0/betas": (..., None, "ab", ("a", "b")),
    "trainer/step/optimizer/param_groups/0/eps": (..., None, "1e-8"),
}


def _containers_copied(data: object) -> object:
    if isinstance(data, dict):
        return {key: _containers_copied(value) for key, value in data.items()}
    return [_containers_copied(value) for value in data] if isinstance(data, list) else data


def test_contents_of_other_types_and_shapes_are_one_line(tiny, tmp_path, caplog, monkeypatch):
    load, last = torch.load, _last(tiny)
    good = load(last, weights_only=True)
    monkeypatch.setattr(torch, "load", lambda p, **o: checkpoint if p == last else load(p, **o))
    trainer, tried = Trainer(tiny), 0
    for broken, faults in ((True, BROKEN), (False, UNFIT)):
        for where, values in faults.items():
            for value in values:
                checkpoint = _containers_copied(good)
                _set(checkpoint, where, value)
                caplog.clear()
                try:
                    trainer.resume_or_load(resume=True)
                    assert broken and trainer.start_iter == 4, (where, value)
                    assert "model_final.pth" in caplog.text and "falling back" in caplog.text
                except UserError as error:
                    assert not broken and "resume with the configuration" in str(error), where
                    assert "\n" not in str(error)
                tried += 1
    assert tried > 90


@pytest.mark.parametrize(
    "content",
    [[1], "text", 3, {"model": []}, {"model": {"a": "b"}}, {"model": {"a": None}}, None, {3: 4}]
    + [{"model": {}, "class_names": 3}, {"model": {}, "class_names": [1]}],
    ids=str,
)
@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".pyth"])
def test_weights_of_something_else_are_one_line(tmp_path, content, suffix):
    path = tmp_path / f"model{suffix}"
    _dump(path, content) if suffix == ".pkl" else torch.save(content, path)
    with pytest.raises(BrokenCheckpoint, match=r"is not a valid checkpoint \(.+\)$"):
        SafeCheckpointer(nn.Linear(1, 1)).load(str(path))


def test_weights_that_are_not_finite_are_not_evaluated(tiny, tmp_path):
    checkpoint = torch.load(_last(tiny), weights_only=True)
    name = next(n for n, v in checkpoint["model"].items() if v.is_floating_point() and v.dim() > 1)
    checkpoint["model"][name][0] = torch.nan
    torch.save(checkpoint, tmp_path / "nan.pth")
    cfg = _with(tiny, "MODEL.WEIGHTS", str(tmp_path / "nan.pth"), "OUTPUT_DIR", str(tmp_path))
    for use in (lambda: command.evaluate(cfg, resume=False), lambda: Detector.from_config(cfg)):
        with pytest.raises(UserError, match=f"nan.pth contain non-finite values .{name}"):
            use()
    require_finite(nn.Linear(2, 2), "")
