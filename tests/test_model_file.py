"""Model files: written by training, self-contained, and rejected in one line if damaged."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import export_weights
import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from tiny_run import NAMES, make_config, train

import dynamic_detr
from dynamic_detr.cli.arguments import build_parser, load_config
from dynamic_detr.cli.train_net import evaluate
from dynamic_detr.errors import UserError
from dynamic_detr.files.config_file import find_config, read_config
from dynamic_detr.files.model_file import (
    ModelInfo,
    encode_model,
    read_header,
    read_model,
    require_model,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run four iterations with an evaluation after every second one."""
    folder = tmp_path_factory.mktemp("run")
    options = ["SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 2, "DATASETS.TEST", ("tiny_train",)]
    cfg = make_config(folder, *options, "SOLVER.EMA.ENABLED", True)
    return folder, train(cfg)


def test_training_writes_the_best_and_the_final_model(run):
    folder, trainer = run
    final, weights = read_model(str(folder / "output" / "model_final.safetensors"))
    assert final.class_names == NAMES and final.category_ids == [1, 2]
    assert final.iteration == 4 and final.version == dynamic_detr.__version__
    average = trainer.ema.state_dict()
    assert weights.keys() == average.keys()
    assert all(torch.equal(weights[name], value) for name, value in average.items())
    best = read_header(str(folder / "output" / "model_best.safetensors"))
    lines = (folder / "output" / "metrics.json").read_text().splitlines()
    aps = [line["bbox/AP"] for line in map(json.loads, lines) if "bbox/AP" in line]
    assert len(aps) == 2 and best.metrics["AP"] == max(aps)
    assert final.metrics["AP"] == aps[-1] and "threshold" not in final.metrics


def test_runs_are_not_resumed_with_other_classes(run):
    folder, trainer = run
    trainer.checkpointer.class_names = lambda: NAMES[::-1]
    with pytest.raises(UserError, match="classes dark, light in this order, and the data light"):
        trainer.checkpointer.resume()


def test_a_worse_model_is_not_the_best(run, tmp_path):
    folder, trainer = run
    writer = type(trainer.models)(trainer.cfg.clone())
    writer.cfg.OUTPUT_DIR = str(tmp_path)
    for iteration, ap in ((1, 20.0), (2, 30.0), (3, 10.0)):
        writer.keep(trainer.detector, {"bbox": {"AP": ap, "threshold": 0.3}}, iteration)
    best = read_header(str(tmp_path / "model_best.safetensors"))
    assert (best.iteration, best.threshold, best.metrics) == (2, 0.3, {"AP": 30.0})
    again = type(trainer.models)(writer.cfg)  # of a resumed run
    again.resume(started=0.0)
    again.keep(trainer.detector, {"bbox": {"AP": 25.0}}, 4)
    assert read_header(str(tmp_path / "model_best.safetensors")).iteration == 2
    assert read_header(str(tmp_path / "model_final.safetensors")).metrics == {"AP": 25.0}
    other = type(trainer.models)(writer.cfg)  # of a run that was started after these files
    other.resume(started=time.time() + 60)
    other.keep(trainer.detector, {"bbox": {"AP": 5.0}}, 1)
    assert read_header(str(tmp_path / "model_best.safetensors")).metrics == {"AP": 5.0}
    assert read_header(str(tmp_path / "model_best_1.safetensors")).metrics == {"AP": 30.0}


def test_keys_that_inference_does_not_use_may_be_unknown(run, tmp_path):
    folder, _ = run
    info, weights = read_model(str(folder / "output" / "model_final.safetensors"))
    path = tmp_path / "model.safetensors"
    for old, new, known in (
        ("    LOSS:\n", "    LOSS:\n      REMOVED: 1.0\n", True),
        ("SOLVER:\n", "SOLVER:\n  REMOVED: 1\n", True),
        ("MODEL:\n", "MODEL:\n  REMOVED: 1\n", False),
    ):
        assert info.config.count(old) == 1
        changed = replace(info, config=info.config.replace(old, new))
        path.write_bytes(encode_model(weights, changed))
        if known:
            read_config(str(path), [])
        else:
            with pytest.raises(UserError, match="MODEL.REMOVED"):
                read_config(str(path), [])


def test_the_file_alone_is_evaluated(run, tmp_path):
    folder, _ = run
    model = folder / "output" / "model_final.safetensors"
    data = folder / "data"
    for given in (["MODEL.WEIGHTS", str(model)], ["--config-file", str(model)]):
        args = build_parser().parse_args(
            ["--eval-only", "--num-gpus", "0", "--val-json", str(data / "boxes.json")]
            + ["--val-images", str(data), *given]
        )
        args.opts += ["OUTPUT_DIR", str(tmp_path)]
        cfg = load_config(args)
        assert cfg.MODEL.DYNAMIC_DECODER.NUM_QUERIES == 8
    assert evaluate(cfg, False)["bbox"]["AP"] == pytest.approx(
        read_header(str(model)).metrics["AP"]
    )


@pytest.mark.parametrize("name", ["faster_rcnn_R_50_FPN_1x", "retinanet_R_50_FPN_1x"])
def test_detectron2s_own_detectors_are_model_files(tmp_path, name):
    cfg = read_config(
        find_config(f"COCO-Detection/{name}.yaml"),
        [
            *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.DEPTH", "18"),
            *("MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.FPN.OUT_CHANNELS", "16"),
            *("MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.RETINANET.NUM_CONVS", "1"),
            *("INPUT.MIN_SIZE_TEST", "64", "MODEL.RESNETS.NORM", "BN"),
        ],
    )
    model = dynamic_detr.Detector.from_config(cfg).model
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    target = tmp_path / "model.safetensors"
    export_weights.main(
        [str(tmp_path / "model.pth"), str(target), "--config-file", str(tmp_path / "config.yaml")]
    )
    detector = dynamic_detr.load(target, device="cpu")
    assert detector.class_names[:2] == ["person", "bicycle"]
    picture = torch.rand(3, 60, 80)
    # COCO's own ids: person is 1, and 13 is a stop sign, the twelfth class.
    assert detector.category_ids[:12] == [*range(1, 12), 13]
    detector(picture).draw()
    with pytest.raises(UserError, match="decoder stages need .*SetDetector, got"):
        _ = detector(picture).stages


def small_file(path, **header) -> str:
    """Write a model file with a changed header and the old checksum."""
    info = ModelInfo(config="VERSION: 2\n", class_names=["a"], category_ids=[7], threshold=0.5)
    path.write_bytes(encode_model({"weight": torch.ones(3)}, info))
    if header:
        with safe_open(path, "pt") as file:
            metadata = {**file.metadata(), **header}
        save_file(load_file(path), path, {k: v for k, v in metadata.items() if v is not None})
    return str(path)


@pytest.mark.parametrize(
    ("header", "line"),
    [
        ({"note": "mine"}, "damaged, or was changed by hand"),
        ({"checksum": None}, "damaged, or was changed by hand"),
        ({"project": "another"}, "written by another tool"),
        ({"format": "2", "version": "9.0"}, "format 2, written by dynamic_detr 9.0; this is"),
        ({"threshold": "7"}, "its threshold is 7"),
        ({"threshold": "[1]"}, "its threshold is"),
        ({"threshold": "Infinity"}, "its threshold is inf"),
        ({"class_names": "{}"}, "its class_names is {}"),
        ({"category_ids": "[1, 2]"}, "its category_ids is"),
        ({"metrics": "nonsense"}, "is not a valid model file"),
        ({"metrics": '{"AP": "high"}'}, "its metrics is"),
        ({"iteration": "-1"}, "its iteration is -1"),
        ({"config": None}, "its header has no config"),
    ],
)
def test_changed_headers_are_one_line(tmp_path, header, line):
    path = small_file(tmp_path / "model.safetensors", **header)
    with pytest.raises(UserError, match=line) as error:
        read_model(path)
    assert "model.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_changed_weights_and_other_files_are_one_line(tmp_path):
    path = tmp_path / "model.safetensors"
    small_file(path)
    assert read_model(str(path))[1]["weight"].tolist() == [1, 1, 1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="checksum"):
        read_model(str(path))
    for other in (content[:20], b"", b"PK\x03\x04", b"\xff" * 100):
        path.write_bytes(other)
        with pytest.raises(UserError, match="is not a valid model file"):
            read_model(str(path))
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(UserError, match="written by another tool"):
        read_model(str(path))


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ("- 1\n", "its configuration is a list"),
        ("!!python/object/apply:os.getcwd []\n", "wrong configuration: .*could not determine a"),
        ("MODEL: {UNKNOWN: 1}\n", "MODEL.UNKNOWN"),
        ("MODEL: {SET_DETECTOR: {NUM_CLASSES: -1}}\n", "NUM_CLASSES is -1"),
        ("MODEL: {META_ARCHITECTURE: DynamicDETR}\n", "cannot be built|do not fit the conf"),
    ],
)
def test_configurations_that_cannot_work_are_one_line(tmp_path, config, line):
    path = tmp_path / "model.safetensors"
    path.write_bytes(encode_model({"weight": torch.ones(3)}, ModelInfo(config=config)))
    with pytest.raises(UserError, match=line) as error:
        dynamic_detr.load(path, device="cpu")
    assert "\n" not in str(error.value)


