"""Activation checkpointing saves memory and changes no result."""

import contextlib
import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from detectron2.modeling import build_model
from helpers import small_config, training_input
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dynamic_detr.backbones import checkpoint_resnet_stages

KEYS = ("ENCODER", "DECODER", "BACKBONE")


def make_model(*keys: str, norm: str = "GN", freeze_at: int = 0, **options) -> nn.Module:
    cfg = small_config(
        HIDDEN_DIM=32,
        DYNAMIC_DECODER__NUM_QUERIES=4,
        DYNAMIC_ENCODER__NUM_GROUPS=8,
        DYNAMIC_ENCODER__NUM_BLOCKS=2,
        **options,
        **{f"ACTIVATION_CHECKPOINT__{key}": True for key in keys},
    )
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    torch.manual_seed(0)
    return build_model(cfg).train()


def batch() -> list[dict]:
    torch.manual_seed(1)
    return [training_input(50, 64, [[5, 5, 40, 44]], [1]), training_input(64, 33)]


def one_step(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return losses, gradients and state after one forward and backward pass."""
    inputs = batch()
    losses = model(inputs)
    sum(losses.values()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {k: v.detach() for k, v in losses.items()}, grads, model.state_dict()


def count_runs(module: nn.Module) -> Callable[[], int]:
    runs = []
    module.register_forward_pre_hook(lambda *_: runs.append(1))
    return lambda: len(runs)


def parts(model: nn.Module) -> list[nn.Module]:
    """Return an encoder block, a decoder stage and a backbone block, in the order of KEYS."""
    return [model.encoder.blocks[1], model.decoder.stages[1], model.backbone.bottom_up.res4[0]]


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"DYNAMIC_DECODER__DROPOUT": 0.3}, None),  # the same random numbers both times
        ({"norm": "BN", "freeze_at": 2}, None),  # running statistics move once
        ({"norm": "FrozenBN", "freeze_at": 1}, torch.bfloat16),
    ],
    ids=["dropout", "batch norm, frozen stages", "bfloat16, frozen norm"],
)
def test_losses_gradients_and_state_are_the_same(options, dtype):
    results = []
    for keys in ((), KEYS):
        with torch.autocast("cpu", dtype=dtype) if dtype else contextlib.nullcontext():
            results.append(one_step(make_model(*keys, **options)))
    for plain, checkpointed in zip(*results, strict=True):
        assert list(plain) == list(checkpointed)
        for name, value in plain.items():
            torch.testing.assert_close(checkpointed[name], value, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("key", KEYS)
def test_each_key_computes_its_own_part_again(key):
    model = make_model(key)
    counters = [count_runs(part) for part in parts(model)]
    one_step(model)
    assert [runs() for runs in counters] == [1 + (name == key) for name in KEYS]
    model.eval()([{"image": batch()[0]["image"]}])
    assert [runs() for runs in counters] == [2 + (name == key) for name in KEYS]


def test_evaluation_with_gradients_computes_once():
    model = make_model(*KEYS).eval()
    counters = [count_runs(part) for part in parts(model)]
    _, predictions = model._predict(batch())
    predictions[-1].pred_boxes.sum().backward()
    assert [runs() for runs in counters] == [1, 1, 1]


def test_less_is_kept():
    kept = []
    for keys in ((), KEYS):
        model = make_model(*keys)
        sizes = {}

        def pack(tensor: Tensor, sizes=sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(batch())
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.6 * kept[0]


def test_names_are_unchanged_and_copies_work():
    plain, checkpointed = make_model(), make_model(*KEYS)
    assert list(plain.state_dict()) == list(checkpointed.state_dict())
    checkpointed.load_state_dict(plain.state_dict())
    names = [name for name, _ in copy.deepcopy(checkpointed).named_modules()]
    assert names == [name for name, _ in plain.named_modules()]


def test_under_data_parallel(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        _, wanted, _ = one_step(make_model())
        model = DistributedDataParallel(make_model(*KEYS), broadcast_buffers=False)
        _, found, _ = one_step(model)
    finally:
        dist.destroy_process_group()
    assert len(found) == len(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[f"module.{name}"], value)


def test_other_backbones_are_one_line():
    with pytest.raises(
        ValueError, match=r"CHECKPOINT.BACKBONE is True, which requires a ResNet, .* Linear"
    ):
        checkpoint_resnet_stages(nn.Linear(1, 1))
