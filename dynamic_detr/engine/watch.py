"""Processes of a run watch each other, so that all end together with one message.

In each process a thread reads and writes keys of the run's store twice a second:

| key | value |
| --- | --- |
| ``cause`` | exit code of the run, rank that ended it, and rank that caused the end; written once |
| ``saved`` | how saving in process 0 went, in words |
| ``beat/R`` | progress of process R (``heartbeat.py``) |
| ``meeting/N`` | number of processes that have reached the N-th meeting |

A process that fails, or the first one to find that another process is gone or hangs, writes the
cause, waits for process 0 to save, and prints the message. All others exit silently with the same
code. Process 0 saves in this thread, because its main thread may be blocked in a collective
operation with a process that is gone. The watch itself uses no collective operations.
"""

import contextlib
import logging
import math
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from .heartbeat import Beat, Observer
from .stopping import EXIT_LOST

__all__ = ["Watch", "current_watch", "leave", "print_line", "watching"]

HANG_SECONDS = 1800.0  # before the configuration is loaded
_TICK_SECONDS = 0.5
_SUSPENDED_SECONDS = 10  # between two ticks
_TIMEOUT_SECONDS = 10  # for a cause to arrive, and for the main thread of process 0
SAVE_SECONDS = 300  # for process 0 to save


def print_line(line: str) -> None:
    """Print a line to stderr, with the name of the program."""
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)


