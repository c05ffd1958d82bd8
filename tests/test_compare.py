"""tools/compare.py: equal terms, kinds of errors, runs and page."""

import json
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import compare
import pytest
import torch
from comparison import results, runs
from comparison.errors import KINDS, classify, error_table
from comparison.page import write_page
from comparison.plan import Plan
from comparison.results import spread
from comparison.terms import compose, read_first, scaled_rate
from conftest import ROOT
from tiny_run import write_config, write_data

from dynamic_detr.engine.step import seed_step
from dynamic_detr.engine.trainer import Trainer
from dynamic_detr.errors import UserError

PRETRAIN = str(ROOT / "configs" / "quickstart" / "pretrain.yaml")
OTHERS = sorted((ROOT / "configs" / "quickstart" / "comparison").glob("*.yaml"))
FASTER = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"


# ----------------------------------------------------------------------------------------- terms


@pytest.mark.parametrize(("optimizer", "rate"), [("SGD", 0.005), ("ADAMW", 0.01)])
def test_rate_follows_the_batch(optimizer, rate):
    assert scaled_rate(0.02, 16, 4, optimizer) == pytest.approx(rate)


def test_terms_are_those_of_the_first(tmp_path):
    keys = ["SOLVER.IMS_PER_BATCH", "4", "MODEL.RESNETS.DEPTH", "18"]
    keys += ["MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
    first = read_first(PRETRAIN, keys, 450, 4, tmp_path)
    cfg, terms = compose(FASTER, first, keys)
    assert (cfg.INPUT, cfg.DATASETS, cfg.DATALOADER) == (
        first.INPUT,
        first.DATASETS,
        first.DATALOADER,
    )
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.MAX_ITER, solver.STEPS) == (4, 450, (360, 420))
    assert (solver.WARMUP_ITERS, cfg.TEST.EVAL_PERIOD) == (45, 113)  # a tenth; the end counts too
    assert solver.EMA.ENABLED and solver.EMA.DECAY == 0.999
    assert ("SGD", pytest.approx(0.005)) == (solver.OPTIMIZER, solver.BASE_LR)
    assert not solver.CLIP_GRADIENTS.ENABLED and solver.WEIGHT_DECAY_NORM == 0
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 6
    assert terms.start == "shared: random" and terms.rule == "0.02 x 4/16"
    # Settings that the weights of the first configuration require.
    assert cfg.MODEL.RESNETS.NORM == "BN" and cfg.MODEL.PIXEL_STD == first.MODEL.PIXEL_STD
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 0 and cfg.INPUT.FORMAT == "RGB"
    again, _ = compose(PRETRAIN, first, keys)
    assert pytest.approx(0.0004 / 2**0.5) == again.SOLVER.BASE_LR


def test_another_backbone_keeps_its_own_start(tmp_path):
    cfg, terms = compose(FASTER, read_first(PRETRAIN, [], 10, 1, tmp_path), [])
    assert cfg.MODEL.WEIGHTS.endswith("MSRA/R-50.pkl") and cfg.INPUT.FORMAT == "BGR"
    assert terms.start == "own: R-50.pkl"


def test_another_optimizer_needs_its_own_rate(tmp_path):
    keys = ["SOLVER.OPTIMIZER", "ADAMW"]
    first = read_first(PRETRAIN, keys, 10, 1, tmp_path)
    with pytest.raises(UserError, match="has a learning rate for SGD.*set SOLVER.BASE_LR too"):
        compose(FASTER, first, keys)
    cfg, terms = compose(FASTER, first, [*keys, "SOLVER.BASE_LR", "0.0004"])
    assert pytest.approx(0.0004) == cfg.SOLVER.BASE_LR and terms.rule == "as given"


def test_backbone_multiplier_is_one_for_random_weights(tmp_path):
    config = str(ROOT / "configs" / "DETR" / "detr_R_50.yaml")
    pretrained = tmp_path / "R-50.pth"
    torch.save({"model": {"res2.0.conv1.weight": torch.ones(1)}}, pretrained)
    for weights, multiple in (("", 1.0), (str(pretrained), 0.1)):
        first = read_first(config, ["MODEL.WEIGHTS", weights], 10, 1, tmp_path)
        assert weights == first.MODEL.WEIGHTS  # weights of a backbone are not copied
        assert multiple == compose(config, first, [])[0].SOLVER.BACKBONE_MULTIPLIER


