"""How many threads PyTorch uses on a CPU: as many as this process may use cores.

PyTorch counts the machine's cores, also where a container may use a part of them or several
processes share them.

The number is not all that matters. Threads that wait for one another keep their cores busy by
default. Where other programs need these cores (a load of 4 to 6 on two cores), an image of the
quickstart's detector took 2.2 s with two threads, and 0.2 to 0.4 s with one. So commands set
``OMP_WAIT_POLICY=PASSIVE`` before they import torch, which reads it then: waiting threads give
their cores away, and the same image took 0.1 s with two threads. The number therefore does not
depend on the load of the machine, and neither do results. On two idle cores this policy costs time
for small images: the same image took 112 to 140 ms, and 66 to 92 ms by default. There, set
``OMP_WAIT_POLICY=ACTIVE``.
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

    A number from ``OMP_NUM_THREADS`` or ``MKL_NUM_THREADS`` stays as it is, and one from
    ``torch.set_num_threads`` is not raised.

    Args:
        processes: of the run on this machine, which share its cores.

    Returns:
        The number and the reason for it, for the user.
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
    """The cores that this process may use: by its affinity, and by the quota of its control group,
    which may be a fraction."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return min([cores, *_quotas()])


def _quotas() -> Iterator[float]:
    """The quota of this process's control group and of each group above it, in cores."""
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
            # a container sees its own group as the root, whatever the path says
            if folder.is_relative_to(root) and all((folder / name).is_file() for name in files):
                quota, period = " ".join((folder / name).read_text() for name in files).split()
                if quota not in ("max", "-1"):
                    yield int(quota) / int(period)
