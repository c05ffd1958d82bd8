"""Parameter groups, clipping, averaging and the checks of a training step."""

import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils.events import EventStorage
from torch import nn

from dynamic_detr import add_dynamic_detr_config
from dynamic_detr.engine.clipping import build_clipper
from dynamic_detr.engine.diagnosis import likely_cause, non_finite_losses, stage_of
from dynamic_detr.engine.ema import ModelEMA
from dynamic_detr.engine.optimizer import build_optimizer, parameter_groups
from dynamic_detr.engine.schedule import describe_schedule, scale_schedule
from dynamic_detr.engine.step import NonFiniteStep, TrainStep, amp_dtype
from dynamic_detr.errors import UserError


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_dynamic_detr_config(cfg)
    return cfg


class Detector(nn.Module):
    """A module of each kind that has its own rule."""

    def __init__(self, fpn: bool = True):
        super().__init__()
        bottom_up = nn.ModuleDict({"conv1": nn.Conv2d(3, 4, 1)})
        self.backbone = nn.ModuleDict({"bottom_up": bottom_up} if fpn else dict(bottom_up.items()))
        self.backbone["lateral"] = nn.Conv2d(4, 4, 1)
        self.encoder = nn.ModuleDict(
            {"offset": nn.Conv2d(4, 27, 3), "sampling_offsets": nn.Linear(4, 2)}
        )
        self.encoder["norm"] = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.head.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.frozen_norm = FrozenBatchNorm2d(4)


def _settings(model: nn.Module, **options) -> dict[str, tuple[float, float]]:
    """(learning rate, weight decay) by parameter name."""
    groups = parameter_groups(model, base_lr=1.0, weight_decay=0.1, **options)
    by_id = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    return {name: by_id[id(p)] for name, p in model.named_parameters() if id(p) in by_id}


def test_groups_give_every_parameter_its_rate_and_decay():
    settings = _settings(
        Detector(),
        weight_decay_norm=0.0,
        weight_decay_bias=0.05,
        backbone_multiplier=0.1,
        offsets_multiplier=0.5,
    )
    assert settings == {
        "backbone.bottom_up.conv1.weight": (0.1, 0.1),
        "backbone.bottom_up.conv1.bias": (0.1, 0.05),
        "backbone.lateral.weight": (1.0, 0.1),  # an FPN's own layers are not pretrained
        "backbone.lateral.bias": (1.0, 0.05),
        "encoder.offset.weight": (1.0, 0.1),  # of a deformable convolution
        "encoder.offset.bias": (1.0, 0.05),
        "encoder.sampling_offsets.weight": (0.5, 0.1),
        "encoder.sampling_offsets.bias": (0.5, 0.05),
        "encoder.norm.weight": (1.0, 0.0),
        "encoder.norm.bias": (1.0, 0.05),
        "head.weight": (1.0, 0.1),
        "head.bias": (1.0, 0.05),
        "tied.bias": (1.0, 0.05),
    }


def test_a_backbone_without_bottom_up_is_pretrained_as_a_whole():
    settings = _settings(Detector(fpn=False), backbone_multiplier=0.1)
    assert settings["backbone.conv1.weight"] == settings["backbone.lateral.weight"] == (0.1, 0.1)
    assert settings["head.weight"] == (1.0, 0.1)


def test_groups_hold_each_trainable_parameter_once():
    model = Detector()
    held = [p for g in parameter_groups(model, 1.0, 0.1, 0.0, 0.05, 2.0) for p in g["params"]]
    assert len(held) == len({id(p) for p in held})
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}


