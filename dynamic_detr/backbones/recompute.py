"""Activation checkpointing of a ResNet: a stage keeps its input and recomputes the rest.

The recomputation happens in the backward pass.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator

from detectron2.modeling.backbone.resnet import ResNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

__all__ = ["CheckpointedStage", "checkpoint_resnet_stages"]


class CheckpointedStage(nn.Sequential):
    """`nn.Sequential` that recomputes its activations in the backward pass of training.

    Running statistics of batch norms are updated once per step.
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
        """Leave running statistics unchanged, but have the norms save the same tensors.

        The norms stay in training mode: checkpointing fails if the recomputation saves other
        tensors than the first pass.
        """
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
    """Turn every stage of a ResNet into a `CheckpointedStage`, in place.

    Parameters, buffers and their names do not change.

    Args:
        backbone: Detectron2's ResNet, or a feature pyramid with a ResNet as `bottom_up`.

    Raises:
        ValueError: `backbone` is neither.
    """
    resnet = getattr(backbone, "bottom_up", backbone)
    if not isinstance(resnet, ResNet):
        raise ValueError(
            "MODEL.SET_DETECTOR.ACTIVATION_CHECKPOINT.BACKBONE is True, which requires a ResNet, "
            f"but MODEL.BACKBONE.NAME builds a {type(resnet).__name__}."
        )
    for index, name in enumerate(resnet.stage_names):
        stage = CheckpointedStage(OrderedDict(resnet.stages[index].named_children()))
        setattr(resnet, name, stage)
        resnet.stages[index] = stage
