"""Runs of ``train_net.py`` with injected faults.

``python tests/faults.py`` imports everything once and then serves requests, one JSON object per
line. For each it forks; the child runs ``train_net.py`` with several processes, also by fork. A
request has "arguments"; "faults", keyword arguments of `force`; and "stdout" and "stderr", paths of
files. The answers are {"pid"} at the start and {"code"} at the end.
"""

import ctypes
import errno
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback

import torch
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm

from dynamic_detr.cli import launch, train_net
from dynamic_detr.data.mapper import SeededDataset
from dynamic_detr.engine.checkpoint import SafeCheckpointer
from dynamic_detr.engine.evaluation import BoxEvaluator
from dynamic_detr.engine.step import TrainStep
from dynamic_detr.errors import UserError


def _raise(error: Exception):
    def fail() -> None:
        raise error

    return fail


def _signal(number: int, to_all: bool = False):
    return lambda: os.killpg(0, number) if to_all else os.kill(os.getpid(), number)


def _hold_the_lock() -> None:
    """Sleep in C code while holding the GIL, so that no thread of this process can run."""
    ctypes.PyDLL(None).sleep(600)


KINDS = {
    "bad image": _raise(UserError("the image 3.png cannot be read")),
    "bug": _raise(ValueError("a bug")),
    "out of memory": _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")),
    "full disk": _raise(OSError(errno.ENOSPC, "No space left on device")),
    "hang": lambda: time.sleep(600),
    "frozen": _hold_the_lock,
    "SIGSTOP": _signal(signal.SIGSTOP),
    "SIGKILL": _signal(signal.SIGKILL),
    "SIGSEGV": _signal(signal.SIGSEGV),
    "SIGTERM": _signal(signal.SIGTERM),
    "SIGUSR1": _signal(signal.SIGUSR1),
    "SIGINT": _signal(signal.SIGINT),
    "SIGTERM to all": _signal(signal.SIGTERM, to_all=True),
}
SITES = {  # methods in which a fault can occur
    "data": (SeededDataset, "__getitem__"),
    "forward": (TrainStep, "_forward"),
    "backward": (TrainStep, "_backward"),
    "reduce": (TrainStep, "_reduce"),
    "save": (torch, "save"),
    "image": (BoxEvaluator, "process"),
    "scoring": (COCOEvaluator, "evaluate"),
    "start": (SafeCheckpointer, "load_for_all"),
}


def force(rank: int, site: str, at: int, kind: str) -> None:
    """Inject a fault.

    Args:
        rank: rank of the process.
        site: key of `SITES`.
        at: index of the call that fails.
        kind: key of `KINDS`.
    """
    owner, name = SITES[site]
    original = getattr(owner, name)
    calls = 0

    def method(self, *args, **options):
        nonlocal calls
        if comm.get_rank() == rank:
            calls += 1
            if calls == at + 1:
                KINDS[kind]()
        return original(self, *args, **options)

    setattr(owner, name, method)


_child = launch._child


def _forked_child(*args) -> None:
    """Run a child without the signal handlers of the launcher, as if it were spawned."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _child(*args)


def _run(request: dict) -> None:
    for name, stream in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.setpgid(0, 0)
    for fault in request["faults"]:
        force(**fault)
    fork = multiprocessing.get_context("fork")
    launch.torch.multiprocessing.get_context = lambda _: fork
    launch._child = _forked_child
    sys.argv = ["train_net.py", *request["arguments"]]
    code = 0
    try:
        train_net.main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        code = 1
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _run(json.loads(line))
        print(json.dumps({"pid": pid}), flush=True)
        status = os.waitpid(pid, 0)[1]
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    serve()
