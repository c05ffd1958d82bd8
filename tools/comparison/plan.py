"""The plan of a comparison, kept in its folder, so that the next command with the same folder goes
on, adds a detector or a seed, or draws the page again.

    DIR/comparison.json        the plan
    DIR/NAME/config.yaml       a detector's configuration on equal terms
    DIR/NAME/seed_1/           OUTPUT_DIR of its run
    DIR/results.json, DIR/index.html
"""

import argparse
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from dynamic_detr.data.coco_json import apply_json_datasets
from dynamic_detr.data.scenes import register_scenes_of
from dynamic_detr.errors import UserError
from dynamic_detr.files.config_file import read_config

from .runs import Run
from .terms import Terms, compose, read_first

__all__ = ["DATA", "Plan"]

DATA = ("train_json", "train_images", "val_json", "val_images")
_FIXED = ("data", "iterations", "evaluations", "keys", "devices")  # once a run has been made


@dataclass
class Plan:
    """The detectors of a comparison and everything that their runs depend on.

    Args:
        folder: of the comparison.
        configs: configuration files by the detector's name, the first one's terms hold for all.
        data: the four data flags of `train_net.py`; empty for the first configuration's data sets.
        iterations: of each run.
        evaluations: of each run, in equal distances.
        seeds: runs of each detector, with seeds 1, 2, ...
        keys: KEY VALUE in turn, for all.
        devices: flags of `train_net.py` that choose GPUs or processes.
        note: of whoever made it, for the page.
        commands: that named its detectors and seeds.
        terms: of each detector.
    """

    folder: Path
    configs: dict[str, str]
    data: dict[str, str] = field(default_factory=dict)
    iterations: int | None = None
    evaluations: int = 5
    seeds: int = 1
    keys: list[str] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)
    note: str = ""
    commands: list[str] = field(default_factory=list)
    terms: dict[str, dict] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Plan | None":
        """The plan that a folder holds; None if it holds none.

        Raises:
            UserError: it cannot be read.
        """
        path = folder / "comparison.json"
        if not path.is_file():
            return None
        try:
            return cls(folder, **json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} is no comparison of this version ({error})") from error

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        data = {name: value for name, value in asdict(self).items() if name != "folder"}
        (self.folder / "comparison.json").write_text(json.dumps(data, indent=1) + "\n")

    @classmethod
    def merge(cls, folder: Path, args: argparse.Namespace, command: str) -> "Plan":
        """The plan of a command line: a new one, or what a folder holds with detectors and seeds
        added.

        Raises:
            UserError: the command line lacks something, or differs from what the folder holds.
        """
        configs: dict[str, str] = {}
        for config_file in args.config_file or []:
            name = Path(config_file).stem
            if configs.setdefault(name, config_file) != config_file:
                raise UserError(
                    f"{configs[name]} and {config_file} have the same name, by which a comparison "
                    "keeps them apart; rename one"
                )
        data = {name: getattr(args, name) for name in DATA if getattr(args, name)}
        if data and len(data) < len(DATA):
            missing = next(name for name in DATA if name not in data)
            raise UserError(f"--{missing.replace('_', '-')} is missing: give all four, or none")
        plan = cls.read(folder)
        if plan is None:
            if not configs:
                raise UserError("--config-file is missing: name the detectors to compare")
            plan = cls(folder, {}, data, args.iterations, args.evaluations or 5, 1)
            plan.keys, plan.devices = args.opts, args.devices
        asked = {
            "data": data,
            "iterations": args.iterations,
            "evaluations": args.evaluations,
            "keys": args.opts,
            "devices": args.devices,
        }
        for name in _FIXED:
            if asked[name] and asked[name] != getattr(plan, name):
                raise UserError(
                    f"{folder} holds a comparison with {name} {getattr(plan, name)}, not "
                    f"{asked[name]}; leave it out, or name another --output"
                )
        for name, config_file in configs.items():
            if plan.configs.setdefault(name, config_file) != config_file:
                raise UserError(
                    f"{folder} holds {name} of {plan.configs[name]} already; rename {config_file}"
                )
        plan.seeds = max(plan.seeds, args.seeds or 1)
        plan.note = plan.note if args.note is None else args.note
        if (configs or args.seeds) and command not in plan.commands:
            plan.commands.append(command)
        return plan

    def compose(self) -> None:
        """Writes the configuration of every detector, and keeps its terms.

        Raises:
            UserError: one cannot work, or is not the one that its runs were made with.
        """
        first_file = next(iter(self.configs.values()))
        first = read_first(first_file, self.keys, self.iterations, self.evaluations, self.folder)
        self._register(first)
        self.iterations = first.SOLVER.MAX_ITER
        composed = {name: compose(path, first, self.keys) for name, path in self.configs.items()}
        for name, (cfg, _) in composed.items():
            self._check_unchanged(name, cfg)
        for name, (cfg, terms) in composed.items():
            self.config(name).parent.mkdir(parents=True, exist_ok=True)
            self.config(name).write_text(cfg.dump())
            self.terms[name] = terms.to_dict()
        self.write()

    def _register(self, cfg: CfgNode) -> None:
        """Makes the data sets known in this process, and sees that they are there.

        Args:
            cfg: gets their names and the number of classes.
        """
        if self.data:
            cfg.OUTPUT_DIR = str(self.folder)
            apply_json_datasets(cfg, argparse.Namespace(**self.data, eval_only=False))
        register_scenes_of(cfg)
        for split in ("TRAIN", "TEST"):
            if not cfg.DATASETS[split]:
                raise UserError(f"DATASETS.{split} is empty; name a data set, or give JSON files")
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
            if name not in DatasetCatalog.list():
                raise UserError(
                    f"DATASETS names {name}, which is not registered; --train-json and --val-json "
                    "take COCO files"
                )

    def composed(self, register: bool = False) -> dict[str, CfgNode]:
        """The configurations that `compose` has written, by name, with the device of the runs.

        Args:
            register: make their data sets known in this process, as `compose` does.

        Raises:
            UserError: there are none yet.
        """
        configs = {}
        for name in self.configs:
            if not self.config(name).is_file():
                raise UserError(f"{self.config(name)} does not exist; run without --page-only")
            configs[name] = cfg = read_config(str(self.config(name)), [])
            on_gpu = torch.cuda.is_available() and self.devices in ([], ["--num-gpus", "1"])
            cfg.MODEL.DEVICE = cfg.MODEL.DEVICE if on_gpu else "cpu"
        if register:
            self._register(next(iter(configs.values())))
        return configs

    def _check_unchanged(self, name: str, cfg: CfgNode) -> None:
        path = self.config(name)
        started = any(run.folder.exists() for run in self.runs() if run.name == name)
        if started and path.is_file() and path.read_text() != cfg.dump():
            raise UserError(
                f"{self.configs[name]}, or the first configuration, has changed since {name} was "
                f"trained in {path.parent}; delete that folder to train it anew"
            )

    def config(self, name: str) -> Path:
        return self.folder / name / "config.yaml"

    def runs(self) -> list[Run]:
        """All runs, every detector's first seed first."""
        return [
            Run(name, seed, self.folder / name / f"seed_{seed}", self.config(name), self.iterations)
            for seed in range(1, self.seeds + 1)
            for name in self.configs
        ]

    def flags(self) -> list[str]:
        """Of `train_net.py`."""
        data = [(f"--{name.replace('_', '-')}", value) for name, value in self.data.items()]
        return [word for pair in data for word in pair] + self.devices

    def terms_of(self, name: str) -> Terms:
        return Terms(**self.terms[name])
