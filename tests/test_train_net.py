"""``train_net.py``: user errors end with one line and exit code 2; valid commands train."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.structures import Boxes, Instances
from detectron2.utils.logger import setup_logger
from PIL import Image
from tiny_run import NAMES, TWO_LEVELS, losses_of, make_config, train, write_config, write_data
from torch import nn

from dynamic_detr import add_dynamic_detr_config, compat
from dynamic_detr.cli import train_net as command
from dynamic_detr.cli.arguments import build_parser, load_config
from dynamic_detr.data.coco_json import register_json
from dynamic_detr.engine.evaluation import build_evaluator
from dynamic_detr.engine.step import NonFiniteStep
from dynamic_detr.engine.stopping import TrainingStopped
from dynamic_detr.engine.trainer import Trainer
from dynamic_detr.engine.tta import DetectorTTA
from dynamic_detr.errors import UserError


def _arguments(folder: Path, *options: str) -> list[str]:
    json_file, images = write_data(folder / "data")
    return [
        *("--config-file", str(write_config(folder)), "--num-gpus", "0"),
        *("--train-json", str(json_file), "--train-images", str(images)),
        *("--val-json", str(json_file), "--val-images", str(images)),
        *options,
    ]


def _run(monkeypatch, *arguments: str) -> int:
    """Run the command in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["train_net.py", *arguments])
    try:
        command.main()
    except SystemExit as stop:
        return stop.code or 0
    finally:  # its loggers keep the output stream of this test
        for name in ("detectron2", "fvcore", "dynamic_detr"):
            logging.getLogger(name).handlers.clear()
            logging.getLogger(name).propagate = True
        setup_logger.cache_clear()
    return 0


def test_trains_resumes_and_evaluates(tmp_path, monkeypatch, capsys):
    output = tmp_path / "output"
    options = ["OUTPUT_DIR", str(output), "SOLVER.MAX_ITER"]
    assert _run(monkeypatch, *_arguments(tmp_path, *options, "2")) == 0
    text = capsys.readouterr().out
    schedule = [line for line in text.splitlines() if "Schedule:" in line]
    assert len(schedule) == 1 and "2 iterations x 2 images" in schedule[0]
    assert "AP50" in text

    assert _run(monkeypatch, *_arguments(tmp_path, "--resume", *options, "4")) == 0
    assert "Starting training from iteration 2" in capsys.readouterr().out
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert any(line.get("iteration") == 3 and "total_loss" in line for line in lines)
    assert any("bbox/AP" in line for line in lines)

    arguments = ["--eval-only", "OUTPUT_DIR", str(output), "MODEL.WEIGHTS"]
    assert (
        _run(monkeypatch, *_arguments(tmp_path, *arguments, str(output / "model_final.pth"))) == 0
    )
    first = _ap(capsys.readouterr().out)
    assert _run(monkeypatch, *_arguments(tmp_path, "--resume", *arguments, "")) == 0
    assert _ap(capsys.readouterr().out) == first