def test_keys_that_a_finished_detector_does_not_use_are_passed_over(tmp_path):
    path = tmp_path / "model.safetensors"
    config = "SOLVER: {BASE_LR: 0.5, OF_LATER: 1}\nLATER: {A: 1}\n"
    path.write_bytes(encode_model({}, ModelInfo(config=config)))
    assert read_config(str(path), []).SOLVER.BASE_LR == 0.5


def test_models_that_are_nowhere_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert os.path.isfile(require_model("quickstart"))  # from any folder
    assert (Path(dynamic_detr.__file__).parent / "py.typed").is_file()
    with pytest.raises(
        UserError, match=r"quickstrat does not exist.*\(did you mean quickstart\?\)"
    ):
        dynamic_detr.load("quickstrat")
    (tmp_path / "model.pth").touch()
    with pytest.raises(UserError, match="model.pth is not a model file"):
        dynamic_detr.load("model.pth")


def test_shared_and_odd_tensors_survive(tmp_path):
    shared = torch.arange(6.0).reshape(2, 3)
    weights = {
        "a": shared,
        "b": shared,
        "turned": shared.t(),
        "half": shared.to(torch.bfloat16),
        "count": torch.tensor(3),
        "none": torch.zeros(0, 4),
    }
    path = tmp_path / "model.safetensors"
    path.write_bytes(encode_model(weights, ModelInfo(config="")))
    loaded = read_model(str(path))[1]
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
