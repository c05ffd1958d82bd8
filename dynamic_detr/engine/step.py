"""Training step: forward, backward, clip, check the result in all processes, then update.

Losses, gradient norm and a request to stop are reduced as one small vector, so an iteration has one
extra reduction between the processes and one synchronisation with the device.
"""

import contextlib
import math
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError
from .batch_norm import RunningStatistics
from .clipping import GradientClipper
from .ema import ModelEMA
from .watch import current_watch

AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class NonFiniteStep(Exception):
    """A loss or the gradient is not finite. The weights, and the running statistics of batch norms,
    are those from before the step.

    Args:
        losses: each loss, averaged over the processes.
        skipped: number of successive steps that the scaler of float16 has skipped.
    """

    def __init__(self, losses: dict[str, float], skipped: int):
        super().__init__("a loss or the gradient is not finite")
        self.losses = losses
        self.skipped = skipped


def amp_dtype(enabled: bool, name: str, device: str) -> torch.dtype | None:
    """Return the dtype of mixed precision, or None.

    Raises:
        UserError: an unknown name, or float16 without a GPU.
    """
    if not enabled:
        return None
    if name not in AMP_DTYPES:
        raise UserError(f"SOLVER.AMP.DTYPE is {name!r}; it must be 'float16' or 'bfloat16'")
    if name == "float16" and not device.startswith("cuda"):
        raise UserError(
            f"SOLVER.AMP.DTYPE float16 needs a GPU and MODEL.DEVICE is {device!r}; set "
            "SOLVER.AMP.DTYPE bfloat16, or SOLVER.AMP.ENABLED False"
        )
    return AMP_DTYPES[name]


def seed_step(seed: int, iteration: int, rank: int) -> None:
    """Seed the random numbers of the model (dropout, sampled anchors) for one step."""
    torch.manual_seed(((seed * 1_000_003 + iteration) * 4_099 + rank) % 2**63)


