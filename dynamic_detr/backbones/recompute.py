"""Activation checkpointing of a ResNet: in training each stage keeps only its input, and is
computed again when its gradient is needed."""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator

from detectron2.modeling.backbone.resnet import ResNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

__all__ = ["CheckpointedStage", "checkpoint_resnet_stages"]


class CheckpointedStage(nn.Sequential):
    """Blocks in sequence, under the names that `nn.Sequential` gives them.

    Running statistics of batch norms are those of a single pass.
    """

    def forward(self, features: Tensor) -> Tensor:
        if not self.training:
            return super().forward(features)
        return checkpoint(
            super().forward,
            features,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), self._statistics_kept()),
        )

    @contextlib.contextmanager
    def _statistics_kept(self) -> Iterator[None]:
        """The second pass must not enter the same batch into the running statistics again; it has
        to save what the first one saved, so that these must stay in use."""
        norms = [module for module in self.modules() if isinstance(module, _BatchNorm)]
        before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
        for norm in norms:
            norm.momentum = 0.0
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked = norm.num_batches_tracked.clone()
        try:
            yield
        finally:
            for norm, (momentum, batches) in zip(norms, before, strict=True):
                norm.momentum, norm.num_batches_tracked = momentum, batches


def checkpoint_resnet_stages(backbone: nn.Module) -> None:
    """Makes every stage of a ResNet a `CheckpointedStage`, in place.

    Parameters, buffers and their names stay what they are.

    Args:
        backbone: Detectron2's ResNet, alone or as the `bottom_up` of a feature pyramid.

    Raises:
        ValueError: it is no such network.
    """
    resnet = getattr(backbone, "bottom_up", backbone)
    if not isinstance(resnet, ResNet):
        raise ValueError(
            "MODEL.SET_DETECTOR.ACTIVATION_CHECKPOINT.BACKBONE is True; it wants a ResNet, and "
            f"MODEL.BACKBONE.NAME makes a {type(resnet).__name__}."
        )
    for index, name in enumerate(resnet.stage_names):
        stage = CheckpointedStage(OrderedDict(resnet.stages[index].named_children()))
        setattr(resnet, name, stage)
        resnet.stages[index] = stage