def test_sgd_is_detectron2s_own(cfg):
    """With the defaults of the new keys, Detectron2's recipes take the steps they take there."""
    from detectron2.solver import build_optimizer as detectron2_optimizer

    cfg.SOLVER.BASE_LR, cfg.SOLVER.NESTEROV = 0.1, True
    models = [Detector(), Detector()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [build_optimizer(cfg, models[0]), detectron2_optimizer(cfg, models[1])]
    for _ in range(3):
        gradients = {n: torch.randn_like(p) for n, p in models[0].named_parameters()}
        for model, optimizer in zip(models, optimizers, strict=True):
            for name, parameter in model.named_parameters():
                parameter.grad = gradients[name].clone() if parameter.requires_grad else None
            optimizer.step()
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(value, models[1].state_dict()[name])


def test_adamw_decays_apart_from_the_gradient(cfg):
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY = "ADAMW", 0.1, 0.5
    model = nn.Linear(1, 1, bias=False)
    before = model.weight.detach().clone()
    model.weight.grad = torch.full_like(before, 3.0)
    build_optimizer(cfg, model).step()
    torch.testing.assert_close(model.weight.detach(), before * (1 - 0.1 * 0.5) - 0.1)


def test_wrong_solver_options_are_named(cfg):
    cfg.SOLVER.OPTIMIZER = "ADAM"
    with pytest.raises(UserError, match="SOLVER.OPTIMIZER is 'ADAM'"):
        build_optimizer(cfg, nn.Linear(1, 1))
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "global"
    with pytest.raises(UserError, match="CLIP_TYPE is 'global'"):
        build_clipper(cfg)
    with pytest.raises(UserError, match="bfloat16"):
        amp_dtype(True, "float16", "cpu")
    with pytest.raises(UserError, match="'float8'"):
        amp_dtype(True, "float8", "cuda")
    assert amp_dtype(True, "bfloat16", "cpu") is torch.bfloat16
    assert amp_dtype(False, "float16", "cpu") is None


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("full_model", [[0.6, 0.0], [0.0, 0.8]]),  # one norm of 5 for both
        ("norm", [[1.0, 0.0], [0.0, 1.0]]),
        ("value", [[1.0, 0.0], [0.0, 1.0]]),
        (None, [[3.0, 0.0], [0.0, 4.0]]),
    ],
)
def test_clipping(cfg, kind, expected):
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = kind is not None
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = kind or "value"
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad = torch.tensor([3.0, 0.0])
    parameters[1].grad = torch.tensor([0.0, 4.0])  # the third got none
    norm = build_clipper(cfg)(parameters)
    assert norm.item() == pytest.approx(5.0)
    for parameter, gradient in zip(parameters[:2], expected, strict=True):
        torch.testing.assert_close(parameter.grad, torch.tensor(gradient), rtol=1e-5, atol=1e-5)


