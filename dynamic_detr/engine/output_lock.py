"""One training run at a time writes to an OUTPUT_DIR.

Process 0 holds a lock on the file ``OUTPUT_DIR/.running``, which says who it is. The kernel
releases the lock when the process ends, however it ends. Locks of some network file systems reach
no further than one machine, so the holder also gives a sign of life, the file's time, every ten
seconds: a run that gets the lock of a file from another host waits for half a minute, and takes
over only if there was no sign. Where a file system has no locks, the run goes on without.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from detectron2.utils import comm

from ..errors import UserError, tell
from .disk import telling_of
from .sharing import from_main_process

__all__ = ["output_locked"]

logger = logging.getLogger(__name__)

_NAME = ".running"
_SIGN_SECONDS = 10
_PATIENCE_SECONDS = 35  # more than three signs


@contextlib.contextmanager
def output_locked(folder: str) -> Iterator[None]:
    """Within this context no other run writes to the folder; entered by every process.

    Args:
        folder: ``OUTPUT_DIR``, made if it is not there.

    Raises:
        UserError: in every process, if another run holds the lock (it is named), or if the folder
            cannot be written to.
    """
    lock = _Lock(Path(folder) / _NAME)
    from_main_process(lock.acquire)
    try:
        yield
    finally:
        if comm.is_main_process():
            lock.release()


class _Lock:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._released = threading.Event()

    def acquire(self) -> None:
        with telling_of(f"OUTPUT_DIR {self.path.parent}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._open_locked()
            try:
                self._await_other_host()
                self._file.truncate(0)
                self._file.write(json.dumps(_holder()))
                self._file.flush()
            except BaseException:
                self._file.close()
                raise
        # Else the processes that load data would hold the lock too, and longer than this one.
        os.register_at_fork(after_in_child=self._file.close)
        threading.Thread(target=self._give_signs, daemon=True).start()

    def _open_locked(self):
        """The file, with the lock on it."""
        while True:
            file = open(self.path, "a+")  # noqa: SIM115  (held until the run ends)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    file.close()
                    raise self._refusal() from error
                logger.warning(
                    f"The file system of {self.path.parent} has no locks ({error.strerror}): a "
                    "second run there would not be noticed"
                )
                return file
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                    return file
            file.close()  # its holder has just deleted it

    def _await_other_host(self) -> None:
        """Wait for a sign of life of the holder that the file still names."""
        holder = self._read()
        if holder.get("host") in (None, socket.gethostname()):
            return  # it has ended, or the lock would not be ours
        tell(
            f"{self.path} is of process {holder.get('pid')} on {holder['host']}; waiting "
            f"{_PATIENCE_SECONDS} s for a sign of life from there"
        )
        last = self._last_sign()
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(1, _PATIENCE_SECONDS / 10))
            if self._last_sign() != last:
                raise self._refusal()
        logger.warning(f"No sign of life from {holder['host']}: this run takes over")

    def _last_sign(self) -> int:
        with open(self.path) as file:  # opened anew: network file systems then look at the server
            return os.fstat(file.fileno()).st_mtime_ns

    def _read(self) -> dict:
        try:
            holder = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return holder if isinstance(holder, dict) else {}

    def _refusal(self) -> UserError:
        deadline = time.monotonic() + 1
        while not (holder := self._read()) and time.monotonic() < deadline:
            time.sleep(0.05)  # it is about to write who it is
        return UserError(
            f"OUTPUT_DIR {self.path.parent} is in use by process {holder.get('pid', '?')} on "
            f"{holder.get('host', '?')} since {holder.get('since', '?')}; wait for its end, or "
            "name another OUTPUT_DIR"
        )

    def _give_signs(self) -> None:
        while not self._released.wait(_SIGN_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        self._released.set()
        with contextlib.suppress(OSError):
            self.path.unlink()
        self._file.close()


def _holder() -> dict:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
