"""After a fault of one process, all processes of a run end with one line and one exit code, and the
state after one iteration is on disk. ``faults.py`` forces the faults."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from tiny_run import write_config, write_data

from dynamic_detr.cli import signals
from dynamic_detr.engine.heartbeat import Beat, Observer
from dynamic_detr.engine.stopping import StopRequest
from dynamic_detr.engine.watch import Watch

EVALUATE = ("TEST.EVAL_PERIOD", "3")  # when the last checkpoint is an iteration old
WORKER = ("DATALOADER.NUM_WORKERS", "1")
HANG = ("SOLVER.HANG_SECONDS", "8")


@dataclass
class Ended:
    """Result of a run of the command."""

    code: int
    stderr: str
    output: Path

    @property
    def lines(self) -> list[str]:
        """Lines of the command in stderr; libraries write warnings there too."""
        return [line for line in self.stderr.splitlines() if line.startswith("train_net.py: ")]

    def iteration(self) -> int:
        """Return the iteration of the checkpoint that ``--resume`` would load."""
        return self.checkpoint()["iteration"]

    def checkpoint(self) -> dict:
        path = self.output / (self.output / "last_checkpoint").read_text()
        return torch.load(path, weights_only=True)


class Commands:
    """Run the command in forks of a process that has imported all modules."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        json_file, images = write_data(folder / "data")
        self.arguments = ["--config-file", str(write_config(folder)), "--num-gpus", "0"]
        for split in ("train", "val"):
            self.arguments += [f"--{split}-json", str(json_file), f"--{split}-images", str(images)]
        self.server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "faults.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def start(self, output: str, *options: str, faults: list[dict] = (), processes: int = 2) -> int:
        """Start a run; return the pid of its launcher, which leads the process group."""
        self.output = self.folder / output
        keys = ["OUTPUT_DIR", str(self.output), "SOLVER.EMA.ENABLED", "True"]
        request = {
            "arguments": [*self.arguments, "--num-processes", str(processes), *options, *keys],
            "faults": faults,
            "stdout": str(self.folder / "stdout"),
            "stderr": str(self.folder / "stderr"),
        }
        Path(request["stderr"]).write_text("")
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        self.group = json.loads(self.server.stdout.readline())["pid"]
        self.running = True
        return self.group

    def end(self) -> Ended:
        """Wait for the command and for all its processes."""
        code = json.loads(self.server.stdout.readline())["code"]
        self.running = False
        try:
            _until(lambda: not self.alive(), 90, "a process outlives the command")
        finally:
            self.kill()
        return Ended(code, (self.folder / "stderr").read_text(), self.output)

    def kill(self) -> None:
        """End all processes after a test, passed or failed."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)
        if self.running:
            self.end()

    def alive(self) -> bool:
        try:
            os.killpg(self.group, 0)
        except ProcessLookupError:
            return False
        return True

    def run(self, output: str, *options: str, **more) -> Ended:
        self.start(output, *options, **more)
        return self.end()


def _until(condition, seconds: float, failure: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, failure
        time.sleep(0.02)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    commands = Commands(tmp_path_factory.mktemp("survival"))
    yield commands
    commands.server.stdin.close()
    commands.server.wait()


@pytest.fixture
def commands(server):
    yield server
    server.kill()


def fault(rank: int, site: str, kind: str, at: int = 3) -> dict:
    return {"rank": rank, "site": site, "kind": kind, "at": at}


BAD_IMAGE = "error: process {rank}: the image 3.png cannot be read; stopped after {done} iterations"
KILLED = "process {rank} on .* was ended by SIGKILL .* last seen"
HUNG = "process {rank} on .* made no progress for 8 s .*last seen loading the data of iteration 3"
FROZEN = "process 0 on .* made no progress for 8 s .*last seen loading the data of iteration"
STOPPED = "stopped by {name} after {done} of 6 iterations"
FAULTS = [  # the fault, options, exit code, the line, iterations in the checkpoint (None: the last)
    (fault(1, "data", "bad image"), (), 2, BAD_IMAGE, 3),
    (fault(0, "data", "bad image"), (), 2, BAD_IMAGE, 3),
    (fault(0, "data", "SIGKILL"), WORKER, 2, "process 0: a data-loading process was killed", None),
    (fault(1, "backward", "out of memory"), (), 2, "process 1: out of memory .*set BACKBONE, E", 3),
    (fault(1, "forward", "bug"), (), 1, "error: process 1: ValueError: a bug; stopped", 3),
    (fault(1, "forward", "SIGKILL"), (), 4, KILLED, 3),
    (fault(0, "backward", "SIGKILL"), (), 4, KILLED + ".*from the last checkpoint", 2),
    (fault(1, "reduce", "SIGSEGV"), (), 4, "process 1 on .* was ended by SIGSEGV", 3),
    (fault(1, "data", "hang"), HANG, 4, HUNG, 3),
    (fault(0, "data", "frozen"), (*WORKER, *HANG), 4, FROZEN, None),
    (fault(0, "forward", "SIGSTOP"), HANG, 4, "process 0 on .* not been heard of for 8 s", 2),
    (fault(1, "forward", "SIGTERM", 2), (), 0, STOPPED.replace("{name}", "SIGTERM"), None),
    (fault(1, "forward", "SIGINT", 2), (), 130, STOPPED.replace("{name}", "SIGINT"), None),
    (fault(0, "forward", "SIGUSR1", 2), WORKER, 0, STOPPED.replace("{name}", "SIGUSR1"), None),
    (fault(0, "save", "full disk", 1), (), 2, "could not write .* \\(the disk is full\\)", 2),
    (fault(1, "image", "SIGTERM", 1), EVALUATE, 0, STOPPED.replace("{name}", "SIGTERM"), 3),
    (fault(0, "image", "SIGTERM to all", 1), EVALUATE, 0, "stopped by SIGTERM after 3 of", 3),
    (fault(1, "image", "bad image", 1), EVALUATE, 2, BAD_IMAGE, 3),
    (fault(1, "image", "SIGKILL", 1), EVALUATE, 4, KILLED, 3),
    (fault(0, "scoring", "bad image", 0), EVALUATE, 2, BAD_IMAGE, 3),
]


@pytest.mark.parametrize(
    ("forced", "options", "code", "line", "done"),
    FAULTS,
    ids=[f"{f['kind']}-{f['site']}-{f['rank']}" for f, *_ in FAULTS],
)
def test_a_fault_of_one_process_ends_the_run(commands, request, forced, options, code, line, done):
    output = request.node.name
    ended = commands.run(output, *options, faults=[forced])
    assert ended.code == code, ended.stderr
    assert len(ended.lines) == 1, ended.stderr
    saved = ended.iteration() + 1
    wanted = line.format(rank=forced["rank"], done=saved)
    assert re.search(wanted, ended.lines[0]), ended.lines
    assert ended.stderr.count("Traceback") == (forced["kind"] == "bug"), ended.stderr
    assert saved == done or done is None
    if "saved " in ended.lines[0]:
        assert f"model_{saved - 1:07d}.pth" in ended.lines[0]


def test_an_evaluation_ends_as_one(commands):
    forced = [fault(1, "image", "SIGTERM", 1)]
    ended = commands.run("evaluation", "--eval-only", faults=forced)
    assert ended.code == 128 + signal.SIGTERM
    assert ended.lines == ["train_net.py: the evaluation was stopped by SIGTERM"]


def test_an_error_that_another_process_has_alone_is_told(commands):
    ended = commands.run("start", faults=[fault(1, "start", "bad image", 0)])
    assert ended.code == 2
    assert ended.lines == ["train_net.py: error: the image 3.png cannot be read"]
    assert not list(ended.output.glob("*.pth"))


def _run_for_long(commands: Commands, output: str, *options: str) -> int:
    """Start a long run, wait for its first checkpoint, and return the pid of its launcher."""
    options = ("SOLVER.MAX_ITER", "5000", *options)
    launcher = commands.start(output, *options)
    _until((commands.output / "last_checkpoint").exists, 300, "nothing was saved")
    return launcher


def test_no_process_outlives_the_launcher(commands):
    os.kill(_run_for_long(commands, "orphans"), signal.SIGKILL)
    ended = commands.end()
    assert len(ended.lines) == 1 and "the launcher of this run is gone" in ended.lines[0]
    assert f"model_{ended.iteration():07d}.pth" in ended.lines[0]
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("to_all", [False, True])
def test_the_launcher_hands_signals_on(commands, to_all):
    launcher = _run_for_long(commands, f"signal{to_all}")
    (os.killpg if to_all else os.kill)(launcher, signal.SIGUSR1)
    ended = commands.end()
    assert ended.code == 0
    assert len(ended.lines) == 1 and "stopped by SIGUSR1" in ended.lines[0]
    assert f"after {ended.iteration() + 1} of 5000" in ended.lines[0]


ENDS = (0, 4, 128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL)


def _survive(commands: Commands, seconds: float, iterations: int) -> int:
    """Kill processes at random moments and resume until done; return the number of kills."""
    rng = random.Random(0)
    options = ["SOLVER.MAX_ITER", str(iterations), "SOLVER.STEPS", f"({iterations * 2 // 3},)"]
    options += ["SOLVER.CHECKPOINT_PERIOD", "9"]
    whole = commands.run("whole", *options).checkpoint()
    kills, deadline = 0, time.monotonic() + seconds
    while time.monotonic() < deadline:
        shutil.rmtree(commands.folder / "killed", ignore_errors=True)
        done = False
        while not done:
            launcher = commands.start("killed", "--resume", *options)
            moment = min(time.monotonic() + rng.uniform(0.5, 4), deadline)
            while commands.alive() and time.monotonic() < moment:
                time.sleep(0.01)
            with contextlib.suppress(OSError):  # it may be over
                children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
                if time.monotonic() < deadline:
                    victim = rng.choice([launcher, *map(int, children)])
                    os.kill(victim, rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
                    kills += 1
            ended = commands.end()
            assert ended.code in ENDS, ended.stderr
            assert "Traceback" not in ended.stderr and len(ended.lines) <= 1, ended.stderr
            done = ended.code == 0 and not ended.lines
        result = ended.checkpoint()
        assert result["iteration"] == iterations - 1
        for name in ("model", "model_training"):
            for key, value in whole[name].items():
                assert torch.equal(result[name][key], value), key
    return kills


def test_a_run_survives_kills_at_random_moments(commands):
    assert _survive(commands, seconds=5, iterations=60) >= 1


@pytest.mark.long
def test_a_run_survives_kills_for_minutes(commands):
    assert _survive(commands, seconds=240, iterations=150) >= 20


def test_a_second_ctrl_c_ends_the_process(monkeypatch):
    ended, now = [], [0.0]
    monkeypatch.setattr(signals.os, "_exit", ended.append)
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    stop = StopRequest()
    with signals.listening(stop):
        for now[0] in (0.0, 0.5):  # the same one, forwarded
            signal.raise_signal(signal.SIGINT)
        assert not ended and stop.exit_code == 130
        now[0] = 2.0
        signal.raise_signal(signal.SIGTERM)
        assert not ended
        signal.raise_signal(signal.SIGINT)
    assert ended == [130]


def _beats(*places: tuple[float, int, bool]) -> dict[int, Beat]:
    return {
        rank: Beat(tick=1, order=order, steps=steps, waiting=waiting)
        for rank, (order, steps, waiting) in enumerate(places)
    }


@pytest.mark.parametrize(
    ("beats", "rank"),
    [
        (_beats((7, 7, False), (6, 6, False)), 1),  # process 0 waits for the gradients of process 1
        (_beats((5, 9, True), (5, 8, False)), 1),  # process 0 waits for the end of an evaluation
        (_beats((6, 6, False), (7, 7, False), (7, 7, False)), 0),
        ({**_beats((0, 1, False)), 1: None}, 1),  # it has sent no beat
        (_beats((5, 9, True), (5, 8, True)), None),
    ],
)
def test_the_process_that_holds_the_others_up_is_named(beats, rank):
    observer = Observer()
    assert observer.problem(beats, 60, now=0) is None
    alive = {r: beat and Beat(**{**vars(beat), "tick": 2}) for r, beat in beats.items()}
    assert observer.problem(alive, 60, now=30) is None
    found = observer.problem(alive, 60, now=61)
    assert (found and found[0]) == rank


def test_a_suspended_run_does_not_hang(monkeypatch):
    watch, now, found = Watch(), 0.0, []
    watch.hang_seconds = 60
    monkeypatch.setattr(watch, "_report", lambda *problem: found.append(problem))
    monkeypatch.setattr("dynamic_detr.engine.watch.time", SimpleNamespace(monotonic=lambda: now))
    for now in (0.0, 0.5, 3600.0, 3600.5):  # noqa: B007 - read by monotonic
        watch._look()
    assert not found
    for now in range(3601, 3670):  # noqa: B007
        watch._look()
    assert "made no progress for 60 s" in found[0][1]


def test_progress_is_no_hanging_and_silence_is():
    observer = Observer()
    for now in range(0, 300, 50):  # a long evaluation
        beat = Beat(tick=now + 1, steps=now)
        assert observer.problem({0: beat}, 60, now) is None
    assert observer.problem({0: beat}, 1000, 250 + 119) is None
    assert "heard of for 120 s" in observer.problem({0: beat}, 1000, 250 + 121)[1]
