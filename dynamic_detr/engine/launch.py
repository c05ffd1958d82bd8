"""Start the processes of a run: one, several GPUs, several machines, several CPU processes, or
whatever ``torchrun`` has already started.

Detectron2 0.5 launches onto GPUs with NCCL only. Here the CPU has Gloo, and a child that ends with
an exit code hands it on to the command.
"""

import os
import signal
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection

import torch
import torch.distributed as dist
from detectron2.utils import comm

from .. import compat
from ..errors import UserError

_TIMEOUT = timedelta(minutes=30)
_GRACE_SECONDS = 30  # for the other processes, once one has ended with an error


def under_torchrun() -> bool:
    """Whether a launcher such as ``torchrun`` has started this process as one of several."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))


def launch(
    main: Callable[..., None],
    processes: int,
    on_gpu: bool,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: tuple = (),
) -> None:
    """Run ``main(*args)`` in every process of the run.

    Args:
        main: importable by name, as the children are spawned.
        processes: how many on this machine; ``torchrun`` decides in its own case.
        on_gpu: one GPU for each process and NCCL between them, else the CPU and Gloo.
        num_machines: all of which run this command with the same ``dist_url``.
        machine_rank: from 0.
        dist_url: where they meet, ``tcp://host:port``; "auto" picks a free port on one machine.
        args: for ``main``, picklable.

    Raises:
        UserError: several machines with ``dist_url`` "auto".
        SystemExit: a child ended with an exit code other than 0, which is handed on.
    """
    if under_torchrun():
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        _join(
            int(os.environ["LOCAL_RANK"]),
            int(os.environ["RANK"]),
            int(os.environ["WORLD_SIZE"]),
            local_size,
            on_gpu,
            "env://",
        )
        _run_and_leave(main, args)
        return
    world = processes * num_machines
    if world == 1:
        main(*args)
        return
    if dist_url == "auto":
        if num_machines > 1:
            raise UserError(
                "--num-machines needs --dist-url tcp://HOST:PORT, the same on every machine, with "
                "the address of machine 0"
            )
        dist_url = f"tcp://127.0.0.1:{_free_port()}"
    context = torch.multiprocessing.get_context("spawn")
    children = []
    for local_rank in range(processes):
        rank = machine_rank * processes + local_rank
        settings = (local_rank, rank, world, processes, on_gpu, dist_url)
        child = context.Process(target=_child, args=(main, args, settings))
        child.start()
        children.append(child)
    code = _wait(children)
    if code:
        sys.exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _child(main: Callable[..., None], args: tuple, settings: tuple) -> None:
    _join(*settings)
    _run_and_leave(main, args)


def _join(
    local_rank: int, rank: int, world: int, local_size: int, on_gpu: bool, dist_url: str
) -> None:
    """Meet the other processes and tell Detectron2 about them."""
    if on_gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=dist_url,
        world_size=world,
        rank=rank,
        timeout=_TIMEOUT,
    )
    compat.set_local_process_group(local_size, rank // local_size)
    comm.synchronize()


def _run_and_leave(main: Callable[..., None], args: tuple) -> None:
    try:
        main(*args)
    finally:
        dist.destroy_process_group()


def _wait(children: list) -> int:
    """Wait for all children, pass signals on to them; the exit code of the first that failed."""

    def forward(number: int, frame) -> None:
        for child in children:
            if child.is_alive():
                os.kill(child.pid, number)

    # A terminal sends Ctrl-C to the children itself.
    handlers = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, forward),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
    }
    code = 0
    try:
        running = {child.sentinel: child for child in children}
        while running:
            ended = connection.wait(running, timeout=_GRACE_SECONDS if code else None)
            if not ended:  # the others wait for the one that failed
                for child in running.values():
                    child.kill()
            for sentinel in ended:
                child = running.pop(sentinel)
                child.join()
                code = code or child.exitcode
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code