def test_only_the_backbone_of_a_trained_detector_is_shared(tmp_path):
    keys = ["MODEL.WEIGHTS", "quickstart"]
    first = read_first(PRETRAIN, keys, 10, 1, tmp_path / "out")
    cfg, terms = compose(PRETRAIN, first, keys)
    assert terms.start == "shared: backbone_of_quickstart.pth"
    weights = torch.load(cfg.MODEL.WEIGHTS)["model"]
    assert weights and all(name.startswith(("stem.", "res")) for name in weights)


@pytest.mark.parametrize("config", OTHERS, ids=lambda path: path.stem)
def test_a_seed_gives_the_same_random_backbone(config, tmp_path):
    first = read_first(PRETRAIN, ["MODEL.DEVICE", "cpu"], 10, 1, tmp_path)
    states = []
    for name in (PRETRAIN, str(config)):
        cfg, terms = compose(name, first, ["MODEL.DEVICE", "cpu"])
        assert terms.start == "shared: random"
        seed_step(1, -1, 0)
        states.append(Trainer.build_model(cfg).backbone.bottom_up.state_dict())
    assert len(states[1]) > 70  # DETR here has no res5
    assert all(torch.equal(tensor, states[0][name]) for name, tensor in states[1].items())


# ---------------------------------------------------------------------------------------- errors


def box(category: int, x: float, score: float | None = None, **more) -> dict:
    """Return a box of 100 x 100 pixels at x, a detection if it has a score."""
    bbox = {"image_id": 1, "category_id": category, "bbox": [x, 0, 100, 100], "area": 10_000}
    return {**bbox, **({"iscrowd": 0} if score is None else {"score": score}), **more}


def truth(*objects: dict) -> dict:
    return {
        "images": [{"id": 1, "width": 900, "height": 100, "file_name": "1.png"}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [{**item, "id": k} for k, item in enumerate(objects, start=1)],
    }


@pytest.mark.parametrize(
    ("found", "kinds", "missed"),
    [
        ([box(1, 10, 0.9)], ["correct"], set()),
        ([box(2, 10, 0.9)], ["class"], set()),
        ([box(1, 50, 0.9)], ["location"], set()),  # IoU 1/3
        ([box(2, 50, 0.9)], ["both"], {1}),
        ([box(1, 95, 0.9)], ["background"], {1}),  # IoU 0.03
        ([box(1, 300, 0.9)], ["background"], {1}),
        ([box(1, 20, 0.6), box(1, 0, 0.9)], ["duplicate", "correct"], set()),
        ([box(1, 50, 0.9), box(1, 10, 0.3)], ["location", "correct"], set()),
        ([], [], {1}),
    ],
)
def test_every_detection_has_one_kind(found, kinds, missed):
    result = classify(truth(box(1, 0)), found)
    assert (result.kinds, result.missed) == (kinds, missed)


def test_crowds_are_neither_right_nor_wrong():
    crowd = box(1, 0, bbox=[0, 0, 600, 100], iscrowd=1)
    result = classify(truth(crowd), [box(1, 200, 0.9), box(2, 200, 0.8)])
    assert result.kinds == ["ignored", "background"] and not result.missed


def test_the_better_score_is_matched_first():
    both = truth(box(1, 0), box(1, 40))
    result = classify(both, [box(1, 5, 0.5), box(1, 10, 0.9)])
    assert result.kinds == ["duplicate", "correct"]
    assert (result.matched, result.missed) == ({1}, {2})


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        ([box(2, 0, 0.9)], "class"),
        ([box(1, 50, 0.9)], "location"),
        ([box(1, 300, 0.9), box(1, 0, 0.8)], "background"),
        ([box(1, 0, 0.9), box(1, 300, 0.8)], None),  # after all objects are found, it costs nothing
    ],
)
def test_correcting_an_error_gains_its_cost(found, kind):
    table = error_table(truth(box(1, 0)), found, 0.5)
    gains = {name: table[name]["ap50"] for name in KINDS}
    if kind is None:
        assert gains == dict.fromkeys(KINDS, 0.0)
    else:
        assert gains[kind] > 49 and sum(gains.values()) == gains[kind]
        assert table[kind]["count"] == 1


