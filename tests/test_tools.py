"""Commands in tools/: output, written files and errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import benchmark
import export_weights
import fill_config_table
import plot_metrics
import pytest
import quickstart
import torch
from benchmarks.baselines import baseline_operators
from benchmarks.costs import config_costs, config_products, count_gmac, count_parameters
from benchmarks.models import BASELINE, BOUND
from benchmarks.products import PlainProducts, dtypes_of, record_products
from conftest import ROOT
from detectron2.modeling import build_model
from torch.utils.flop_counter import FlopCounterMode

import dynamic_detr
from dynamic_detr import Pyramid
from dynamic_detr.errors import UserError
from dynamic_detr.files.config_file import read_config
from dynamic_detr.files.model_file import read_model

PRETRAIN = ROOT / "configs" / "quickstart" / "pretrain.yaml"
DETR = ROOT / "configs" / "DETR" / "detr_R_50.yaml"
FINETUNE = PRETRAIN.with_name("finetune.yaml")
PEERS = ["faster_rcnn_R_50_FPN_1x", "retinanet_R_50_FPN_1x"]


@pytest.fixture
def checkpoint(tmp_path):
    """Write a checkpoint of the quickstart's detector with random weights."""
    cfg = read_config(str(PRETRAIN), ["MODEL.DEVICE", "cpu"])
    path = tmp_path / "model_final.pth"
    names = ["disc", "square", "triangle", "star", "ring", "cross"]
    torch.save({"model": build_model(cfg).state_dict(), "class_names": names, "x": 1}, path)
    return path


def export(source: Path, target: Path) -> Path:
    options = ["--config-file", str(PRETRAIN), "--threshold", "0.25", "--note", "small"]
    export_weights.main([str(source), str(target), *options])
    return target


def test_export_halves_the_weights_and_describes_them(checkpoint, tmp_path, capsys):
    target = export(checkpoint, tmp_path / "small" / "model.safetensors")
    assert target.stat().st_size < 40e6 and "MB" in capsys.readouterr().out
    info, exported = read_model(str(target))
    original = torch.load(checkpoint)
    assert info.class_names == original["class_names"]
    assert (info.threshold, info.note) == (0.25, "small")
    assert read_config(str(target), []).MODEL.DYNAMIC_DECODER.NUM_QUERIES == 100
    for name, tensor in original["model"].items():
        assert exported[name].dtype in (torch.float16, torch.int64)
        torch.testing.assert_close(exported[name].to(tensor.dtype), tensor, rtol=1e-3, atol=1e-6)
    again = tmp_path / "again.safetensors"
    export_weights.main([str(target), str(again), "--dtype", "float32"])
    assert read_model(str(again))[0] == info


def test_export_rejects_invalid_checkpoints_and_arguments(checkpoint, tmp_path, capsys):
    broken, huge = tmp_path / "broken.pth", tmp_path / "huge.pth"
    broken.write_text("no checkpoint")
    content = torch.load(checkpoint)
    next(iter(content["model"].values())).fill_(1e30)
    torch.save(content, huge)
    target = tmp_path / "out.safetensors"
    for arguments, reason in (
        ([broken, target, "--config-file", PRETRAIN], "not a valid checkpoint"),
        ([huge, target, "--config-file", PRETRAIN], "does not fit"),
        ([huge, target], "--config-file is missing"),
        ([huge, "out.pth"], "must end in .safetensors"),
        (["quickstart", target, "--threshold", "2"], "--threshold is 2"),
        (["quickstart", target, "--config-file", DETR], "are not of one model"),
        (["quickstart", target, "--note", "\udcff"], "--note is '\\udcff'"),
    ):
        with pytest.raises(SystemExit) as stop:
            export_weights.main(list(map(str, arguments)))
        assert stop.value.code == 2
        assert reason in capsys.readouterr().err
        assert not target.exists()


