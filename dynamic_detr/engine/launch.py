"""Start the processes of a run: one, several GPUs, several machines, several CPU processes, or
whatever ``torchrun`` has already started.

Detectron2 0.5 launches onto GPUs with NCCL only. Here the CPU has Gloo, and a child that ends with
an exit code hands it on to the command. All meet at a store that the launcher of machine 0 holds,
so that it is there however the processes end.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from detectron2.utils import comm

from .. import compat
from ..errors import UserError, one_line
from .exits import EXIT_INTERRUPTED, EXIT_LOST, EXIT_UNFORESEEN
from .heartbeat import Beat
from .watch import leave, say, watching

_MEETING_TIMEOUT = timedelta(minutes=30)  # until all machines have come
_TIMEOUT = timedelta(days=1)  # of a collective operation: the watch is there before
_GRACE_SECONDS = 60  # for the other processes, once one has ended with an error
_LAUNCHER = "launcher"  # in place of a rank


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
        _run_under_torchrun(main, on_gpu, args)
        return
    world = processes * num_machines
    if world == 1:
        with watching():
            main(*args)
        return
    host, port = _address(dist_url, num_machines)
    store = None
    if machine_rank == 0:  # which outlives all its processes
        try:
            store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False)
        except RuntimeError as error:
            raise UserError(
                f"--dist-url: machine 0 cannot listen at {host}:{port} ({one_line(error)[:100]}); "
                "name an address of this machine with a free port"
            ) from error
        port = store.port
    first = machine_rank * processes
    places = [_Place(first + local, world, local, processes, on_gpu) for local in range(processes)]
    code = _Launcher(places, host, port, store).run(main, args)
    if code and num_machines > 1:
        time.sleep(2)  # the other machines' processes read the cause in the store
    if code:
        sys.exit(code)


@dataclass(frozen=True)
class _Place:
    """Of a process in a run."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    on_gpu: bool


def _address(dist_url: str, num_machines: int) -> tuple[str, int]:
    if dist_url == "auto" and num_machines == 1:
        return "127.0.0.1", 0
    try:
        parts = urlsplit(dist_url)
        if parts.scheme == "tcp" and parts.hostname and parts.port:
            return parts.hostname, parts.port
    except ValueError:  # of a port that is no number
        pass
    raise UserError(
        f"--dist-url is {dist_url!r}; --num-machines needs tcp://HOST:PORT, the same on every "
        "machine, with the address of machine 0"
    )


def _run_under_torchrun(main: Callable[..., None], on_gpu: bool, args: tuple) -> None:
    store, rank, world_size = next(dist.rendezvous("env://", timeout=_MEETING_TIMEOUT))
    local_rank = int(os.environ["LOCAL_RANK"])
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    place = _Place(rank, world_size, local_rank, local_size, on_gpu)
    store = _this_attempt(store, rank, world_size)
    first = rank - local_rank
    _run(main, args, place, store, os.getppid(), range(first, first + local_size))


def _this_attempt(store: dist.Store, rank: int, world_size: int) -> dist.Store:
    """A part of the store that is new, agreed on by all processes.

    When torchrun starts the processes anew it keeps the keys of the attempts before, and machines
    may count the attempts differently.
    """
    mine = uuid.uuid4().hex[:8]
    store.set(f"here/{rank}", mine)
    keys = [f"here/{other}" for other in range(world_size)]
    attempt = seen = ""
    while not seen or store.add(f"seen/{seen}", 0) < world_size:
        if rank == 0 and store.check(keys):
            present = b".".join(store.multi_get(keys)).decode()
            if present != attempt:  # somebody new has replaced an old name
                attempt = present
                store.set("attempt", attempt)
        elif rank and store.check(["attempt"]):
            attempt = store.get("attempt").decode()
        if attempt != seen and mine in attempt.split("."):
            seen = attempt
            store.add(f"seen/{seen}", 1)
        time.sleep(0.05)
    return dist.PrefixStore(seen, store)


def _child(main: Callable[..., None], args: tuple, place: _Place, host: str, port: int) -> None:
    parent = multiprocessing.parent_process().pid
    store = dist.TCPStore(host, port, is_master=False, timeout=_MEETING_TIMEOUT)
    _run(main, args, place, store, parent)