class Tied(nn.Module):
    """Shared weights, a running mean and a counter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.second = nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(2)


def test_average_follows_its_equation():
    model = Tied()
    ema = ModelEMA(model, decay=0.15)
    average = model.first.weight.detach().clone()
    for step in range(4):
        with torch.no_grad():
            model.first.weight += 1.0
        model.norm.num_batches_tracked += 1
        ema.update()
        decay = min(0.15, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * model.first.weight.detach()
    state = ema.state_dict()
    torch.testing.assert_close(state["first.weight"], average)
    torch.testing.assert_close(state["second.weight"], average)
    assert state["norm.num_batches_tracked"] == 4


def test_model_holds_the_average_only_while_it_is_applied():
    model = Tied()
    ema = ModelEMA(model, decay=0.5)
    with torch.no_grad():
        model.first.weight += 1.0
    ema.update()
    raw = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError), ema.applied():
        assert not torch.equal(model.first.weight, raw["first.weight"])
        assert model.first.weight is model.second.weight
        raise RuntimeError
    for name, value in model.state_dict().items():
        assert torch.equal(value, raw[name])
    other = ModelEMA(Tied(), decay=0.5)
    other.load(ema.state_dict(), ema.updates)
    for name, value in other.state_dict().items():
        assert torch.equal(value, ema.state_dict()[name])
    with pytest.raises(ValueError, match="decay"):
        ModelEMA(model, decay=1.0)


class Scripted(nn.Module):
    """A model that returns the losses it was told to."""

    def __init__(self, *factors: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.factors = iter(factors)

    def forward(self, batch):
        return {"loss_a_0": self.weight * 1.0, "loss_a": self.weight * next(self.factors)}


def _step(model: nn.Module, **options) -> TrainStep:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cfg = get_cfg()
    add_dynamic_detr_config(cfg)
    return TrainStep(model, [[{}]] * 9, optimizer, build_clipper(cfg), seed=0, **options)


def test_weights_stay_those_from_before_a_step_that_is_not_finite():
    model = Scripted(1.0, math.nan)
    ema = ModelEMA(model, 0.9)
    step = _step(model, ema=ema)
    with EventStorage(0) as storage:
        step.run_step()
        before = model.weight.item()
        assert before == pytest.approx(1.0 - 0.1 * 2)
        assert storage.latest()["total_loss"][0] == pytest.approx(2.0)
        with pytest.raises(NonFiniteStep) as error:
            step.run_step()
    assert model.weight.item() == before and ema.updates == 1
    assert non_finite_losses(error.value.losses) == "loss_a (stage 2)"


class Normed(Scripted):
    """The same with a batch norm, whose statistics another thread may save during the step."""

    def __init__(self, *factors: float):
        super().__init__(*factors)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, batch):
        before = {name: value.clone() for name, value in self.norm.state_dict().items()}
        self.norm(torch.rand(4, 2, 3, 3))
        assert self.norm.training != torch.equal(self.norm.running_mean, before["running_mean"])
        if self.saving_step is not None:
            with self.saving_step.seen_from_another_thread():
                torch.testing.assert_close(self.norm.state_dict(), before, rtol=0, atol=0)
        return super().forward(batch)


@pytest.mark.parametrize("from_outside", [False, True])
def test_statistics_of_batch_norms_stay_those_from_before_it(from_outside):
    model = Normed(1.0, math.inf, math.nan)
    step = _step(model)
    model.saving_step = step if from_outside else None
    step.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with EventStorage(0):
        step.run_step()
        assert model.norm.num_batches_tracked == (0 if from_outside else 1)
        if from_outside:
            model(None)  # the main thread may go on, the statistics do not
            assert model.norm.num_batches_tracked == 0
            return
        before = {name: value.clone() for name, value in model.norm.state_dict().items()}
        step.run_step()  # skipped
        torch.testing.assert_close(model.norm.state_dict(), before, rtol=0, atol=0)
        step.scaler = None
        with pytest.raises(NonFiniteStep):
            step.run_step()
    torch.testing.assert_close(model.norm.state_dict(), before, rtol=0, atol=0)


def test_an_infinite_gradient_of_a_finite_loss_is_noticed():
    class Root(Scripted):
        def forward(self, batch):
            return {"loss": (self.weight - 1.0).sqrt()}

    model = Root()
    with EventStorage(0), pytest.raises(NonFiniteStep) as error:
        _step(model).run_step()
    assert non_finite_losses(error.value.losses) == "" and model.weight.item() == 1.0


def test_float16_gives_up_only_after_so_many_skipped_steps_in_a_row():
    model = Scripted(*[math.inf] * 2, 1.0, *[math.inf] * 3)
    step = _step(model, max_skipped_steps=3)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with EventStorage(0):
        step.run_step()
        step.run_step()
        assert model.weight.item() == 1.0 and step.skipped == 2
        assert step.scaler.get_scale() == 1.0  # halved by each overflow
        step.run_step()
        assert model.weight.item() == pytest.approx(0.8) and step.skipped == 0
        step.run_step()
        restored = _step(model, max_skipped_steps=3)
        restored.scaler = torch.amp.GradScaler("cpu")
        restored.load_state_dict(step.state_dict())
        assert restored.skipped == 1 and restored.scaler.get_scale() == 0.5
        step.run_step()
        with pytest.raises(NonFiniteStep) as error:
            step.run_step()
    assert error.value.skipped == 3


def test_loss_scale_is_undone_before_clipping(cfg):
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 5.0  # above the true norm of 2, below the scaled one
    model = Scripted(1.0)
    step = _step(model)
    step.clip = build_clipper(cfg)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with EventStorage(0):
        step.run_step()
    assert model.weight.item() == pytest.approx(0.8)


def test_bfloat16_autocasts_on_the_cpu():
    class Multiply(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, batch):
            product = self.linear(torch.ones(1, 4))
            assert product.dtype is torch.bfloat16
            return {"loss": product.float().sum()}

    with EventStorage(0):
        _step(Multiply(), dtype=torch.bfloat16).run_step()


def test_losses_name_their_stage():
    names = ["loss_l1_0", "loss_l1_1", "loss_l1", "total_loss"]
    assert [stage_of(name, names) for name in names] == [1, 2, 3, None]
    assert stage_of("loss_cls", ["loss_cls", "loss_box_reg"]) is None
    assert non_finite_losses({"loss_l1": math.nan, "loss_l1_1": math.inf, "loss_l1_0": 1.0}) == (
        "loss_l1_1 (stage 2) and 1 more"
    )


def test_likely_cause_looks_at_data_weights_and_options(cfg):
    model = nn.Linear(2, 2)
    good = [{"image": torch.zeros(3, 4, 4)}]
    bad = [{"image": torch.full((3, 4, 4), math.nan), "file_name": "broken.png"}]
    cfg.MODEL.WEIGHTS = "some.pth"
    assert "broken.png" in likely_cause(cfg, model, bad, 0)
    assert "BASE_LR" in likely_cause(cfg, model, good, 0)
    cfg.SOLVER.AMP.ENABLED = True
    assert "bfloat16" in likely_cause(cfg, model, good, 0)
    cfg.MODEL.WEIGHTS = ""
    assert "frozen batch norm" in likely_cause(cfg, model, good, 0)
    with torch.no_grad():
        model.weight[0, 0] = math.inf
    assert "weight is not finite" in likely_cause(cfg, model, good, 0)


def test_schedule_scales_with_the_number_of_processes(cfg):
    cfg.merge_from_list(
        ["SOLVER.IMS_PER_BATCH", 16, "SOLVER.BASE_LR", 0.16, "SOLVER.MAX_ITER", 100]
        + ["SOLVER.STEPS", (60, 80, 100), "SOLVER.REFERENCE_WORLD_SIZE", 8]
    )
    scaled = scale_schedule(cfg, 2)
    assert (scaled.SOLVER.IMS_PER_BATCH, scaled.SOLVER.MAX_ITER) == (4, 400)
    assert pytest.approx(0.04) == scaled.SOLVER.BASE_LR
    line = describe_schedule(scaled, 2, seed=1, images=160)
    assert "400 iterations x 4 images (2 on each of 2 processes, cuda) = 10 epochs" in line
    assert "at 240, 320, warm-up" in line and "\n" not in line
    cfg.merge_from_list(["SOLVER.REFERENCE_WORLD_SIZE", 1, "TEST.EVAL_PERIOD", 4])
    assert scale_schedule(cfg, 16).TEST.EVAL_PERIOD == 1  # 0 would mean no evaluation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["SOLVER.IMS_PER_BATCH", 3], "does not divide among 2"),
        (["SOLVER.IMS_PER_BATCH", 4, "SOLVER.REFERENCE_WORLD_SIZE", 3], "REFERENCE_WORLD_SIZE 3"),
        (["SOLVER.MAX_ITER", 0], "MAX_ITER is 0"),
        (["SOLVER.CHECKPOINT_PERIOD", 0], "CHECKPOINT_PERIOD is 0"),
    ],
)
def test_impossible_schedules_are_named(cfg, options, message):
    cfg.merge_from_list(options)
    with pytest.raises(UserError, match=message):
        scale_schedule(cfg, 2)
