"""The kernels compile for GPUs that are not there, and fit into them."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "kernels.md"
SHARED_MEMORY = {
    80: 99 * 1024,
    90: 227 * 1024,
}  # of a block, on the smallest GPU since Ampere; H100


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
    assert len({(said["case"], said["kernel"]) for said in launched}) == kernels
    for said in launched:
        assert said["shared"] <= SHARED_MEMORY[architecture], said
        assert said["stack"] <= 256, said  # bytes that a thread spills: a few do not matter
        assert "128" in said["loads"], said
        half = dtype != "float32"  # whose products are exact, so not on tensor cores
        if said["case"].startswith("deform_conv") and half:
            assert all(("HGMMA" in name) == (architecture == 90) for name in said["products"])
            assert sum(said["products"].values()) > 0
        assert (sum(said["atomics"].values()) > 0) == (said["added"] > 0)
        row = rf"\| {said['case']}: {said['kernel']} +\| {architecture} "
        assert re.search(row, TABLE.read_text())
