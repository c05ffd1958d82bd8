#!/usr/bin/env python
"""Repeat the training step that diverged, and name the first module with non-finite output.

python tools/replay_step.py output/failed_step
"""

import argparse
import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch reads it: runtime/threads.py

import dynamic_detr  # noqa: F401  (first: silences a warning of Detectron2's import)

# isort: split
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from dynamic_detr.cli.exits import report_user_errors
from dynamic_detr.engine.failed_step import FailedStep
from dynamic_detr.engine.replay import Finding, replay
from dynamic_detr.engine.step import AMP_DTYPES, seed_step
from dynamic_detr.errors import UserError, one_line
from dynamic_detr.runtime.threads import choose_threads

PROGRAM = "replay_step.py"
NOTHING_FOUND = 1


def replay_batch(step: FailedStep, rank: int, batch: list[dict], device: str) -> Finding | None:
    """Replay one process's share of the step.

    Args:
        step: the failed step, as process 0 wrote it.
        rank: rank of the process.
        batch: its part of the batch.
        device: "cpu" or "cuda"; a device other than the run's may round differently.

    Returns:
        The first non-finite value; None if all are finite.
    """
    cfg = step.cfg()
    cfg.MODEL.DEVICE = device
    model = build_model(cfg).train()
    model.load_state_dict(step.model)
    seed_step(step.seed, step.iteration, rank)
    with EventStorage(step.iteration):  # some of Detectron2's heads need the storage
        return replay(model, batch, AMP_DTYPES.get(step.dtype), step.scale)


def run(folder: Path, device: str | None) -> int:
    """Replay every batch in a folder.

    Args:
        folder: failed_step in the `OUTPUT_DIR` of the run.
        device: device to run on; None for the run's own.

    Returns:
        The exit code.

    Raises:
        UserError: the folder does not hold a failed step.
    """
    step = FailedStep.load(folder)
    batches = step.batches(folder)
    if not batches:
        raise UserError(f"{folder} contains no batch of iteration {step.iteration}")
    if device is None:
        device = step.cfg().MODEL.DEVICE
        if device.startswith("cuda") and not torch.cuda.is_available():
            print("no GPU here: running on the CPU, which may round differently")
            device = "cpu"
    if device == "cpu":
        print(choose_threads(step.processes))  # the order of sums depends on their number
    found = False
    for rank, batch in batches.items():
        files = ", ".join(str(record.get("file_name", "an image")) for record in batch)
        print(f"iteration {step.iteration}, process {rank} of {step.processes}: {files}")
        finding = replay_batch(step, rank, batch, device)
        found = found or finding is not None
        print(f"  {finding or 'every output, loss and gradient is finite'}", flush=True)
    return 0 if found else NOTHING_FOUND


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="exit codes: 0 found; 1 all values are finite; 2 no failed step",
    )
    parser.add_argument("folder", type=Path, help="failed_step in the OUTPUT_DIR of the run")
    parser.add_argument("--device", help="cpu or cuda (default: the device of the run)")
    args = parser.parse_args(argv)
    logging.getLogger().setLevel(logging.WARNING)
    with report_user_errors(PROGRAM):
        try:
            return run(args.folder, args.device)
        except (KeyError, RuntimeError) as error:  # weights of another version of the model
            raise UserError(
                f"{args.folder} cannot be replayed ({one_line(error)[:200]})"
            ) from error


if __name__ == "__main__":
    sys.exit(main())
