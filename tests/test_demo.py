"""The demo with a tiny detector, on pictures, folders, videos and invalid input."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from detectron2.data import detection_utils
from detectron2.modeling import build_model
from helpers import small_config
from PIL import Image

from demo import demo
from dynamic_detr.errors import UserError
from dynamic_detr.inference import Detector
from dynamic_detr.visualization import read_image
from dynamic_detr.visualization.stages import PANEL
from dynamic_detr.visualization.video import VideoReader, VideoWriter
from dynamic_detr.visualization.window import Window

NAMES = ["ant", "bee", "cat", "dog", "elk"]
LOW = ["--confidence-threshold", "0.001"]  # below the scores of an untrained detector


def tiny_config(folder: Path):
    cfg = small_config(DYNAMIC_DECODER__NUM_QUERIES=8, DYNAMIC_DECODER__FFN_DIM=32)
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
    cfg.DATASETS.TEST = ()
    cfg.OUTPUT_DIR = str(folder)
    return cfg


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> list[str]:
    """Return arguments for a tiny Dynamic DETR with saved weights and class names, on the CPU."""
    folder = tmp_path_factory.mktemp("detector")
    torch.manual_seed(0)
    cfg = tiny_config(folder)
    weights = folder / "model.pth"
    torch.save({"model": build_model(cfg).state_dict(), "class_names": NAMES}, weights)
    cfg.MODEL.WEIGHTS = str(weights)
    (folder / "config.yaml").write_text(cfg.dump())
    return ["--config-file", str(folder / "config.yaml")]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return a folder of small pictures of several kinds."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    noise = Image.effect_noise((60, 40), 80)
    noise.save(folder / "grey.png")
    noise.convert("CMYK").save(folder / "cmyk.jpg")
    Image.new("RGBA", (50, 70), (0, 200, 0, 90)).save(folder / "alpha.png")
    Image.fromarray(np.full((30, 40), 9000, np.uint16)).save(folder / "sixteen.tif")
    Image.new("RGB", (1, 1), "red").save(folder / "pixel.png")
    Image.new("RGB", (900, 1), "red").save(folder / "line.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.convert("RGB").save(folder / "turned.jpg", exif=exif)
    return folder


def error_of(argv: list[str], capsys) -> str:
    """Return the error message, which must be one line."""
    with pytest.raises(SystemExit) as stop:
        demo.main(argv)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("demo.py: error: ")]
    assert len(errors) == 1
    return errors[0]


def test_pictures_of_every_kind_are_drawn(detector, pictures, tmp_path, capsys):
    out, results = tmp_path / "out", tmp_path / "results.json"
    argv = [*detector, "--input", str(pictures), "--output", str(out), "--json", str(results)]
    assert demo.main([*argv, "--confidence-threshold", "0.3"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "alpha.png", "cmyk.jpg", "grey.png", "line.png", "pixel.png", "sixteen.png", "turned.jpg",
    ]  # fmt: skip
    assert Image.open(out / "alpha.png").size == (8 * 50, 8 * 70)  # small ones are enlarged
    assert Image.open(out / "turned.jpg").size == (9 * 40, 9 * 60)
    assert Image.open(out / "line.png").size == (900, 1)
    found = json.loads(results.read_text())
    assert min(entry["score"] for entry in found) < 0.3  # of all scores
    assert {entry["file_name"] for entry in found} >= {"alpha.png", "turned.jpg", "sixteen.tif"}
    assert {entry["category"] for entry in found} <= set(NAMES)  # from the checkpoint
    drawn = sum(entry["score"] >= 0.3 for entry in found)
    assert f"pictures: 7, objects: {drawn}, skipped: 0;" in capsys.readouterr().out
    for entry in found:
        width, height = (40, 60) if entry["file_name"] == "turned.jpg" else (900, 70)
        left, top, *size = entry["bbox"]
        assert 0 <= left <= left + size[0] <= width + 0.01
        assert 0 <= top <= top + size[1] <= height + 0.01


def test_broken_pictures_are_named_and_skipped(detector, pictures, tmp_path, capsys):
    (pictures / "broken.jpg").write_bytes((pictures / "turned.jpg").read_bytes()[:300])
    (pictures / "empty.png").touch()
    out = tmp_path / "out"
    inputs = [str(pictures / name) for name in ("broken.jpg", "empty.png", "grey.png")]
    assert demo.main([*detector, "--input", *inputs, "--output", str(out)]) == 1
    assert [path.name for path in out.iterdir()] == ["grey.png"]
    output = capsys.readouterr()
    assert "pictures: 1, " in output.out and "skipped: 2;" in output.out
    lines = [line for line in output.err.splitlines() if "skipped" in line]
    assert ["broken.jpg" in lines[0], "empty.png" in lines[1], len(lines)] == [True, True, 2]


def test_broken_links_are_named_and_skipped(detector, pictures, tmp_path, capsys):
    (pictures / "loop.png").symlink_to(pictures / "loop.png")
    (pictures / "nothing.png").symlink_to(pictures / "absent.png")
    out = tmp_path / "out"
    argv = [*detector, "--input", str(pictures), "--output", str(out)]
    assert demo.main(argv) == 1
    output = capsys.readouterr()
    assert len(list(out.iterdir())) == 7 and "skipped: 2;" in output.out
    for name in ("loop", "nothing"):
        assert f"{name}.png is a broken link" in output.err


def test_stages_of_every_photograph(detector, demo_images, tmp_path):
    """Every photograph gives one row with the panels of two stages."""
    out = tmp_path / "out"
    argv = [*detector, "--stages", "--input", str(demo_images[0].parent), "--output", str(out)]
    assert demo.main([*argv, *LOW]) == 0
    assert {path.name for path in out.iterdir()} == {path.name for path in demo_images}
    for path in demo_images:
        width, height = Image.open(path).size
        panel = round(width * PANEL[1] / max(width, height))
        assert Image.open(out / path.name).width == 2 * panel + 3 * 8


def test_the_command_itself(detector, pictures, tmp_path):
    argv = [*detector, "--input", str(pictures / "grey.png"), "--output", str(tmp_path / "one.jpg")]
    command = [sys.executable, str(ROOT / "demo" / "demo.py"), *argv, "--stages", *LOW]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    threshold, *threads, last = run.stdout.splitlines()
    assert threshold == "score threshold: 0.001, from --confidence-threshold"
    assert threads == ([] if torch.cuda.is_available() else ["threads: 1 (OMP_NUM_THREADS)"])
    assert last.startswith("pictures: 1, objects: 8")
    assert Image.open(tmp_path / "one.jpg").width == 2 * 384 + 3 * 8


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--input", "missing.png", "--output", "out"], "missing.png does not exist"),
        (["--input", "*.xyz", "--output", "out"], "matches no file"),
        (["--input", "{picture}", "--output", "{picture}"], "overwrite"),
        (["--input", "{folder}", "--output", "one.png"], "pass a folder"),
        (["--input", "{picture}", "--json", "{picture}/x.json"], "cannot be written"),
        (["--input", "{picture}", "--output", "{picture}/out"], "cannot be written"),
        (["--input", "{picture}"], "there is no display"),
        (["--input", "{picture}", "--resume"], "--resume goes with --output or --json"),
        (["--webcam", "--output", "out"], "leave --output out"),
        (["--webcam"], "there is no display"),
        (["--webcam", "--json", "x.json"], "--json goes with --input"),
        (["--video-input", "missing.mp4", "--output", "out"], "missing.mp4 does not exist"),
        (["--video-input", "{picture}.txt", "--output", "out"], "broken or not a video"),
        (["--input", "a" * 5000, "--output", "out"], "aaa does not exist"),
        (["--input", "a*" * 5000, "--output", "out"], "a* matches no file"),
        (["--input", "{picture}", "--output", "a" * 5000], "too long"),
        (["--video-input", "a" * 5000, "--output", "out"], "does not exist"),
        (["--config-file", "a" * 5000, "--input", "{picture}", "--output", "o"], "does not exist"),
        (["--input", "{picture}", "--output", "o", "--confidence-threshold", "5"], "between 0 and"),
        (["--input", "{picture}", "--output", "o", "--opts", "MODEL.WEIGHT", "x"], "MODEL.WEIGHTS"),
        (["--input", "{picture}", "--output", "o", "--opts", "MODEL.WEIGHTS"], "left over"),
        (
            ["--input", "{picture}", "--output", "o", "--opts", "MODEL.WEIGHTS", "nope.pth"],
            "the weights nope.pth do not exist",
        ),
        (
            ["--input", "{picture}", "--output", "o", "--opts", "MODEL.WEIGHTS", "{picture}"],
            "not a valid checkpoint",
        ),
        (
            ["--input", "{picture}", "--output", "o", "--opts"]
            + ["MODEL.SET_DETECTOR.NUM_CLASSES", "7"],
            "another number of classes",
        ),
        (
            ["--input", "{picture}", "--output", "o", "--stages", "--opts"]
            + ["MODEL.META_ARCHITECTURE", "RetinaNet"],
            "SetDetector, got RetinaNet",
        ),
    ],
)
def test_wrong_arguments_raise_one_line(
    detector, pictures, tmp_path, capsys, monkeypatch, arguments, line
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    picture = pictures / "grey.png"
    (pictures / "grey.png.txt").write_text("no video")
    given = [text.format(picture=picture, folder=pictures) for text in arguments]
    assert line in error_of([*detector, *given], capsys)


def test_a_source_and_a_configuration_are_needed(detector, pictures, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(detector)
    assert stop.value.code == 2
    assert "--input" in capsys.readouterr().err
    argv = ["--input", str(pictures), "--output", "out"]
    assert "--config-file is missing" in error_of(argv, capsys)


def test_detectron2_detectors_are_drawn(pictures, tmp_path, capsys):
    config = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    argv = ["--config-file", config, "--input", str(pictures / "grey.png")]
    argv += ["--output", str(tmp_path / "a.png"), "--confidence-threshold", "0.009", "--opts"]
    argv += ["MODEL.WEIGHTS", "", "MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS"]
    argv += ["64", "INPUT.MIN_SIZE_TEST", "64", "MODEL.DEVICE", "cuda", "MODEL.RESNETS.NORM", "BN"]
    assert demo.main(argv) == 0
    assert Image.open(tmp_path / "a.png").size == (9 * 60, 9 * 40)
    notes = capsys.readouterr().err
    assert "is not trained" in notes
    assert ("no GPU is available: running on the CPU" in notes) is not torch.cuda.is_available()


def test_weights_of_only_a_backbone_give_a_warning(tmp_path, capsys, caplog):
    cfg = tiny_config(tmp_path)
    model = build_model(cfg)
    weights = tmp_path / "backbone.pth"
    state = {k: v for k, v in model.state_dict().items() if k.startswith("backbone.")}
    torch.save({"model": state}, weights)
    cfg.MODEL.WEIGHTS = str(weights)
    Detector.from_config(cfg)
    assert "tensors are not in the weights" in caplog.text


class Recorder(torch.nn.Module):
    """Model that finds nothing and keeps its inputs."""

    def forward(self, inputs):
        self.shown = inputs[0]
        return [{"proposals": []}]


@pytest.mark.parametrize("image_format", ["RGB", "BGR", "L", "YUV-BT.601"])
def test_pictures_reach_the_detector_as_detectron2_gives_them(image_format, tmp_path):
    image = np.full((20, 40, 3), (200, 100, 10), np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    wanted = detection_utils.read_image(str(tmp_path / "image.png"), image_format)[0, 0]
    model = Recorder()
    with pytest.raises(UserError, match="outputs instances, got proposals"):
        Detector(model, min_size=10, max_size=100, image_format=image_format)(image)
    assert model.shown["image"].shape == (len(wanted), 10, 20)
    assert model.shown["image"].dtype == torch.float32
    assert model.shown["image"][:, 0, 0].tolist() == pytest.approx(wanted.tolist())
    assert (model.shown["height"], model.shown["width"]) == (20, 40)


def test_class_names_fall_back_to_the_data_set_and_to_numbers(tmp_path):
    cfg = tiny_config(tmp_path)
    assert Detector.from_config(cfg).class_names[3] == "class 3"
    cfg.DATASETS.TEST = ("coco_2017_val",)  # 80 names for 5 classes
    assert Detector.from_config(cfg).class_names == [f"class {k}" for k in range(5)]
    cfg.MODEL.SET_DETECTOR.NUM_CLASSES = 80
    assert Detector.from_config(cfg).class_names[0] == "person"


def write_video(path: Path, frames: int = 3) -> None:
    pytest.importorskip("cv2")
    writer = VideoWriter(path, 10.0, (48, 64))
    for number in range(frames):
        writer.write(np.full((48, 64, 3), (40 * number, 200, 0), np.uint8))
    writer.close()


@pytest.mark.parametrize("flags", [[], ["--stages"]])
def test_videos_are_drawn_frame_by_frame(detector, tmp_path, capsys, flags):
    write_video(tmp_path / "in.mp4")
    argv = [*detector, "--video-input", str(tmp_path / "in.mp4"), "--output", str(tmp_path / "o")]
    assert demo.main([*argv, *LOW, *flags]) == 0
    assert "3 frames drawn in" in capsys.readouterr().out
    reader = VideoReader.open_file(str(tmp_path / "o" / "in.mp4"))
    assert reader.rate == 10
    frames = list(reader)
    assert len(frames) == 3
    assert frames[0].shape == ((48, 64, 3) if not flags else frames[0].shape)
    assert frames[0].shape[1] == (2 * 384 + 3 * 8 if flags else 64)
    assert frames[0][..., 1].mean() > frames[0][..., 2].mean()  # still RGB, not BGR


def test_a_video_that_is_cut_short_is_named(detector, tmp_path, capsys, monkeypatch):
    write_video(tmp_path / "in.avi", frames=8)
    read = VideoReader.__iter__
    monkeypatch.setattr(VideoReader, "__iter__", lambda reader: islice(read(reader), 2))
    argv = [*detector, "--video-input", str(tmp_path / "in.avi"), "--output", str(tmp_path / "o")]
    assert demo.main(argv) == 1
    assert "in.avi is broken" in capsys.readouterr().err


def test_codecs_fall_back_to_one_that_is_always_there(tmp_path, monkeypatch):
    cv2 = pytest.importorskip("cv2")
    fourcc = cv2.VideoWriter_fourcc
    monkeypatch.setattr(
        cv2, "VideoWriter_fourcc", lambda *c: fourcc(*(c if c[0] == "M" else "????"))
    )
    writer = VideoWriter(tmp_path / "a.avi", 5.0, (48, 64))
    writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.close()
    assert len(list(VideoReader.open_file(str(tmp_path / "a.avi")))) == 1


def test_missing_opencv_raises_one_line(monkeypatch, tmp_path):
    (tmp_path / "a.mp4").touch()
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match="needs OpenCV .*pip install"):
        VideoReader.open_file(str(tmp_path / "a.mp4"))


def test_videos_that_cannot_be_written_raise_one_line(tmp_path):
    pytest.importorskip("cv2")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        VideoWriter(tmp_path / "file" / "a.mp4", 5.0, (48, 64))


class FakeScreen:
    """Replace OpenCV's windows; the keys of a list are pressed."""

    WINDOW_NORMAL = 0

    class error(Exception):
        pass

    def __init__(self, cv2, keys):
        self.keys, self.shown = list(keys), []
        self.cvtColor, self.COLOR_RGB2BGR = cv2.cvtColor, cv2.COLOR_RGB2BGR

    def namedWindow(self, title, flags):
        pass

    def imshow(self, title, image):
        self.shown.append(image)

    def waitKey(self, milliseconds):
        return self.keys.pop(0)


def test_a_window_shows_pictures_until_esc(detector, pictures, monkeypatch, capsys):
    screen = FakeScreen(pytest.importorskip("cv2"), [ord(" "), 27])
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr("dynamic_detr.visualization.window.require_cv2", lambda purpose: screen)
    assert demo.main([*detector, "--input", str(pictures)]) == 0
    assert len(screen.shown) == 2


def test_opencv_without_windows_raises_one_line(monkeypatch):
    screen = FakeScreen(pytest.importorskip("cv2"), [])

    def refuse(title, flags):
        raise screen.error("not implemented")

    screen.namedWindow = refuse
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr("dynamic_detr.visualization.window.require_cv2", lambda purpose: screen)
    with pytest.raises(UserError, match="no windows .*--output"):
        Window("title")


def test_drawings_look_like_their_pictures(detector, pictures, tmp_path):
    """Colours are not swapped between reading and writing."""
    argv = [*detector, "--input", str(pictures / "alpha.png"), "--output", str(tmp_path / "a.png")]
    assert demo.main([*argv, "--confidence-threshold", "1"]) == 0
    assert (read_image(tmp_path / "a.png") == read_image(pictures / "alpha.png")[0, 0]).all()
