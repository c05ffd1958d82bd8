"""The kernels compile for GPUs without one, and fit into their registers and shared memory."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import compile_table
import pytest
from conftest import ROOT

TABLE = ROOT / "docs" / "kernels.md"
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024}  # per block: smallest GPU since Ampere, H100


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("architecture", "dtype", "cases", "kernels"),
    [
        (90, "bfloat16", ["deform_conv", "fuse_levels", "roi_align", "ms_deform_attn"], 13),
        (80, "float32", ["deform_conv", "fuse_levels", "roi_align"], 11),
        (80, "float16", ["deform_conv, 32 groups"], 3),
    ],
)
def test_kernels_fit_the_gpu(architecture, dtype, cases, kernels, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    options = ["--architecture", str(architecture), "--dtype", dtype, "--json"]
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "compile_table.py", *options, *cases],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    launched = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({(kernel["case"], kernel["kernel"]) for kernel in launched}) == kernels
    for kernel in launched:
        assert kernel["shared"] <= SHARED_MEMORY[architecture], kernel
        assert kernel["stack"] <= 256, kernel  # bytes spilled per thread
        assert "128" in kernel["loads"], kernel
        half = dtype != "float32"  # float32 products do not use tensor cores
        if kernel["case"].startswith("deform_conv") and half:
            assert all(("HGMMA" in name) == (architecture == 90) for name in kernel["products"])
            assert sum(kernel["products"].values()) > 0
        assert (sum(kernel["atomics"].values()) > 0) == (kernel["added"] > 0)
        row = rf"\| {kernel['case']}: {kernel['kernel']} +\| {architecture} "
        assert re.search(row, TABLE.read_text())


def test_absent_folder_is_refused_before_compiling(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        compile_table.main(["--output", str(tmp_path / "absent" / "kernels.md")])
    assert stop.value.code == 2
    assert f"the folder {tmp_path / 'absent'} does not exist" in capsys.readouterr().err
