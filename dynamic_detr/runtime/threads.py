"""Number of PyTorch's CPU threads: the number of cores that this process may use.

PyTorch's default is the number of cores of the machine, even if a container may use only some of
them or several processes share them.

Waiting threads also matter. By default they keep their cores busy. With other programs on the same
cores (a load of 4 to 6 on two cores), an image of the quickstart's detector took 2.2 s with two
threads and 0.2 to 0.4 s with one. The programs therefore set ``OMP_WAIT_POLICY=PASSIVE`` before
they import torch: waiting threads yield their cores, and the same image took 0.1 s with two
threads. So the number of threads, on which results depend, need not depend on the load. On two idle
cores the policy costs time for small images: 112 to 140 ms instead of 66 to 92 ms for the same
image. There, set ``OMP_WAIT_POLICY=ACTIVE``.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

__all__ = ["available_cores", "choose_threads"]

_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_GROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def choose_threads(processes: int = 1) -> str:
    """Set the number of PyTorch's threads, unless the user has chosen it.

    ``OMP_NUM_THREADS`` and ``MKL_NUM_THREADS`` take precedence, and the present number of threads
    is an upper bound.

    Args:
        processes: number of processes of the run that share this machine.

    Returns:
        A line with the number and its reason.
    """
    chosen = next((name for name in _VARIABLES if os.environ.get(name)), None)
    if chosen:
        return f"threads: {torch.get_num_threads()} ({chosen})"
    cores = available_cores()
    shared = min(torch.get_num_threads(), cores) / processes
    torch.set_num_threads(max(1, int(shared)))
    shared_by = f", shared by {processes} processes" if processes > 1 else ""
    return f"threads: {torch.get_num_threads()} (cores: {cores:g}{shared_by})"


def available_cores() -> float:
    """Return the number of cores that affinity and control-group quota allow; may be a fraction."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return min([cores, *_quotas()])


def _quotas() -> Iterator[float]:
    """Yield the quota of this process's control group and of each group above it, in cores."""
    if not _MEMBERSHIP.is_file():
        return
    for line in _MEMBERSHIP.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            root, files = _GROUPS, ("cpu.max",)
        elif "cpu" in controllers.split(","):
            root, files = _GROUPS / "cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            # inside a container its own group is the root, so the path may not exist
            if folder.is_relative_to(root) and all((folder / name).is_file() for name in files):
                quota, period = " ".join((folder / name).read_text() for name in files).split()
                if quota not in ("max", "-1"):
                    yield int(quota) / int(period)
