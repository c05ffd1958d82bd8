"""The inference API: images from any source, results as numbers and drawings."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import dynamic_detr
from demo import demo
from dynamic_detr import Detector
from dynamic_detr.errors import UserError
from dynamic_detr.inference.pictures import to_picture
from dynamic_detr.visualization import read_image
from dynamic_detr.visualization.video import VideoWriter


@pytest.fixture(scope="module")
def detector() -> Detector:
    return dynamic_detr.load("quickstart", device="cpu")


@pytest.fixture(scope="module")
def scene(scenes) -> Path:
    return scenes / "val" / "000000.jpg"


class Corners(torch.nn.Module):
    """Model that finds one box of class 1 per image, with the mean of red as the score."""

    def forward(self, inputs):
        self.batch = len(inputs)
        return [{"instances": self.find(image)} for image in inputs]

    def find(self, image: dict) -> Instances:
        return Instances(
            (image["height"], image["width"]),
            pred_boxes=Boxes(torch.tensor([[0.0, 0.0, image["width"] / 2, image["height"]]])),
            scores=image["image"][0].mean()[None] / 255,
            pred_classes=torch.tensor([1]),
        )


@pytest.fixture
def simple() -> Detector:
    return Detector(Corners(), ["cat", "dog"], image_format="RGB", min_size=0, threshold=0.1)


def red(share: float, size: tuple[int, int] = (8, 12)) -> np.ndarray:
    image = np.zeros((*size, 3), np.uint8)
    image[..., 0] = round(255 * share)
    return image


def test_every_kind_of_picture_gives_the_same(detector, scene):
    pixels = read_image(scene)
    wanted = detector(scene)
    assert len(wanted) > 0
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    opaque = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
    for source in (
        str(scene),
        Image.open(scene),
        pixels,
        pixels / 255,
        pixels.astype(np.float32) / 255,
        opaque,
        tensor,
        tensor / 255,
        Image.fromarray(opaque),
    ):
        found = detector(source)
        np.testing.assert_allclose(found.boxes, wanted.boxes, atol=1e-3)
        assert found.names == wanted.names
    found = detector(pixels[..., ::-1], channel_order="BGR")
    np.testing.assert_allclose(found.boxes, wanted.boxes)


def test_grey_alpha_and_floats_become_rgb():
    grey = np.array([[0, 100], [200, 255]], np.uint8)
    for source in (grey, grey[..., None], torch.from_numpy(grey), torch.from_numpy(grey)[None]):
        assert (to_picture(source) == grey[..., None].repeat(3, 2)).all()
    assert (to_picture(grey / 255) == grey[..., None].repeat(3, 2)).all()
    assert (to_picture(torch.tensor([[0.5]], dtype=torch.bfloat16)) == 128).all()
    assert (to_picture(Image.fromarray(grey)) == grey[..., None].repeat(3, 2)).all()
    clear = np.zeros((2, 2, 4), np.uint8)
    assert (to_picture(clear) == 255).all()  # transparent pixels are white
    blue = np.array([[[255, 0, 0, 255]]], np.uint8)
    assert to_picture(blue, "BGR").tolist() == [[[0, 0, 255]]]


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (np.zeros((4, 4, 3)) + 2, r"expected floats in \[0, 1\] or uint8, got floats from 2 to 2"),
        (np.zeros((4, 4, 3)) - 0.1, "floats from -0.1"),
        (np.full((4, 4), np.nan), "floats from nan"),
        (np.zeros((4, 4), np.int64), r"expected uint8 or floats in \[0, 1\], got int64"),
        (np.zeros((3, 4, 4), np.uint8)[:, :, :0], r"got \(3, 4, 0\)"),
        (np.zeros((4, 4, 2), np.uint8), r"\(H, W, C\) with C = 1, 3 or 4, got \(4, 4, 2\)"),
        (torch.zeros(5, 5, 3), r"^tensor: .*\(C, H, W\).*got \(5, 5, 3\)"),
        (np.zeros(4, np.uint8), r"got \(4,\)"),
        (7, "expected a path, .*, got int"),
        ("missing.png", "missing.png does not exist"),
        (["missing.png"], "missing.png does not exist"),
        ("*.nothing", "matches no file"),
    ],
)
def test_wrong_images_raise_one_line(simple, source, line):
    with pytest.raises(UserError, match=line):
        simple(source)


def test_wrong_arguments_are_refused(simple, scene):
    with pytest.raises(ValueError, match="channel_order is 'GBR'"):
        simple(scene, channel_order="GBR")
    with pytest.raises(ValueError, match="batch_size is 0"):
        simple([scene], batch_size=0)
    with pytest.raises(UserError, match="has no class 'dgo' .did you mean dog..; it has cat"):
        simple(scene).where(classes=["dgo"])
    with pytest.raises(UserError, match="threshold is 2"):
        Detector(Corners(), threshold=2)
    with pytest.raises(UserError, match="no GPU is available"):
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        dynamic_detr.load("quickstart", device="cuda")


def test_several_pictures_are_a_list(simple, tmp_path):
    for number in range(3):
        Image.fromarray(red(0.2 * number + 0.2)).save(tmp_path / f"{number}.png")
    wanted = pytest.approx([0.2, 0.4, 0.6], abs=0.01)
    stack = np.stack([red(0.2), red(0.4), red(0.6)])
    for source in (
        tmp_path,
        str(tmp_path / "*.png"),
        [tmp_path / f"{k}.png" for k in range(3)],
        [red(0.2), Image.fromarray(red(0.4)), str(tmp_path / "2.png")],
        stack,
        torch.from_numpy(stack).permute(0, 3, 1, 2),
    ):
        for batch_size in (1, 2):
            found = simple(source, batch_size=batch_size)
            assert isinstance(found, list)
            assert [float(f.scores[0]) for f in found] == wanted
            assert simple.model.batch == 1  # the last batch has the rest of three images
    assert simple([]) == [] and len(simple([red(1)])) == 1
    assert [f.path.name for f in simple(tmp_path)] == ["0.png", "1.png", "2.png"]


def test_a_detection_has_box_score_and_name(simple):
    found = simple(red(0.6))
    (one,) = found
    assert one.box == (0, 0, 6, 8) and one.name == "dog" and one.class_id == 1
    assert one.score == pytest.approx(0.6, abs=0.01)
    assert found.size == (8, 12) and found.names == ["dog"] and found.class_ids.tolist() == [1]
    assert found.boxes.tolist() == [[0, 0, 6, 8]]
    assert "1 dog" in repr(found) and len(found) == 1
    assert len(found.where(threshold=0.7)) == 0 == len(simple(red(0.6), threshold=0.7))
    assert len(found.where(classes=["cat"])) == 0 and len(found.where(classes=["dog"])) == 1
    assert found.where(threshold=0.7).best_score == pytest.approx(0.6, abs=0.01)


def test_results_have_all_scores_and_the_ids_of_the_annotations(simple, tmp_path):
    simple.category_ids = [17, 18]
    path = tmp_path / "000000000042.jpg"
    Image.fromarray(red(0)).save(path)
    found = simple(path)
    assert len(found) == 0  # below the threshold
    (result,) = found.to_coco()
    assert result["image_id"] == 42 and result["category_id"] == 18
    assert result["bbox"] == [0, 0, 6, 8] and result["category"] == "dog"
    assert found.to_coco(image_id=7)[0]["image_id"] == 7
    assert Detector(Corners(), ["cat", "dog"]).category_ids == [1, 2]
    unnamed = Detector(Corners(), image_format="RGB")(red(1))
    assert unnamed.names == ["class 1"] and "class 1" in repr(unnamed)
    (result,) = unnamed.to_coco()
    assert result["category_id"] == 2 and result["category"] == "class 1"


def test_streams_skip_broken_images(simple, tmp_path, capsys):
    for name in ("a.png", "c.png"):
        Image.fromarray(red(0.5)).save(tmp_path / name)
    (tmp_path / "b.png").write_text("no picture")
    missed = []
    stream = simple.stream(
        tmp_path, on_error=lambda picture, error: missed.append(picture.path.name), progress=True
    )
    assert [found.path.name for found in stream] == ["a.png", "c.png"]
    assert missed == ["b.png"] and "2/3" in capsys.readouterr().err
    with pytest.raises(UserError, match="b.png cannot be read"):
        list(simple.stream(tmp_path))
    assert len(list(simple.stream(red(0.5) for _ in range(5)))) == 5


def test_videos_are_streams(simple, tmp_path):
    pytest.importorskip("cv2")
    writer = VideoWriter(tmp_path / "12.avi", 10.0, (48, 64))
    for share in (0.2, 0.9):
        writer.write(red(share, (48, 64)))
    writer.close()
    first, second = simple(tmp_path / "12.avi")
    ids = [found.to_coco()[0]["image_id"] for found in (first, second)]
    assert len(set(ids)) == 2
    assert float(first.scores[0]) == pytest.approx(0.2, abs=0.05)
    assert float(second.scores[0]) == pytest.approx(0.9, abs=0.05)
    assert second.draw().shape == (8 * 48, 8 * 64, 3)  # a small picture is enlarged


def test_drawings_are_saved_and_shown(detector, scene, tmp_path, monkeypatch, capsys):
    found = detector(scene)
    assert found.save(tmp_path / "in" / "drawn.png") == tmp_path / "in" / "drawn.png"
    drawn = read_image(tmp_path / "in" / "drawn.png")
    assert (drawn == found.draw()).all()
    for variable in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found.show()
    path = Path(capsys.readouterr().out.strip())
    assert path.parent == tmp_path and (read_image(path) == drawn).all()

    cells = []  # of a notebook
    shell = SimpleNamespace(kernel=object())
    ipython = SimpleNamespace(
        get_ipython=lambda: shell, display=SimpleNamespace(display=cells.append)
    )
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    found.show()
    assert (np.asarray(cells[0]) == drawn).all()


def test_stages_follow_the_same_queries(detector, scene):
    found = detector(scene)
    assert len(found.stages) == 4
    assert {len(stage) for stage in found.stages} == {len(found.stages[-1])}
    assert found.draw(stages=True).shape[1] == 4 * 384 + 5 * 8
    some = found.names[:1]
    chosen = found.where(classes=detector.class_names).where(classes=some)
    assert 0 < len(chosen.stages[-1]) < len(found.stages[-1])
    assert set(chosen.without_image().stages[-1].names) == set(some)


def test_shipped_detector_finds_most_objects(detector, scenes):
    """The threshold is the one with the best F1."""
    assert detector.threshold == detector.info.threshold
    data = json.loads((scenes / "annotations" / "instances_val.json").read_text())
    found = sum(len(f) for f in detector(scenes / "val"))
    assert 0.6 < found / len(data["annotations"]) < 1.5


def test_results_of_the_demo_have_the_ap_of_the_detector(detector, scenes, tmp_path, capsys):
    """Category and image ids are those of the JSON file, in any order."""
    data = json.loads((scenes / "annotations" / "instances_val.json").read_text())
    number = len(data["categories"]) + 1
    for entry in (*data["categories"], *data["annotations"]):
        key = "category_id" if "category_id" in entry else "id"
        entry[key] = 10 * (number - entry[key])
    for entry in (*data["images"], *data["annotations"]):
        key = "image_id" if "image_id" in entry else "id"
        entry[key] += 1000
    changed, results = tmp_path / "changed.json", tmp_path / "results.json"
    changed.write_text(json.dumps(data))
    argv = ["--model", "quickstart", "--input", str(changed), "--images", str(scenes / "val")]
    assert demo.main([*argv, "--json", str(results)]) == 0
    truth = COCO(str(changed))
    scored = COCOeval(truth, truth.loadRes(str(results)), "bbox")
    scored.evaluate()
    scored.accumulate()
    scored.summarize()
    wanted = detector.evaluate(scenes / "annotations" / "instances_val.json", scenes / "val")
    assert wanted["AP"] > 50
    assert 100 * scored.stats[0] == pytest.approx(wanted["AP"], abs=0.01)
    assert "of the best F1 in the model's evaluation" in capsys.readouterr().out


def test_the_demo_detects_an_image_under_each_of_its_ids(scene, tmp_path):
    names, results = tmp_path / "names.json", tmp_path / "results.json"
    images = [{"id": number, "file_name": scene.name} for number in (1, 2)]
    names.write_text(json.dumps({"images": images, "categories": [{"id": 1, "name": "disc"}]}))
    argv = ["--input", str(names), "--images", str(scene.parent), "--json", str(results)]
    assert demo.main(["--model", "quickstart", *argv]) == 0
    found = json.loads(results.read_text())
    first, second = ([{**r, "image_id": 0} for r in found if r["image_id"] == n] for n in (1, 2))
    assert first == second != []
    drawn = tmp_path / "drawn"
    demo.main(["--model", "quickstart", *argv[:4], "--output", str(drawn)])
    assert [path.name for path in drawn.iterdir()] == [scene.name]


def test_the_demo_resumes(detector, scenes, tmp_path, monkeypatch, capsys):
    results, out = tmp_path / "results.json", tmp_path / "drawn"
    argv = ["--model", "quickstart", "--input", str(scenes / "val"), "--json", str(results)]
    argv += ["--output", str(out)]
    stream = Detector.stream

    def stopped(self, source, **options):
        for number, found in enumerate(stream(self, source, **options)):
            if number == 2:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(Detector, "stream", stopped)
    with pytest.raises(SystemExit):
        demo.main(argv)
    assert len(list(out.iterdir())) == 2 and not results.exists()
    monkeypatch.undo()
    with open(f"{results}.part", "a") as journal:
        journal.write('{"picture": "ha')  # an incomplete line, as after a kill
    with pytest.raises(SystemExit) as stop:
        demo.main([*argv, "--resume", "--classes", "disc"])
    assert stop.value.code == 2 and "of another detector" in capsys.readouterr().err
    assert demo.main([*argv, "--resume"]) == 0
    assert "already done: 2 of 6 pictures" in capsys.readouterr().out
    resumed = json.loads(results.read_text())
    assert len(list(out.iterdir())) == 6 and list(tmp_path.glob("*.part")) == []
    wanted = [result for found in detector(scenes / "val") for result in found.to_coco()]
    assert resumed == wanted


def test_the_demo_selects_classes_and_reports_the_best_score(scene, tmp_path, capsys):
    argv = ["--model", "quickstart", "--input", str(scene), "--output", str(tmp_path)]
    results = tmp_path / "results.json"
    assert demo.main([*argv, "--classes", "disc, cross", "--json", str(results)]) == 0
    assert {r["category"] for r in json.loads(results.read_text())} == {"disc", "cross"}
    assert demo.main([*argv, "--confidence-threshold", "0.999"]) == 0
    output = capsys.readouterr().out
    assert "nothing scored 0.999 or more; the best score was 0." in output
    with pytest.raises(SystemExit):
        demo.main([*argv, "--classes", "disk"])
    assert "has no class 'disk' (did you mean disc?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "arguments", "line"),
    [
        ("{", [], "is not a JSON file of COCO annotations"),
        ("[]", [], "is not a JSON file of COCO annotations"),
        ('{"images": []}', [], "lists no images"),
        ('{"images": [{"file_name": "x.png", "id": 1}]}', [], "folder of the images with --imag"),
        (None, ["--images", "."], "--images needs a JSON"),
    ],
)
def test_wrong_lists_of_images_are_one_line(scene, tmp_path, capsys, content, arguments, line):
    source = scene
    if content is not None:
        source = tmp_path / "list.json"
        source.write_text(content)
    argv = ["--model", "quickstart", "--input", str(source), "--json", str(tmp_path / "r.json")]
    with pytest.raises(SystemExit) as stop:
        demo.main([*argv, *arguments])
    assert stop.value.code == 2 and line in capsys.readouterr().err