def test_quickstart_ends_with_table_and_pictures(checkpoint, tmp_path):
    weights, output = export(checkpoint, tmp_path / "weights.safetensors"), tmp_path / "out"
    options = ["--output", output, "--weights", weights, "--scenes", "1"]
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "tools" / "quickstart.py", *options),
            *("SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2"),
        ],
        env={**os.environ, "DETECTRON2_DATASETS": str(tmp_path / "data")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for row in ("shipped, its own classes", "before fine-tuning", "after fine-tuning"):
        assert row in done.stdout
    model = output / "finetune" / "model_final.safetensors"
    assert f'detector = dynamic_detr.load("{model}")' in done.stdout
    assert model.stat().st_size < 80e6 and len(dynamic_detr.load(model).class_names) == 4
    for name in ("scenes_shapes_val", "scenes_symbols_val"):
        assert (output / f"{name}.png").is_file() and (output / f"{name}_stages.png").is_file()


def test_quickstart_names_the_folder_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "file"))
    with pytest.raises(SystemExit) as stop:
        quickstart.main(["--output", str(tmp_path)])
    assert stop.value.code == 2
    assert "DETECTRON2_DATASETS" in capsys.readouterr().err


def test_quickstart_keeps_a_fine_tuning_with_other_keys(tmp_path):
    weights = tmp_path / "weights"
    weights.write_text("")
    start, other = (quickstart.start_of(str(weights), ["SOLVER.MAX_ITER", n]) for n in "12")
    quickstart.require_same_start(tmp_path, start)  # nothing was trained
    (tmp_path / quickstart.NOTE).write_text(start)
    quickstart.require_same_start(tmp_path, other)
    (tmp_path / "model_0000001.pth").touch()
    quickstart.require_same_start(tmp_path, start)
    with pytest.raises(UserError, match="with other weights or keys; add --fresh"):
        quickstart.require_same_start(tmp_path, other)