def leave(code: int) -> None:
    """Flush the output and end this process at once.

    A normal exit would wait for threads of Gloo or NCCL, which wait for processes that are gone.
    """
    timer = threading.Timer(_TIMEOUT_SECONDS, os._exit, [code])  # if flushing blocks
    timer.daemon = True
    timer.start()
    for child in multiprocessing.active_children():  # data workers
        child.kill()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _lost_connection(error: BaseException) -> bool:
    """Return whether an error of a collective operation says that another process is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


class Watch:
    """Watch of one process over the other processes of its run.

    Args:
        rank: rank of this process.
        world_size: number of processes.
        store: store of the run; None for a run of one process.
        parent: pid of the launcher; this process ends when the launcher does.
        peers: ranks on this machine that no launcher of this project watches.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        store: dist.Store | None = None,
        parent: int | None = None,
        peers: Iterable[int] = (),
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.hang_seconds = HANG_SECONDS
        self.ended = False  # whether the run has ended, in this or another process
        self._store = store
        self._parent = parent
        self._peers = dict.fromkeys(set(peers) - {rank})  # pid by rank, once known
        self._beat = Beat(socket.gethostname(), os.getpid())  # changed by the main thread only
        self._tick = 0
        self._observer, self._looked = Observer(), math.inf
        self._meetings = 0
        self._last_meeting = False
        self._whole = threading.Lock()  # its holder may change the state, or save it
        self._save: Callable[[], str] | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    # Called by the main thread

    def progress(self, place: str, order: float | None = None) -> None:
        """Record what this process begins to do.

        Args:
            place: in words, to complete "last seen ...".
            order: see :class:`Beat`; None keeps the last one.
        """
        order = self._beat.order if order is None else order
        steps = self._beat.steps + 1
        self._beat = replace(self._beat, steps=steps, order=order, place=place, waiting=False)

    @contextlib.contextmanager
    def saving_with(self, save: Callable[[], str]) -> Iterator[None]:
        """Save in process 0 if the run ends early within this context.

        Args:
            save: saves without collective operations, and returns how it went, in words.
        """
        self._save = save
        self._whole.acquire()
        try:
            yield
        finally:
            self._save = None
            self._whole.release()

    @contextlib.contextmanager
    def state_is_whole(self) -> Iterator[None]:
        """Allow the watch to save: within this context the main thread changes no saved state."""
        if self._save is None:
            yield
            return
        self._whole.release()
        try:
            yield
        finally:
            self._whole.acquire()

    def meet(self, poll: Callable[[], None] = lambda: None, last: bool = False) -> None:
        """Wait until every process has called this.

        Args:
            poll: called repeatedly while waiting; may raise.
            last: whether this process ends afterwards.
        """
        poll()
        if self._store is None:
            return
        self._last_meeting = last
        self._meetings += 1
        key = f"meeting/{self._meetings}"
        self._store.add(key, 1)
        self._beat = replace(self._beat, waiting=True)
        while self._store.add(key, 0) < self.world_size:
            poll()
            time.sleep(0.05)
        self.progress(self._beat.place)

    def fail(self, code: int, save: bool = True) -> str:
        """End the run because this process failed. The caller prints the message and exits.

        If another process has ended the run already, this does not return: the process exits with
        the code of the other one.

        Args:
            code: exit code of all processes.
            save: whether to save the state.

        Returns:
            How saving in process 0 went, in words; "" if there is nothing to save.
        """
        if not self._publish(code, self.rank):
            self._give_way()
        if self.rank:
            return self._answer()
        return self._save() if save and self._save else ""

    def settle(self, error: BaseException) -> None:
        """If an error was caused by the loss of another process, wait for that to be reported.

        Args:
            error: error of the main thread.
        """
        if self._store is not None and _lost_connection(error):
            self._give_way(_TIMEOUT_SECONDS)

    def _give_way(self, seconds: float | None = None) -> None:
        with self.state_is_whole():
            threading.Event().wait(seconds)

    # Called by the thread of the watch

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(_TICK_SECONDS):
            try:
                self._look()
            except RuntimeError:  # of the store
                self._end_orphaned()

    def _look(self) -> None:
        if self._parent is not None and os.getppid() != self._parent:
            self._end_orphaned()
        self._tick += 1
        if self._store is not None:
            self._store.set(f"beat/{self.rank}", self._own_beat().dump())
            if self._store.check(["cause"]):
                code, rank, _ = self._store.get("cause").decode().split()
                if rank != str(self.rank):
                    self._obey(int(code))
        if self.ended or self._last_meeting:
            return
        for rank in self._gone():
            self._report(rank, "has ended without a word")
        now = time.monotonic()
        if now - self._looked > _SUSPENDED_SECONDS:  # the run may have been suspended
            self._observer = Observer()
        self._looked = now
        if self.hang_seconds and self.rank < 2:
            found = self._observer.problem(self._beats(), self.hang_seconds, now)
            if found is not None:
                self._report(*found)

    def _own_beat(self) -> Beat:
        return replace(self._beat, tick=self._tick)

    def _beats(self) -> dict[int, Beat | None]:
        """Return the beats to observe: process 0 observes all, process 1 the watch of process 0."""
        if self.rank == 1:
            beat = self._beat_of(0)
            return {0: beat and replace(beat, waiting=True)}
        others = {rank: self._beat_of(rank) for rank in range(1, self.world_size)}
        return {0: self._own_beat(), **others}

    def _beat_of(self, rank: int) -> Beat | None:
        key = f"beat/{rank}"
        return Beat.load(self._store.get(key)) if self._store.check([key]) else None

    def _gone(self) -> Iterator[int]:
        """Yield the ranks on this machine whose process has ended."""
        for rank, pid in self._peers.items():
            if pid is None:
                beat = self._beat_of(rank)
                self._peers[rank] = beat and beat.pid
                continue
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                yield rank
            except PermissionError:
                pass

    def _publish(self, code: int, rank: int) -> bool:
        """Write that process ``rank`` ends the run; return whether no cause was written before."""
        if self._store is None:
            return not self.ended
        cause = f"{code} {self.rank} {rank}"
        try:
            return self._store.compare_set("cause", "", cause) == cause.encode()
        except RuntimeError:  # the store is gone; the thread of the watch reports it
            return False

    def _answer(self) -> str:
        """Wait for process 0 to save; return how it went, in words."""
        try:
            self._store.wait(["saved"], timedelta(seconds=SAVE_SECONDS))
            return self._store.get("saved").decode()
        except RuntimeError:
            return ""

    def _save_from_outside(self) -> str:
        save = self._save
        if self.rank or save is None:
            return ""
        if not self._whole.acquire(timeout=_TIMEOUT_SECONDS):
            return "nothing was saved, --resume continues from the last checkpoint"
        return save()  # keeps the lock: the state must not change any more

    def _obey(self, code: int) -> None:
        self.ended = True
        if self.rank == 0:
            self._store.set("saved", self._save_from_outside())
        leave(code)

    def _report(self, rank: int, found: str) -> None:
        if not self._publish(EXIT_LOST, rank):
            return
        self.ended = True
        beat = self._beat if rank == self.rank else self._beat_of(rank) or Beat()
        if self.rank == 0:
            saved = self._save_from_outside()
        else:
            saved = self._answer() if rank else ""
        self._end(f"process {rank} on {beat.host} {found}; last seen {beat.place}", saved)

    def _end_orphaned(self) -> None:
        """End this process because the launcher, which holds the store, is gone."""
        self.ended = True
        saved = self._save_from_outside()
        if self.rank == 0:
            self._end("the launcher of this run is gone", saved)
        leave(EXIT_LOST)

    def _end(self, what: str, saved: str) -> None:
        saved = saved or "--resume continues from the last checkpoint"
        with contextlib.suppress(OSError, ValueError):
            print_line(f"{what}; {saved}")
        leave(EXIT_LOST)


_current = Watch()


def current_watch() -> Watch:
    """Return the watch of this process; it does nothing if none was started."""
    return _current


@contextlib.contextmanager
def watching(*args, **options) -> Iterator[Watch]:
    """Start a :class:`Watch` with these arguments; it is the current one within this context."""
    global _current
    previous, _current = _current, Watch(*args, **options)
    _current.start()
    try:
        yield _current
    finally:
        _current.stop()
        _current = previous
