"""Start the processes of a run, on one or several machines, with GPUs or on the CPU.

Detectron2's ``launch`` supports GPUs with NCCL only. This one also supports the CPU with Gloo and
processes that ``torchrun`` has started, and it returns the exit code of a child. All processes meet
at a store in the launcher of machine 0, which exists until the last of them has ended.
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
from ..engine.heartbeat import Beat
from ..engine.stopping import EXIT_INTERRUPTED, EXIT_LOST, EXIT_UNFORESEEN
from ..engine.watch import SAVE_SECONDS, leave, print_line, watching
from ..errors import UserError, one_line

_MEETING_TIMEOUT = timedelta(minutes=30)  # for all machines to connect
_TIMEOUT = timedelta(days=1)  # of a collective operation; the watch finds a hang much earlier
_GRACE_SECONDS = SAVE_SECONDS + 60  # for the other processes to end after one has failed
_LAUNCHER = "launcher"  # in place of a rank


def under_torchrun() -> bool:
    """Return whether a launcher such as ``torchrun`` has started this process."""
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
        main: function that can be imported by name, because child processes are spawned.
        processes: number of processes on this machine; ignored under ``torchrun``.
        on_gpu: one GPU per process and NCCL; otherwise the CPU and Gloo.
        num_machines: number of machines, which all run this command with the same ``dist_url``.
        machine_rank: rank of this machine, from 0.
        dist_url: address of machine 0, ``tcp://host:port``; "auto" picks a free port if there is
            one machine.
        args: picklable arguments of ``main``.

    Raises:
        UserError: ``dist_url`` is "auto" with several machines, or machine 0 cannot use it.
        SystemExit: a child ended with an exit code other than 0; it has the same code.
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
    if machine_rank == 0:  # the launcher outlives all its processes
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
        time.sleep(2)  # processes of other machines read the cause from the store
    if code:
        sys.exit(code)


@dataclass(frozen=True)
class _Place:
    """Position of a process in a run."""

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
    except ValueError:  # the port is not a number
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
    """Agree with all processes on a new prefix of the store.

    After a restart, torchrun's store still holds the keys of earlier attempts, and machines may
    count the attempts differently.
    """
    mine = uuid.uuid4().hex[:8]
    store.set(f"here/{rank}", mine)
    keys = [f"here/{other}" for other in range(world_size)]
    attempt = seen = ""
    while not seen or store.add(f"seen/{seen}", 0) < world_size:
        if rank == 0 and store.check(keys):
            present = b".".join(store.multi_get(keys)).decode()
            if present != attempt:  # a restarted process has replaced its name
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
    """Run ``main`` in one of several processes and end together with the others."""
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
    """Create the process group and Detectron2's group of this machine."""
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
    """Start the processes of this machine, forward signals, and report how they ended.

    Args:
        places: position of each process.
        host, port: address of the run's store.
        store: the store on machine 0; None on other machines.
    """

    def __init__(self, places: list[_Place], host: str, port: int, store: dist.Store | None):
        self.places = places
        self.address = host, port
        self.store = store
        self.children: dict[BaseProcess, int] = {}
        self.asked: int | None = None  # the last signal
        self.line = ""

    def run(self, main: Callable[..., None], args: tuple) -> int:
        """Run ``main(*args)`` in every process; return the exit code of the run."""
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
            print_line(f"{self.line}; {self._saved()}")
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
            if not ended:  # the others hang
                for child in running.values():
                    child.kill()
            for sentinel in ended:
                child = running.pop(sentinel)
                child.join()
                if child.exitcode and not code:
                    code = self._cause(child)
        return code

    def _cause(self, child: BaseProcess) -> int:
        """Return the exit code of the run after a process has failed."""
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
        """Return how saving in process 0 went, in words."""
        try:
            store = dist.PrefixStore("watch", self._store())
            saved = store.get("saved").decode() if store.check(["saved"]) else ""
        except RuntimeError:
            saved = ""
        return saved or "--resume continues from the last checkpoint"
