"""The plan of a comparison.

It is stored in the folder of the comparison, so that a later command can continue, add detectors or
seeds, or write the page again.

    DIR/comparison.json        the plan
    DIR/NAME/config.yaml       configuration of a detector on equal terms
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
from dynamic_detr.errors import UserError, is_text
from dynamic_detr.files.config_file import read_config

from .runs import Run
from .terms import compose, read_first

__all__ = ["DATA", "Plan"]

DATA = ("train_json", "train_images", "val_json", "val_images")
_FIXED = ("data", "iterations", "evaluations", "keys", "devices")  # cannot be changed later


@dataclass
class Plan:
    """The detectors of a comparison and all settings of their runs.

    Args:
        folder: folder of the comparison.
        configs: configuration files by name of the detector; the first one sets the shared terms.
        data: values of `DATA`, the data flags of `train_net.py`; if empty, the datasets are those
            of the first configuration.
        iterations: iterations of each run.
        evaluations: number of evaluations of each run, at equal intervals.
        seeds: number of runs of each detector, with seeds 1, 2, ...
        keys: configuration keys and values of all detectors, alternating.
        devices: flags of `train_net.py` for GPUs or processes.
        note: text of the user for the page.
        commands: commands that added detectors or seeds.
        terms: `Terms` of each detector, as dicts.
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
        """Read the plan in a folder; return None if there is none.

        Raises:
            UserError: the plan cannot be read.
        """
        path = folder / "comparison.json"
        if not path.is_file():
            return None
        try:
            return cls(folder, **json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} is not a comparison of this version ({error})") from error

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        data = {name: value for name, value in asdict(self).items() if name != "folder"}
        (self.folder / "comparison.json").write_text(json.dumps(data, indent=1) + "\n")

    @classmethod
    def merge(cls, folder: Path, args: argparse.Namespace, command: str) -> "Plan":
        """Make a new plan, or add detectors and seeds to the plan in a folder.

        Args:
            folder: folder of the comparison.
            args: command line of compare.py.
            command: the same as text.

        Raises:
            UserError: the command line is incomplete, or contradicts the plan in the folder.
        """
        if not is_text(args.note or ""):
            raise UserError(f"--note {args.note!a} is not text in UTF-8")
        configs: dict[str, str] = {}
        for config_file in args.config_file or []:
            name = Path(config_file).stem
            if configs.setdefault(name, config_file) != config_file:
                raise UserError(f"{configs[name]} and {config_file} have the same name; rename one")
        data = {name: getattr(args, name) for name in DATA if getattr(args, name)}
        if data and len(data) < len(DATA):
            missing = next(name for name in DATA if name not in data)
            raise UserError(f"--{missing.replace('_', '-')} is missing: give all four or none")
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
                    f"the comparison in {folder} has {name} {getattr(plan, name)}, not "
                    f"{asked[name]}; omit it, or choose another --output"
                )
        for name, config_file in configs.items():
            if plan.configs.setdefault(name, config_file) != config_file:
                raise UserError(
                    f"the comparison in {folder} already has {name} ({plan.configs[name]}); rename "
                    f"{config_file}"
                )
        plan.seeds = max(plan.seeds, args.seeds or 1)
        plan.note = plan.note if args.note is None else args.note
        if (configs or args.seeds) and command not in plan.commands:
            plan.commands.append(command)
        return plan

    def compose(self) -> None:
        """Write the configuration and store the terms of every detector.

        Raises:
            UserError: a configuration is invalid, or has changed since its runs.
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
            self.terms[name] = asdict(terms)
        self.write()

    def _register(self, cfg: CfgNode) -> None:
        """Register the datasets in this process, and check that they exist.

        Args:
            cfg: gets the names of the datasets and the number of classes.
        """
        if self.data:
            if (key := "DATALOADER.FILTER_EMPTY_ANNOTATIONS") in self.keys:
                raise UserError(f"{key} is set by --train-json in a comparison; omit the key")
            cfg.OUTPUT_DIR = str(self.folder)
            apply_json_datasets(cfg, argparse.Namespace(**self.data, eval_only=False))
        register_scenes_of(cfg)
        for split in ("TRAIN", "TEST"):
            if not cfg.DATASETS[split]:
                raise UserError(
                    f"DATASETS.{split} is empty; set it to a data set, or pass JSON files"
                )
        if len(cfg.DATASETS.TEST) > 1:
            raise UserError(
                f"DATASETS.TEST names {len(cfg.DATASETS.TEST)} data sets; a comparison has one"
            )
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
            if name not in DatasetCatalog.list():
                raise UserError(
                    f"DATASETS names {name}, which is not registered; --train-json and --val-json "
                    "take COCO files"
                )

    def composed(self, register: bool = False) -> dict[str, CfgNode]:
        """Read the configurations that `compose` wrote, and set the device of the runs.

        Args:
            register: whether to register the datasets in this process, as `compose` does.

        Returns:
            Configurations by name of the detector.

        Raises:
            UserError: a configuration has not been written.
        """
        configs = {}
        for name in self.configs:
            if not self.config(name).is_file():
                raise UserError(f"{self.config(name)} does not exist; run without --page-only")
            configs[name] = cfg = read_config(str(self.config(name)), [])
            cfg.MODEL.DEVICE = cfg.MODEL.DEVICE if self.device == "cuda" else "cpu"
        if register:
            self._register(next(iter(configs.values())))
        return configs

    def _check_unchanged(self, name: str, cfg: CfgNode) -> None:
        path = self.config(name)
        started = any(run.folder.exists() for run in self.runs() if run.name == name)
        if started and path.is_file() and path.read_text() != cfg.dump():
            raise UserError(
                f"{self.configs[name]}, or the first configuration, has changed since {name} was "
                f"trained in {path.parent}; delete this folder to train it again"
            )

    @property
    def device(self) -> str:
        """Return the type of device that the runs train on, for measurements in this process."""
        flags = dict(zip(self.devices[::2], self.devices[1::2], strict=True))
        on_cpu = flags.get("--num-gpus") == "0" or int(flags.get("--num-processes", 1)) > 1
        return "cuda" if torch.cuda.is_available() and not on_cpu else "cpu"

    def config(self, name: str) -> Path:
        return self.folder / name / "config.yaml"

    def runs(self) -> list[Run]:
        """Return all runs: the first seed of every detector, then the second, and so on."""
        return [
            Run(name, seed, self.folder / name / f"seed_{seed}", self.config(name), self.iterations)
            for seed in range(1, self.seeds + 1)
            for name in self.configs
        ]

    def flags(self) -> list[str]:
        """Return the flags of `train_net.py` for data and devices."""
        data = [(f"--{name.replace('_', '-')}", value) for name, value in self.data.items()]
        return [word for pair in data for word in pair] + self.devices
