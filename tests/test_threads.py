"""Number of CPU threads: the cores that a process may use, divided by the number of processes."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from dynamic_detr.runtime import threads


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Simulate a machine of 16 cores with its control groups in a folder."""
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(threads, "_GROUPS", tmp_path)
    monkeypatch.setattr(threads, "_MEMBERSHIP", tmp_path / "membership")
    torch.set_num_threads(16)
    yield tmp_path
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "250000 100000"}, 2.5),
        ("0::/elsewhere", {"cpu.max": "400000 100000"}, 4),
        (
            "5:memory:/a\n4:cpu,cpuacct:/a",
            {"cpu/a/cpu.cfs_quota_us": "150000", "cpu/a/cpu.cfs_period_us": "50000"},
            3,
        ),
        (
            "4:cpu,cpuacct:/",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            16,
        ),
        ("0::/../../outside", {}, 16),
    ],
)
def test_quota_of_the_control_group_counts(machine, membership, files, cores):
    (machine / "membership").write_text(membership + "\n")
    for name, text in files.items():
        (machine / name).parent.mkdir(parents=True, exist_ok=True)
        (machine / name).write_text(text + "\n")
    assert threads.available_cores() == cores
    assert threads.choose_threads() == f"threads: {int(cores)} (cores: {cores:g})"
    assert torch.get_num_threads() == int(cores)


def test_processes_share_the_cores(machine):
    assert threads.choose_threads(3) == "threads: 5 (cores: 16, shared by 3 processes)"
    assert torch.get_num_threads() == 5
    threads.choose_threads(40)
    assert torch.get_num_threads() == 1


def test_a_number_that_the_user_chose_stays(machine, monkeypatch):
    torch.set_num_threads(2)
    threads.choose_threads()
    assert torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    torch.set_num_threads(7)
    assert threads.choose_threads(4) == "threads: 7 (OMP_NUM_THREADS)"
    assert torch.get_num_threads() == 7


@pytest.mark.parametrize(
    "command",
    [
        "train_net.py",
        "demo/demo.py",
        "tools/benchmark.py",
        "tools/compare.py",
        "tools/quickstart.py",
        "tools/replay_step.py",
    ],
)
def test_waiting_threads_of_commands_leave_their_cores(command):
    """Programs set the policy before they import torch."""
    lines = (ROOT / command).read_text().splitlines()
    policy = next(n for n, line in enumerate(lines) if '"OMP_WAIT_POLICY", "PASSIVE"' in line)
    before = "\n".join(lines[:policy])
    code = f"{before}\nimport sys\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