def test_quickstart_names_missing_weights(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        quickstart.main(["--weights", str(tmp_path / "none.pth")])
    assert stop.value.code == 2
    assert "none.pth does not exist, neither as a file nor" in capsys.readouterr().err


def test_benchmark_prints_ratios_and_writes_them(tmp_path, capsys):
    target = tmp_path / "times.json"
    configs = ["--config-file", str(PRETRAIN), "--config-file", str(FINETUNE)]
    options = ["--size", "64x64", "--repeats", "1", "--batch", "2"]
    benchmark.main([*configs, *options, "--json", str(target)])
    result = json.loads(target.read_text())
    models = {row["model"]: row for row in result["models"]}
    assert list(models) == ["pretrain", "finetune", BOUND, BASELINE, *PEERS]
    peer, ours, bound = models[PEERS[0]], models["pretrain"], models[BOUND]
    for time in ("latency", "train_step"):
        assert bound[f"{time}_to_bound"] == 1
        assert ours[f"{time}_to_bound"] * bound[f"{time}_to_first"] == pytest.approx(1)
    assert peer["latency_to_peer"] == peer["train_step_to_peer"] == 1
    assert ours["latency_to_first"] == ours["train_step_to_first"] == 1
    assert all(ours[key] > 0 for key in ("latency_s", "images_per_s", "train_step_s"))
    assert ours["parameters_m"] == models[BASELINE]["parameters_m"]
    parts = sum(ours["gmac"][part] for part in ("backbone", "encoder", "decoder"))
    assert parts == pytest.approx(ours["gmac"]["all"], rel=1e-3)
    assert len(result["operators"]) == 11
    for row in result["operators"]:
        assert row["times_bound"] * row["share_of_bound"] == pytest.approx(1)
    assert [len(rows) for rows in result["profile"].values()] == [12, 12]
    assert all(0 < row["share"] < 1 for rows in result["profile"].values() for row in rows)
    printed = capsys.readouterr().out
    assert f"× {PEERS[0]}" in printed and "torchvision" in printed


def test_benchmark_compares_with_hugging_face(tmp_path):
    pytest.importorskip("transformers")
    target = tmp_path / "times.json"
    options = ["--size", "64x96", "--repeats", "1", "--json", str(target)]
    benchmark.main(["transformers", *options])
    rows = json.loads(target.read_text())["transformers"]
    assert len(rows) == 4 and all(row["ours_s"] > 0 < row["theirs_s"] for row in rows)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--repeats", "0"], "--repeats: '0' is not an integer >= 1"),
        (["--size", "800"], "--size: '800' is not HEIGHTxWIDTH"),
        (["--size", "32x800"], "--size: '32x800' is too small"),
        (["--json", "nowhere/times.json"], "--json: the folder nowhere does not exist"),
        (["--config-file", "none.yaml"], "the configuration none.yaml does not exist"),
        (["--config-file", "a/x.yaml", "--config-file", "b/x.yaml"], "have the name x"),
    ],
)
def test_benchmark_rejects_wrong_arguments_first(options, reason, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(options)
    assert stop.value.code == 2
    assert reason in capsys.readouterr().err


def test_the_bound_has_the_products_of_the_network_without_its_backbone():
    """The products are recorded on fake tensors; the plain ones have the same sizes."""
    for config in (PRETRAIN, DETR):
        products = config_products(str(config), (64, 96), 2)
        flop = sum(product.flop for product in products)
        _, gmac = config_costs(str(config), (64, 96))
        images = 2 * (gmac["all"] - gmac["backbone"])
        assert flop / 2e9 == pytest.approx(images, rel=1e-6)
        plain = PlainProducts(products, torch.float32, "cpu")
        assert sum(p.flop for p in record_products(plain.forward)) == flop
        with FlopCounterMode(display=False) as counter:
            plain.forward_and_backward()
        assert counter.get_total_flops() == 3 * flop


def test_dtypes_are_those_of_the_arithmetic():
    half, full = torch.ones(8, 3, 8, dtype=torch.bfloat16), torch.ones(1, 8, 8)

    def run() -> None:
        torch.bmm(half, half.transpose(1, 2))  # 8 · 3 · 8 · 3 against 8 · 8 · 8
        torch.bmm(full, full)

    assert dtypes_of(run) == "bfloat16 53 %, float32 47 %"
    assert dtypes_of(lambda: half.float() * 2) == "float32"
    assert dtypes_of(lambda: half + half) == "bfloat16"


def test_benchmark_counts_the_encoder_as_the_convolutions_it_is_made_of():
    """A 3×3 convolution has 9·C² multiply-adds per output pixel."""
    model = build_model(read_config(str(PRETRAIN), ["MODEL.DEVICE", "cpu"])).eval()
    encoder, channels = model.encoder, model.encoder.blocks[0].offset.in_channels
    sizes = [128 // stride for stride in model.strides]
    pyramid = Pyramid(
        [torch.randn(1, channels, n, n) for n in sizes],
        model.strides,
        torch.tensor([[128, 128]]),
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(pyramid)
    pixels = [n * n for n in sizes]
    convolved = sum(pixels) + 2 * sum(pixels[1:])  # the level itself; its two neighbours
    wanted = 9 * channels * (channels * convolved + 27 * sum(pixels)) * len(encoder.blocks)
    assert counter.get_total_flops() / 2 == pytest.approx(wanted, rel=0.01)


def test_table_of_configurations_has_the_counts_of_a_run(capsys):
    """Counts on fake tensors equal those of a detector that runs."""
    row = "| shapes | [pretrain](pretrain.yaml) | 71.8 |"
    heading = f"| row | config | AP {fill_config_table.COSTS}\n| --- | --- | --- | --- | --- |\n"
    other = "| [pretrain](pretrain.yaml) | what it is | |\n"
    text = f"{heading}{row} 1 |  |\n\n{other}"
    model = build_model(read_config(str(PRETRAIN), ["MODEL.DEVICE", "cpu"])).eval()
    inputs = [{"image": torch.rand(3, 128, 160) * 255}]
    gmac = count_gmac(model, lambda: model(inputs))
    filled = fill_config_table.fill(text, PRETRAIN.parent, (128, 160))
    wanted = f"| {count_parameters(model):.1f} | {gmac['all']:.0f} |"
    assert filled == f"{heading}{row}{wanted.replace('| ', ' ', 1)}\n\n{other}"


def test_costs_of_faster_rcnn_are_those_of_its_layers():
    parameters, gmac = config_costs("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", (800, 1216))
    pixels = sum((800 // stride) * (1216 // stride) for stride in (4, 8, 16, 32))
    rpn = (pixels + 13 * 19) * (9 * 256 * 256 + 256 * (3 + 12))
    head = 1000 * (49 * 256 * 1024 + 1024 * 1024 + 1024 * (81 + 320))
    assert gmac["all"] - gmac["backbone"] == pytest.approx((rpn + head) / 1e9)
    assert (parameters, gmac["backbone"]) == pytest.approx((41.7, 130), rel=0.01)


def test_costs_of_retinanet_are_those_of_its_layers():
    parameters, gmac = config_costs("COCO-Detection/retinanet_R_50_FPN_1x.yaml", (800, 1216))
    pixels = sum(-(-800 // stride) * -(-1216 // stride) for stride in (8, 16, 32, 64, 128))
    head = pixels * 9 * 256 * (8 * 256 + 9 * (80 + 4))
    assert gmac["all"] - gmac["backbone"] == pytest.approx(head / 1e9)
    assert parameters == pytest.approx(37.9, rel=0.01)


def test_benchmark_composition_is_the_same_model():
    cfg = read_config(str(PRETRAIN), ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg).eval()
    inputs = [{"image": torch.rand(3, 128, 128) * 255}]  # without padding, where both agree
    _, ours = model.predict(inputs)
    with baseline_operators():
        _, naive = model.predict(inputs)
    for a, b in zip(ours, naive, strict=True):
        torch.testing.assert_close(a.pred_logits, b.pred_logits, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(a.pred_boxes, b.pred_boxes, rtol=1e-3, atol=1e-3)


def test_plot_draws_the_later_of_two_values(tmp_path, capsys):
    lines = [
        {"iteration": 19, "total_loss": 9.0},
        {"iteration": 39, "total_loss": 8.0, "bbox/AP": 1.0},
        {"iteration": 39, "total_loss": 7.0, "bbox/AP": 2.0},
    ]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)) + "\n")
    curves = plot_metrics.read(tmp_path)
    assert curves == {"bbox/AP": ([40], [2.0]), "total_loss": ([20, 40], [9.0, 7.0])}
    plot_metrics.main([str(tmp_path), "--output", str(tmp_path / "curve.svg")])
    assert (tmp_path / "curve.svg").read_text().startswith("<?xml")
    with pytest.raises(SystemExit) as stop:
        plot_metrics.main([str(tmp_path / "none")])
    assert stop.value.code == 2 and "none does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plot_metrics.main([str(tmp_path), "--output", str(tmp_path / "curve.gif")])
    assert "curve.gif must end in .svg, .png, .pdf" in capsys.readouterr().err


def test_plot_shows_runs_of_one_point(tmp_path, capsys):
    """One point has a marker, as its line is invisible; a missing metric is reported."""
    for name, line in (("a", {"total_loss": 9.0}), ("b", {"total_loss": 8.0, "bbox/AP": 1.0})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps({"iteration": 9, **line}))
    target = tmp_path / "curve.svg"
    plot_metrics.main([str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(target)])
    assert target.read_text().count('<use xlink:href="#m') >= 3 + 8  # points, and ticks of axes
    assert "a has no bbox/AP" in capsys.readouterr().err