def test_correcting_duplicates_and_missed_objects():
    objects = truth(box(1, 0), box(1, 400), box(1, 700))
    found = [box(1, 0, 0.9), box(1, 5, 0.8), box(1, 400, 0.7)]
    table = error_table(objects, found, 0.5)
    assert table["duplicate"]["count"] == table["missed"]["count"] == 1
    assert 0 < table["duplicate"]["ap50"] < table["missed"]["ap50"]
    # With the higher threshold, one more object is missed.
    assert error_table(objects, found, 0.75)["missed"]["count"] == 2


def test_an_object_is_given_to_one_corrected_detection_only():
    found = [box(1, 50, 0.9), box(1, -50, 0.8)]
    table = error_table(truth(box(1, 0)), found, 0.5)
    assert table["location"] == {"ap50": pytest.approx(100), "count": 2}


# ------------------------------------------------------------------------------------ the command


class Page(HTMLParser):
    """Headings, classes and links of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings, self.classes, self.links, self.open = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.classes += (attrs.get("class") or "").split()
        self.links += [attrs[k] for k in ("src", "href", "xlink:href") if k in attrs]
        assert tag != "script"
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Write data and configurations of two detectors and an invalid one; return the data flags."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    write_config(tmp_path)
    Path("retina.yaml").write_text(
        "_BASE_: tiny.yaml\nMODEL: {META_ARCHITECTURE: RetinaNet, RETINANET: {IN_FEATURES: [res2], "
        "NUM_CONVS: 1}, ANCHOR_GENERATOR: {SIZES: [[16, 32]]}}\n"
        "SOLVER: {OPTIMIZER: SGD, IMS_PER_BATCH: 4}\n"
    )
    Path("broken.yaml").write_text(
        "_BASE_: tiny.yaml\nMODEL: {SET_DETECTOR: {ENCODER: NoSuchEncoder}}\n"
    )
    flags = []
    for split in ("train", "val"):
        json_file, images = write_data(Path(split))
        flags += [f"--{split}-json", str(json_file), f"--{split}-images", str(images)]
    return flags


def fails(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        compare.main(argv)
    assert stop.value.code == 2


def test_comparison_from_runs_to_page(tiny, capsys, monkeypatch):
    """Use no time; then train two detectors; then add one that fails without harm to the others."""
    monkeypatch.setattr(results, "measure_speed", partial(results.measure_speed, rounds=1))
    monkeypatch.setattr(runs, "POLL_SECONDS", 0.1)
    first = ["--config-file", "tiny.yaml", "--config-file", "retina.yaml", *tiny]
    first += ["--iterations", "4", "--evaluations", "2"]
    fails([*first, "--output", "out", "--budget-minutes", "0"])
    assert "tiny, seed 1: not started" in capsys.readouterr().err
    assert "failed" in Page(Path("out/index.html").read_text()).classes

    compare.main(["--output", "out", "--note", "a <quiet> machine"])
    printed = capsys.readouterr().out
    assert "0.0005" in printed and "| runs finished" in printed and "1 of 1" in printed
    numbers = json.loads(Path("out/results.json").read_text())
    for detector in numbers["detectors"].values():
        (run,) = detector["runs"]
        assert run["status"] == "finished" and [n for n, _ in run["curve"]] == [4, 8]
        assert set(detector["errors"]) == set(KINDS)
        for key in ("inference_ms", "step_s", "peak_mb", "parameters_m", "gmac"):
            assert detector[key] > 0
    text = Path("out/index.html").read_text()
    page = Page(text)
    assert len(page.headings) == 8 and "failed" not in page.classes
    assert page.classes.count("picture") == 3 * 6  # annotated and two detectors, six pictures
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in page.links)
    assert "a &lt;quiet&gt; machine" in text and text.count("0.001 x 2/4") == 1

    model = Path("out/tiny/seed_1/model_final.safetensors")
    written = model.stat().st_mtime_ns
    fails(["--output", "out", "--config-file", "broken.yaml"])
    message = capsys.readouterr().err
    assert "broken, seed 1" in message and "NoSuchEncoder" in message
    assert model.stat().st_mtime_ns == written
    text = Path("out/index.html").read_text()
    assert Page(text).classes.count("failed") == 1 and "NoSuchEncoder" in text

    before = json.loads(Path("out/results.json").read_text())
    fails(["--output", "out", "--page-only"])
    assert json.loads(Path("out/results.json").read_text()) == before
    Path("tiny.yaml").write_text(Path("tiny.yaml").read_text().replace("0.001", "0.002"))
    fails(["--output", "out"])
    assert "has changed since tiny was trained" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ([], "--config-file is missing"),
        (["--config-file", "none.yaml"], "none.yaml does not exist"),
        (["--config-file", "tiny.yaml"], "DATASETS.TEST is empty"),
        (["--config-file", "tiny.yaml", "DATASETS.TEST", "('x',)"], "which is not registered"),
        (["--config-file", "tiny.yaml", "DATASETS.TEST", "('x', 'y')"], "a comparison has one"),
        (["--config-file", "tiny.yaml", "--config-file", "a/tiny.yaml"], "have the same name"),
        (["--config-file", "tiny.yaml", "--val-json", "x"], "--train-json is missing"),
        (["--config-file", "tiny.yaml", "SOLVER.MAX_ITER", "9"], "is set by --iterations"),
        (["--config-file", "tiny.yaml", "--page-only"], "run without --page-only"),
        (["--config-file", "tiny.yaml", "--note", "\udcff"], "is not text in UTF-8"),
    ],
)
def test_wrong_commands_are_refused(argv, reason, tiny, capsys):
    fails([*argv, "--output", "out"])
    assert reason in capsys.readouterr().err


def test_a_comparison_keeps_its_terms(tiny, capsys):
    fails(["--config-file", "tiny.yaml", *tiny, "--output", "out", "--budget-minutes", "0"])
    fails(["--output", "out", "--iterations", "9"])
    assert "has iterations 6, not 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("devices", "device"),
    [
        ([], "cuda"),
        (["--num-gpus", "8"], "cuda"),
        (["--num-gpus", "0"], "cpu"),
        (["--num-gpus", "0", "--num-processes", "1"], "cpu"),
        (["--num-processes", "1"], "cuda"),
        (["--num-processes", "2"], "cpu"),
    ],
)
def test_speed_is_measured_on_the_device_of_the_runs(devices, device, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert Plan(Path(), {}, devices=devices).device == device


def test_spread_is_that_of_the_seeds():
    assert spread([1.0, 3.0]) == {"mean": 2.0, "deviation": pytest.approx(2**0.5), "runs": 2}
    assert spread([1.0, None])["deviation"] is None and spread([]) is None


def test_page_shows_the_spread_of_several_seeds(tmp_path):
    run = {"status": "finished", "curve": [[8, 10.0], [16, 20.0]]}
    detector = {
        "config": "a.yaml",
        "batch": 8,
        "runs": [{**run, "seed": 1}, {**run, "seed": 2, "curve": [[8, 12.0], [16, 24.0]]}],
        "final": {"AP": spread([20.0, 24.0]), "APl": None},
        "errors": None,
        "terms": {
            "optimizer": "SGD",
            "recipe_rate": 0.1,
            "recipe_batch": 16,
            "rate": 0.05,
            "rule": "",
            "clip": "off",
            "start": "random",
        },
    }
    numbers = {"detectors": {"a": detector, "b": detector}, "images": 1, "objects": 1, "note": ""}
    numbers |= {"machine": "", "commands": [], "shared": {"data": "", "length": ""}}
    text = write_page(numbers, truth(), tmp_path, {})
    page = Page(text)
    assert "± 2.8" in text and "APl" not in text and "spread" in page.classes
    assert '<span class="best">' not in text  # neither is better
