"""OUTPUT_DIR: it must be writable, and one training run at a time writes to it.

Process 0 locks the file ``OUTPUT_DIR/.running``, which holds its pid and host. The kernel releases
the lock when the process ends, even if it is killed. On some network file systems, locks are local
to one host, so the holder also updates the file's modification time every ten seconds, as a
heartbeat. A run that gets the lock of a file from another host waits for half a minute and
continues only if there was no heartbeat. On file systems that do not support locks, the run
continues without one.
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

from ..engine.sharing import from_main_process
from ..errors import UserError, tell
from ..files.writing import as_user_error

__all__ = ["output_locked", "require_output_dir"]

logger = logging.getLogger(__name__)

_NAME = ".running"
_HEARTBEAT_SECONDS = 10
_TIMEOUT_SECONDS = 35  # longer than three heartbeats


def require_output_dir(folder: str) -> None:
    """Check that a folder can be created, or exists and is writable, without writing anything.

    Args:
        folder: ``OUTPUT_DIR``.

    Raises:
        UserError: it is empty, a file, or not writable.
    """
    if not folder:
        raise UserError("OUTPUT_DIR is ''; set it to a folder for checkpoints, logs and metrics")
    place = Path(folder).absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not os.path.isdir(place):
        raise UserError(
            f"OUTPUT_DIR {folder:.200} cannot be created: {place} is not a folder; choose "
            "another folder"
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(
            f"OUTPUT_DIR {folder:.200} cannot be written to: {place} is read-only for this user; "
            "choose another folder"
        )


@contextlib.contextmanager
def output_locked(folder: str) -> Iterator[None]:
    """Hold the lock of a folder within this context, which every process must enter.

    Args:
        folder: ``OUTPUT_DIR``; created if it does not exist.

    Raises:
        UserError: in every process, if another run holds the lock or the folder cannot be written
            to.
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
        with as_user_error(f"OUTPUT_DIR {self.path.parent}"):
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
        # Otherwise data workers would inherit the lock and might hold it longer than this process.
        os.register_at_fork(after_in_child=self._file.close)
        threading.Thread(target=self._send_heartbeats, daemon=True).start()

    def _open_locked(self):
        """Open the file and lock it."""
        while True:
            file = open(self.path, "a+")  # noqa: SIM115  (held until the run ends)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    file.close()
                    raise self._refusal() from error
                logger.warning(
                    f"The file system of {self.path.parent} does not support locks "
                    f"({error.strerror}): a second run in this folder would not be detected"
                )
                return file
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                    return file
            file.close()  # the previous holder has just deleted it

    def _await_other_host(self) -> None:
        """If the file names a holder on another host, wait for a heartbeat from it."""
        holder = self._read()
        if holder.get("host") in (None, socket.gethostname()):
            return  # a holder on this host has ended, because this process got the lock
        tell(
            f"{self.path} belongs to process {holder.get('pid')} on {holder['host']}; waiting "
            f"{_TIMEOUT_SECONDS} s for a heartbeat from there"
        )
        last = self._last_heartbeat()
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(1, _TIMEOUT_SECONDS / 10))
            if self._last_heartbeat() != last:
                raise self._refusal()
        logger.warning(f"No heartbeat from {holder['host']}: this run takes over the lock")

    def _last_heartbeat(self) -> int:
        with open(self.path) as file:  # NFS gets the attributes from the server on open
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
            time.sleep(0.05)  # the holder has the lock but has not written its pid yet
        return UserError(
            f"OUTPUT_DIR {self.path.parent} is in use by process {holder.get('pid', '?')} on "
            f"{holder.get('host', '?')} since {holder.get('since', '?')}; wait until it ends, or "
            "choose another OUTPUT_DIR"
        )

    def _send_heartbeats(self) -> None:
        while not self._released.wait(_HEARTBEAT_SECONDS):
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
