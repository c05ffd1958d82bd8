"""`gpu_check.py` and the comparison with other packages, without a GPU."""

import sys
from pathlib import Path

import benchmark
import gpu_check
import pytest
import torch
from benchmarks.peers import measure_peers

# A stand-in with the layouts that deformops 3.0.1 documents; its attention fails.
DEFORMOPS = """
import torch, torchvision

def conv(value, offset, weight, /, bias=None, mask=None, stride=1, padding=0):
    batch, height, width, groups, taps, two = offset.shape
    assert value.is_contiguous() and offset.is_contiguous() and mask.shape == offset.shape[:-1]
    maps = [t.flatten(3).permute(0, 3, 1, 2) for t in (value, offset, mask)]
    x, offset, mask = (t.contiguous() for t in maps)
    out = torchvision.ops.deform_conv2d(x, offset, weight, bias, stride, padding, mask=mask)
    return out.permute(0, 2, 3, 1)

def msda(value, spatial_shapes, level_start_index, locations, weights, /):
    assert level_start_index.tolist() == [0, *spatial_shapes.prod(1).cumsum(0).tolist()[:-1]]
    raise RuntimeError("no backend")
"""


@pytest.mark.parametrize("rehearse", [False, True])
def test_steps_are_commands_that_exist(rehearse, tmp_path):
    for step in gpu_check.steps(rehearse, tmp_path):
        if step.name == "tests":
            assert all(Path(name).is_file() for name in step.command if name.endswith(".py"))
        else:
            args = benchmark.parse(step.command[1:])
            assert step.name == f"{args.what}_{args.dtype}" and args.json.parent == tmp_path


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_error_without_a_gpu(capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_check.main([])
    assert stop.value.code == 2 and "--rehearse" in capsys.readouterr().err


def test_check_continues_after_failed_and_slow_steps(tmp_path, monkeypatch):
    commands = {
        "good": "print('fine')",
        "bad": "raise SystemExit(3)",
        "slow": "import time; time.sleep(60)",
        "last": "print('done')",
    }
    found = [gpu_check.Step(name, ["-c", code], 0.5) for name, code in commands.items()]
    found[2].share = 0.0
    monkeypatch.setattr(gpu_check, "steps", lambda *_: found)
    output = tmp_path / "gpu_check"
    assert gpu_check.main(["--rehearse", "--output", str(output)]) == 1
    summary = (output / "summary.md").read_text()
    for name, result in zip(
        commands, ("passed", "failed with exit code 3", "stopped", "passed"), strict=True
    ):
        assert f"| {name} " in summary and result in summary.partition(f"| {name} ")[2][:40]
    assert (output / "last.txt").read_text() == "done\n"
    found[1:3] = []
    assert gpu_check.main(["--rehearse", "--output", str(output)]) == 0


def test_other_packages_get_the_same_tensors(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    (tmp_path / "deformops").mkdir()
    (tmp_path / "deformops" / "__init__.py").touch()
    (tmp_path / "deformops" / "registry.py").write_text(DEFORMOPS)
    monkeypatch.syspath_prepend(str(tmp_path))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args = benchmark.parse(["peers", "--size", "64x64", "--repeats", "1"])
    rows = measure_peers(args, device)
    assert len(rows) == 12  # two operators, two passes, ours and two packages
    failed = [row for row in rows if "error" in row]
    assert len(failed) == 2 and all("no backend" in row["error"] for row in failed)
    for row in rows:
        if row["package"] != "ours" and row not in failed:
            assert row["difference"] < 1e-4 and row["ours_to_theirs"] > 0
    assert benchmark.peers_table(rows).count("deformops") == 4
    for name in ("deformops", "deformops.registry"):
        sys.modules.pop(name)
