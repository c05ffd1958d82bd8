"""Runs of a comparison, one for each detector and seed.

Each is a process of `train_net.py --resume`: a stopped run can continue, and a failed run does not
affect the others.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dynamic_detr.errors import UserError, tell
from dynamic_detr.files.model_file import ModelInfo, read_header

__all__ = ["Run", "train_all"]

TRAIN_NET = Path(__file__).resolve().parents[2] / "train_net.py"
POLL_SECONDS = 1.0
GRACE_SECONDS = 120  # time to save after a signal
_TAIL = 10_000  # bytes at the end of metrics.json that contain a line
_ITERATION = re.compile(rb'"iteration": (\d+)')
_MEMORY = re.compile(r"max_mem: (\d+)M")


@dataclass(frozen=True)
class Run:
    """One detector, trained with one seed.

    Args:
        name: name of the detector.
        seed: seed of the run.
        folder: `OUTPUT_DIR` of the run.
        config: composed configuration.
        iterations: length of the run.
    """

    name: str
    seed: int
    folder: Path
    config: Path
    iterations: int

    @property
    def title(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def model(self) -> Path:
        return self.folder / "model_final.safetensors"

    def final(self) -> ModelInfo | None:
        """Return the header of the final model; None if the run is not finished."""
        try:
            info = read_header(str(self.model)) if self.model.is_file() else None
        except UserError:
            return None
        return info if info and info.iteration >= self.iterations else None

    def log(self) -> dict:
        """Return "code", "error" and "peak_mb" of the last process; empty if there was none."""
        path = self.folder / "comparison.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def iterations_done(self) -> int:
        """Return the iterations that the end of `metrics.json`, which may be long, shows."""
        path = self.folder / "metrics.json"
        if not path.is_file():
            return 0
        with open(path, "rb") as file:
            file.seek(max(path.stat().st_size - _TAIL, 0))
            found = _ITERATION.findall(file.read())
        return int(found[-1]) + 1 if found else 0

    def status(self) -> str:
        """Return "finished", or one line that says why the run is not."""
        if self.final():
            return "finished"
        log, done = self.log(), self.iterations_done()
        if log.get("code"):
            return log["error"]
        return f"stopped after {done} of {self.iterations} iterations" if done else "not started"


def train_all(runs: Sequence[Run], flags: Sequence[str], budget_minutes: float | None) -> None:
    """Train the unfinished runs; print the result of each and the remaining time.

    Args:
        runs: runs in the order of training.
        flags: flags of `train_net.py`, beside configuration and seed.
        budget_minutes: time after which the current run is stopped and saved, and no other starts.
    """
    start = time.monotonic()
    deadline = start + 60 * budget_minutes if budget_minutes is not None else None
    todo = [run for run in runs if not run.final()]
    trained = 0
    for number, run in enumerate(todo, start=1):
        if deadline and time.monotonic() > deadline:
            tell(f"the {budget_minutes:g} minutes are over; repeat the command to continue")
            return
        done = run.iterations_done()
        began = time.monotonic()
        _train(run, flags, deadline, f"[{number}/{len(todo)}] {run.title}")
        trained += run.iterations_done() - done
        minutes = (time.monotonic() - began) / 60
        info = run.final()
        result = f"AP {info.metrics.get('AP', float('nan')):.1f}" if info else run.status()
        left = sum(r.iterations - r.iterations_done() for r in todo[number:])
        rate = (time.monotonic() - start) / max(trained, 1)
        rest = f"; about {left * rate / 60:.0f} min left" if left and trained else ""
        tell(f"[{number}/{len(todo)}] {run.title}: {result} in {minutes:.1f} min{rest}")


def _train(run: Run, flags: Sequence[str], deadline: float | None, title: str) -> None:
    """Run `train_net.py` until it ends or the deadline has passed; write the log of its end."""
    run.folder.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, TRAIN_NET, "--config-file", run.config, "--resume", *flags),
        *("SEED", str(run.seed), "OUTPUT_DIR", run.folder),
    ]
    with open(run.folder / "console.txt", "w") as console:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=console,
            stderr=console,
            start_new_session=True,  # Ctrl-C reaches this process only, which then stops the run
        )
        with _ended(process), tqdm(total=run.iterations, desc=title, disable=None) as bar:
            while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
                if deadline and time.monotonic() > deadline:
                    process.terminate()
                    deadline = None
                bar.update(run.iterations_done() - bar.n)
                time.sleep(POLL_SECONDS)
            _, status, usage = ended
            process.returncode = os.waitstatus_to_exitcode(status)
    lines = (run.folder / "console.txt").read_text().strip().splitlines()
    log = {
        "code": process.returncode,
        "error": lines[-1][-300:] if process.returncode and lines else "",
        "peak_mb": max(_peak_mb(run.folder, usage.ru_maxrss / 1024), run.log().get("peak_mb", 0)),
    }
    (run.folder / "comparison.json").write_text(json.dumps(log))


@contextmanager
def _ended(process: subprocess.Popen) -> Iterator[None]:
    """End the process on exit, also after SIGTERM: let it save, and wait for it."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if process.returncode is None:
            process.terminate()
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _peak_mb(folder: Path, resident_mb: float) -> float:
    """Return the peak GPU memory in Detectron2's log; without one, the peak resident memory."""
    log = folder / "log.txt"
    found = _MEMORY.findall(log.read_text()) if log.is_file() else []
    return float(max(map(int, found))) if found else resident_mb