def _ap(text: str) -> str:
    return re.findall(r"copypaste: ([\d.,na]+)\n", text)[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config-file is missing"),
        (["--config-file", "configs/absent.yaml"], "configs/absent.yaml does not exist"),
        (["--config-file", "COCO-Detection/faster.yaml"], "nor in Detectron2's model zoo"),
        (["{tiny}", "SOLVER.BASE_LT", "1"], "SOLVER.BASE_LT (did you mean SOLVER.BASE_LR?)"),
        (["{tiny}", "SOLVER.BASE_LR", "fast"], "SOLVER.BASE_LR"),
        (["{tiny}", "SOLVER.BASE_LR"], "'SOLVER.BASE_LR' is left over"),
        (["{tiny}", "DATASETS.TRAIN", "('coco_2017_trian',)"], "did you mean coco_2017_train?"),
        (["{tiny}", "DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty"),
        (["--eval-only", "{tiny}"], "DATASETS.TEST is empty"),
        (["--num-gpus", "99", "{tiny}"], "--num-gpus 99, but this machine has"),
        (["--num-processes", "0", "{tiny}"], "--num-processes and --num-machines at least 1"),
        (["--num-machines", "2", "--machine-rank", "2", "{tiny}"], "--machine-rank 2"),
        (["--num-machines", "2", "{tiny}", "DATASETS.TRAIN", "('coco_2017_train',)"], "classes"),
        (["--train-json", "a.json", "{tiny}"], "--train-images"),
        (["--note", "\udcff", "{tiny}"], "--note '\\udcff' is not text in UTF-8"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    arguments = [
        part
        for argument in arguments
        for part in (
            ["--config-file", str(write_config(tmp_path))] if argument == "{tiny}" else [argument]
        )
    ]
    assert _run(monkeypatch, *arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("train_net.py: error: ") and message in lines[-1]
    assert not any("Traceback" in line for line in lines)


@pytest.mark.parametrize(
    ("flags", "keys", "other"),
    [
        (["--num-processes", "2"], [], "--num-processes"),
        ([], ["MODEL.DEVICE", "cpu"], "MODEL.DEVICE cpu"),
        ([], ["MODEL.DEVICE", "cuda:1"], "MODEL.DEVICE cuda:1"),
    ],
)
def test_several_gpus_are_not_ignored(tmp_path, monkeypatch, capsys, flags, keys, other):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    config = ["--config-file", str(write_config(tmp_path))]
    assert _run(monkeypatch, "--num-gpus", "2", *flags, *config, *keys) == 2
    assert f"--num-gpus 2 contradicts {other}" in capsys.readouterr().err


def test_a_new_process_reports_in_one_line_without_a_traceback():
    result = subprocess.run(
        [sys.executable, str(ROOT / "train_net.py"), "--config-file", "absent.yaml"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("train_net.py: error: the configuration absent.yaml")


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--debug", "--config-file", "absent.yaml"])
    with pytest.raises(UserError):
        command.main()


def test_every_flag_of_detectron2_is_there():
    from detectron2.engine import default_argument_parser

    ours = {name for action in build_parser()._actions for name in action.option_strings}
    theirs = {name for a in default_argument_parser()._actions for name in a.option_strings}
    assert theirs <= ours


@pytest.mark.parametrize("name", ["faster_rcnn_R_50_FPN_1x", "retinanet_R_50_FPN_1x"])
def test_model_zoo_configurations_train_on_the_same_data(tmp_path, monkeypatch, capsys, name):
    arguments = _arguments(
        tmp_path,
        *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
        *("MODEL.WEIGHTS", "", "MODEL.FPN.OUT_CHANNELS", "16"),
        *("MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.RETINANET.NUM_CONVS", "1"),
        *("SOLVER.MAX_ITER", "1", "SOLVER.IMS_PER_BATCH", "1", "SOLVER.CHECKPOINT_PERIOD", "9"),
        *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
        *("DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(tmp_path / "output")),
    )
    arguments[1] = f"COCO-Detection/{name}.yaml"
    assert _run(monkeypatch, *arguments) == 0
    text = capsys.readouterr().out
    assert "SGD lr" in text and "AP50" in text


def test_hooks_run_after_the_backward_pass(tmp_path):
    """Hook of newer Detectron2 versions: gradients exist, the optimiser has not stepped."""

    class Hook(HookBase):
        seen = ()

        def after_backward(self):
            weights = [p for p in trainer.detector.parameters() if p.requires_grad]
            assert all(p.grad is not None for p in weights)
            self.seen = (*self.seen, float(weights[0].detach().sum()))

    trainer = Trainer(make_config(tmp_path, "SOLVER.MAX_ITER", 2))
    hook = Hook()
    trainer.register_hooks([hook])
    before = float(next(trainer.detector.parameters()).detach().sum())
    trainer.train()
    assert len(hook.seen) == 2
    assert hook.seen[0] == before != hook.seen[1]


def test_diverged_training_saves_good_weights_and_says_where_and_why(tmp_path):
    cfg = make_config(tmp_path, "SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 100)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    step = trainer._trainer.run_step

    def poison() -> None:
        if trainer.iter == 3:
            forward = trainer.detector.criterion.forward

            def criterion(*args):
                losses = forward(*args)
                return {**losses, "loss_giou_0": losses["loss_giou_0"] * float("nan")}

            trainer.detector.criterion.forward = criterion
        step()

    trainer._trainer.run_step = poison
    with pytest.raises(TrainingStopped) as stop:
        trainer.train()
    assert stop.value.code == 3
    message = stop.value.message
    assert "iteration 3" in message and "loss_giou_0 (stage 1)" in message
    assert "likely cause: " in message and "\n" not in message
    path = Path(cfg.OUTPUT_DIR) / "model_0000002.pth"
    assert str(path) in message
    saved = torch.load(path, weights_only=True)
    assert saved["iteration"] == 2
    assert all(torch.isfinite(v).all() for v in saved["model"].values() if v.is_floating_point())
    for name, value in trainer.detector.state_dict().items():
        assert torch.equal(saved["model"][name], value)


def test_a_divergence_on_a_full_disk_is_told(tmp_path, monkeypatch):
    trainer = Trainer(make_config(tmp_path, "SOLVER.MAX_ITER", 2))
    trainer.resume_or_load(resume=False)
    monkeypatch.setattr(trainer._trainer, "run_step", _diverge)
    monkeypatch.setattr(trainer, "_save", _full_disk)
    with pytest.raises(TrainingStopped) as stop:
        trainer.train()
    assert stop.value.code == 3 and "diverged at iteration 0: loss_a" in stop.value.message
    assert "likely cause: " in stop.value.message and "disk is full" in stop.value.message


def _diverge() -> None:
    raise NonFiniteStep({"loss_a": float("nan")}, 1)


def _full_disk() -> None:
    raise UserError("could not write model_0000000.pth (the disk is full)")


def test_an_unforeseen_error_saves_too(tmp_path, caplog):
    options = ["SOLVER.MAX_ITER", 9, "SOLVER.CHECKPOINT_PERIOD", 100]
    cfg = make_config(tmp_path, *options, "DATASETS.TEST", ("tiny_train",))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    step = trainer._trainer.run_step
    trainer._trainer.run_step = lambda: step() if trainer.iter < 8 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert torch.load(tmp_path / "output" / "model_0000007.pth")["iteration"] == 7
    assert "Stopped after 8 iterations by an error; saved" in caplog.text
    assert not (tmp_path / "output" / "inference").exists()  # no evaluation after the error


def test_test_data_are_checked_before_the_training(tmp_path):
    make_config(tmp_path)  # registers tiny_train
    data = tmp_path / "data"
    register_json("tiny_absent", data / "absent.json", data, NAMES)
    register_json("tiny_turned", data / "boxes.json", data, NAMES[::-1])
    register_json("tiny_remote", "https://example.com/a.json", data, NAMES)
    for name, message in (
        ("tiny_absent", "tiny_absent does not exist .no .*absent.json"),
        ("tiny_turned", f"class 0 is '{NAMES[1]}' in the data set tiny_turned and '{NAMES[0]}'"),
    ):
        config = ["--config-file", str(write_config(tmp_path)), "--num-gpus", "0"]
        args = build_parser().parse_args([*config, "DATASETS.TEST", f"('{name}',)"])
        with pytest.raises(UserError, match=message):
            load_config(args)
    load_config(build_parser().parse_args([*config, "DATASETS.TEST", "('tiny_remote',)"]))


def test_more_classes_in_the_data_than_in_the_model_are_refused(tmp_path):
    make_config(tmp_path)
    args = build_parser().parse_args(
        ["--config-file", str(write_config(tmp_path)), "MODEL.SET_DETECTOR.NUM_CLASSES", "1"]
    )
    with pytest.raises(UserError, match="tiny_train has 2 classes and the detector 1"):
        load_config(args)


class FromViews(nn.Module):
    """Detector of the bright square of an image, and of another object in flipped views only."""

    def forward(self, batched_inputs):
        results = []
        for inputs in batched_inputs:
            image = inputs["image"].float()
            assert (inputs["height"], inputs["width"]) == image.shape[1:]
            rows, columns = torch.nonzero(image[0] > 200, as_tuple=True)
            corner = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            boxes = torch.tensor([corner, corner], dtype=torch.float32)
            found = Instances(image.shape[1:])
            found.pred_boxes = Boxes(boxes)
            found.scores = torch.tensor([0.9, 0.5 if columns.min() > 20 else 0.6])
            found.pred_classes = torch.tensor([0, 1])
            results.append({"instances": found})
        return results


def test_views_are_mapped_back_and_merged_by_class(tmp_path):
    cfg = get_cfg()
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE, cfg.TEST.AUG.FLIP = (32, 64), 200, True
    cfg.INPUT.FORMAT = "RGB"
    image = torch.zeros(3, 32, 48, dtype=torch.uint8)
    image[:, 8:16, 4:20] = 255
    path = tmp_path / "image.png"
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    model = DetectorTTA.from_config(cfg, FromViews())
    shrunk = torch.nn.functional.interpolate(image[None].float(), (16, 24))[0]
    for inputs in (
        {"image": image, "height": 32, "width": 48},
        {"image": shrunk, "height": 32, "width": 48, "file_name": str(path)},
    ):
        (result,) = model([inputs])
        found = result["instances"]
        assert found.image_size == (32, 48)
        assert found.pred_classes.tolist() == [0, 1]  # four views, one box of each class
        torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.6]))
        expected = torch.tensor([[4.0, 8.0, 20.0, 16.0]] * 2)
        torch.testing.assert_close(found.pred_boxes.tensor, expected, atol=1.0, rtol=0)


def test_an_image_of_one_pixel_across_is_trained_on_and_evaluated(tmp_path):
    cfg = make_config(tmp_path, "SOLVER.MAX_ITER", 2, "DATASETS.TEST", ("tiny_train",))
    boxes = json.loads((tmp_path / "data" / "boxes.json").read_text())
    boxes["images"][0].update(width=3000, height=1)
    boxes["annotations"][0]["bbox"] = [10, 0, 800, 1]
    for number in range(1, 6):  # every batch has it
        boxes["images"][number].update(width=3000, height=1, file_name="0.png")
    (tmp_path / "data" / "boxes.json").write_text(json.dumps(boxes))
    Image.new("RGB", (3000, 1)).save(tmp_path / "data" / "0.png")
    trainer = train(cfg)
    assert trainer.finished == 1 and "bbox/AP" in trainer.storage.latest()


def test_augmented_evaluation_is_reported_beside_the_plain_one(tmp_path):
    cfg = make_config(tmp_path, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", ("tiny_train",))
    cfg.merge_from_list(["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (48, 64)])
    trainer = train(cfg)
    assert {"bbox/AP", "bbox_TTA/AP"} <= set(trainer.storage.latest())


def test_only_coco_data_sets_are_evaluated(tmp_path):
    name = "test_train_net_voc"
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(evaluator_type="pascal_voc")
    try:
        with pytest.raises(UserError, match="'pascal_voc' rules"):
            build_evaluator(get_cfg(), name)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_configurations_of_newer_detectron2_are_understood():
    cfg = get_cfg()
    compat.add_newer_keys(cfg)
    add_dynamic_detr_config(cfg)
    cfg.merge_from_list(["FLOAT32_PRECISION", "", "SOLVER.NUM_DECAYS", 3])
    assert compat.unsupported_keys(cfg) == []


def test_mixed_precision_trains_on_the_cpu(tmp_path):
    options = [*TWO_LEVELS, "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16"]
    mixed = losses_of(train(make_config(tmp_path / "a", *options, "SOLVER.MAX_ITER", 2)))
    full = losses_of(train(make_config(tmp_path / "b", *TWO_LEVELS, "SOLVER.MAX_ITER", 2)))
    assert mixed[0] == pytest.approx(full[0], rel=0.05) and mixed[0] != full[0]


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no GPU here: mixed precision in float16 was not tried",
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision_trains_on_a_gpu(tmp_path, dtype):
    options = ["MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", dtype]
    trainer = train(make_config(tmp_path, *TWO_LEVELS, *options))
    assert trainer.finished == 5