class TrainStep(SimpleTrainer):
    """Detectron2's single-step trainer with mixed precision, clipping, averaging and checks.

    Args:
        model: maps a batch to a dict of losses; may be wrapped for data parallelism.
        data_loader: yields this process's part of each batch.
        optimizer: optimiser that does not clip.
        clip: clips gradients in place and returns their total norm (see ``clipping.py``).
        seed: seed of the run; each step is seeded with it, the iteration and the rank.
        dtype: dtype of mixed precision, or None.
        max_skipped_steps: number of successive overflowing float16 steps that is an error.
        ema: average that is updated after each optimiser step.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader,
        optimizer: torch.optim.Optimizer,
        clip: GradientClipper,
        seed: int,
        dtype: torch.dtype | None = None,
        max_skipped_steps: int = 20,
        ema: ModelEMA | None = None,
    ):
        super().__init__(model, data_loader, optimizer)
        self.clip = clip
        self.seed = seed
        self.dtype = dtype
        self.max_skipped_steps = max_skipped_steps
        self.ema = ema
        self.scaler = torch.amp.GradScaler("cuda") if dtype is torch.float16 else None
        self.skipped = 0
        self.batch: list[dict] = []
        self.stop_requested = False  # by this process's signal handler
        self.stop_agreed = False  # by all processes
        detector = model.module if isinstance(model, DistributedDataParallel) else model
        self.statistics = RunningStatistics(detector)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._device = self._parameters[0].device
        self._updated: torch.cuda.Event | None = None

    def run_step(self) -> None:
        """Train on the next batch.

        Raises:
            NonFiniteStep: on all processes; the step has changed nothing.
        """
        self.statistics.keep()
        try:
            means, norm = self._compute()
            finite = math.isfinite(norm) and all(map(math.isfinite, means.values()))
            if not finite:
                self.statistics.restore()
        except BaseException:
            self.statistics.restore()
            raise
        finally:
            self.statistics.forget()
        if finite:
            self.optimizer.step()
            self.skipped = 0
            if self.ema is not None:
                self.ema.update()
        else:
            self.skipped += 1
            if self.scaler is None or self.skipped >= self.max_skipped_steps:
                means.pop("total_loss")
                raise NonFiniteStep(means, self.skipped)
        if self.scaler is not None:
            self.scaler.update()
        if self._device.type == "cuda":
            self._updated = torch.cuda.Event()
            self._updated.record()

    def _compute(self) -> tuple[dict[str, float], float]:
        """Compute the gradients; return losses and gradient norm, averaged over the processes."""
        watch = current_watch()
        with watch.state_is_whole():
            watch.progress(f"loading the data of iteration {self.iter}", 3 * self.iter)
            started = time.perf_counter()
            self.batch = next(self._data_loader_iter)
            data_time = time.perf_counter() - started

            watch.progress(f"computing the gradients of iteration {self.iter}", 3 * self.iter + 1)
            seed_step(self.seed, self.iter, comm.get_rank())
            self.optimizer.zero_grad(set_to_none=True)
            losses = self._forward(self.batch)
            total = sum(losses.values())
            norm = self._backward(total)
            means, norm, self.stop_agreed = self._reduce(losses, total, norm, data_time)
        watch.progress(f"ending iteration {self.iter}", 3 * self.iter + 2)
        return means, norm

    @contextlib.contextmanager
    def seen_from_another_thread(self) -> Iterator[None]:
        """Read the state after the last update on a new stream, from another thread.

        The stream of the main thread may be blocked by a process that is gone. A step that has
        begun will not be finished: the statistics of batch norms stay those from before it.
        """
        if self._updated is None:
            self.statistics.freeze()
            yield
            return
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_event(self._updated)
            self.statistics.freeze()
            yield

    def _forward(self, batch: list[dict]) -> dict[str, Tensor]:
        if self.dtype is None:
            context = contextlib.nullcontext()
        else:
            context = torch.autocast(self._device.type, dtype=self.dtype)
        with context:
            losses = self.model(batch)
        return {"loss": losses} if isinstance(losses, Tensor) else losses

    def _backward(self, total: Tensor) -> Tensor:
        """Compute gradients, undo the loss scale and clip; return the norm before clipping."""
        if self.scaler is None:
            total.backward()
        else:
            self.scaler.scale(total).backward()
            # `scaler.step` would synchronise with the device to detect an overflow, which the norm
            # shows anyway; the scaler is updated on the device.
            self.scaler.unscale_(self.optimizer)
        for hook in self._hooks:
            if hasattr(hook, "after_backward"):  # hooks of 0.5 do not
                hook.after_backward()
        return self.clip(self._parameters)

    def _reduce(
        self, losses: dict[str, Tensor], total: Tensor, norm: Tensor, data_time: float
    ) -> tuple[dict[str, float], float, bool]:
        """Return losses and gradient norm, averaged over processes, and whether any must stop."""
        values = [*losses.values(), total, norm]
        vector = torch.stack([value.detach().float().to(self._device) for value in values])
        extra = vector.new_tensor([float(self.stop_requested), data_time])
        vector = torch.cat([vector, extra])
        world = comm.get_world_size()
        if world > 1:
            dist.all_reduce(vector)
        *means, norm_sum, stop, data_sum = vector.tolist()
        names = [*losses, "total_loss"]
        metrics = {name: value / world for name, value in zip(names, means, strict=True)}
        norm_mean = norm_sum / world
        if comm.is_main_process() and math.isfinite(norm_mean + metrics["total_loss"]):
            storage = get_event_storage()
            storage.put_scalar("data_time", data_sum / world)
            storage.put_scalars(**metrics, grad_norm=norm_mean)
        return metrics, norm_mean, stop > 0

    def state_dict(self) -> dict:
        """Return the state of optimiser and scaler and the number of skipped steps."""
        state = super().state_dict()
        state["skipped"] = self.skipped
        if self.scaler is not None:
            state["grad_scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.skipped = state_dict.get("skipped", 0)
        if self.scaler is not None and "grad_scaler" in state_dict:
            self.scaler.load_state_dict(state_dict["grad_scaler"])