def _run(
    main: Callable[..., None],
    args: tuple,
    place: _Place,
    store: dist.Store,
    parent: int,
    peers: range = range(0),
) -> None:
    """Run ``main`` in one process of several, and end together with the others."""
    of_watch = dist.PrefixStore("watch", store.clone())
    with watching(place.rank, place.world_size, of_watch, parent, peers) as watch:
        end = None
        try:
            _join(place, store)
            main(*args)
        except SystemExit as stop:
            end = stop
            if not getattr(stop, "agreed", not stop.code):  # of a TrainingStopped
                code = stop.code if isinstance(stop.code, int) else EXIT_UNFORESEEN
                watch.fail(code)
                leave(code)
        except KeyboardInterrupt:
            watch.fail(EXIT_INTERRUPTED)
            leave(EXIT_INTERRUPTED)
        except Exception as error:
            watch.settle(error)
            watch.fail(EXIT_UNFORESEEN)
            traceback.print_exc()
            leave(EXIT_UNFORESEEN)
        watch.meet(last=True)
    dist.destroy_process_group()
    if end is not None:
        raise end


def _join(place: _Place, store: dist.Store) -> None:
    """Meet the other processes and tell Detectron2 about them."""
    if place.on_gpu:
        torch.cuda.set_device(place.local_rank)
    dist.init_process_group(
        "nccl" if place.on_gpu else "gloo",
        store=dist.PrefixStore("run", store),
        world_size=place.world_size,
        rank=place.rank,
        timeout=_TIMEOUT,
    )
    compat.set_local_process_group(place.local_size, place.rank // place.local_size)
    comm.synchronize()


class _Launcher:
    """Starts the processes of this machine, hands signals on, and tells how they ended.

    Args:
        places: of the processes.
        host, port: of the run's store.
        store: on machine 0.
    """

    def __init__(self, places: list[_Place], host: str, port: int, store: dist.Store | None):
        self.places = places
        self.address = host, port
        self.store = store
        self.children: dict[BaseProcess, int] = {}
        self.asked: int | None = None  # the last signal
        self.line = ""

    def run(self, main: Callable[..., None], args: tuple) -> int:
        """Start ``main(*args)`` in every process and wait for all; the exit code."""
        handlers = {
            number: signal.signal(number, self._forward)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        }
        context = torch.multiprocessing.get_context("spawn")
        try:
            for place in self.places:
                child = context.Process(target=_child, args=(main, args, place, *self.address))
                child.start()
                self.children[child] = place.rank
            code = self._wait()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.line:
            say(f"{self.line}; {self._saved()}")
        return code

    def _forward(self, number: int, frame) -> None:
        self.asked = number
        for child in self.children:
            if child.is_alive():
                os.kill(child.pid, number)

    def _wait(self) -> int:
        code = 0
        running = {child.sentinel: child for child in self.children}
        while running:
            ended = connection.wait(running, timeout=_GRACE_SECONDS if code else None)
            if not ended:  # one that hangs
                for child in running.values():
                    child.kill()
            for sentinel in ended:
                child = running.pop(sentinel)
                child.join()
                if child.exitcode and not code:
                    code = self._cause(child)
        return code

    def _cause(self, child: BaseProcess) -> int:
        """The exit code of the run, one of whose processes has failed."""
        rank, code = self.children[child], child.exitcode
        if code < 0:
            code = 128 - code if -code == self.asked else EXIT_LOST
        try:
            store = dist.PrefixStore("watch", self._store())
            cause = f"{code} {_LAUNCHER} {rank}"
            found = store.compare_set("cause", "", cause).decode()
            if found != cause:
                self._end_hung(*found.split()[1:])
                return int(found.split()[0]) or EXIT_LOST
            beat = f"beat/{rank}"
            place = Beat.load(store.get(beat)).place if store.check([beat]) else Beat().place
        except RuntimeError:  # machine 0 is gone
            place = "before the run ended"
        if child.exitcode < 0:
            name = signal.Signals(-child.exitcode).name
            hint = " (by the system, if memory ran out)" if name == "SIGKILL" else ""
            host = socket.gethostname()
            self.line = f"process {rank} on {host} was ended by {name}{hint}; last seen {place}"
        return code

    def _end_hung(self, found_by: str, hung: str) -> None:
        for child, rank in self.children.items():
            if str(rank) == hung != found_by:
                child.kill()

    def _store(self) -> dist.Store:
        if self.store is None:
            host, port = self.address
            self.store = dist.TCPStore(host, port, timeout=timedelta(seconds=5))
        return self.store

    def _saved(self) -> str:
        """How the saving by process 0 went, in words."""
        try:
            store = dist.PrefixStore("watch", self._store())
            saved = store.get("saved").decode() if store.check(["saved"]) else ""
        except RuntimeError:
            saved = ""
        return saved or "--resume goes on from the last checkpoint"
