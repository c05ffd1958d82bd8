"""Properties of all registered encoders and decoders.

A newly registered class needs a row in `ENCODERS` or `DECODERS`.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.utils import comm
from helpers import batch_pyramid, random_levels, shake
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dynamic_detr import DECODER_REGISTRY, ENCODER_REGISTRY, Pyramid, add_dynamic_detr_config
from dynamic_detr.cli.launch import launch
from dynamic_detr.decoders import denoising
from dynamic_detr.engine.build import distribute
from dynamic_detr.losses import SetCriterion

CHANNELS, CLASSES, QUERIES = 16, 3, 6
SMALL = {  # values of the keys with these names in all nodes
    "BLOCKS": ["intra", "multi"],
    "NUM_GROUPS": 4,
    "NUM_HEADS": 2,
    "NUM_POINTS": 2,
    "NUM_QUERIES": QUERIES,
    "FFN_DIM": 24,
    "DYNAMIC_DIM": 4,
    "POOLING_SIZE": 2,
    "CANONICAL_SIZE": 60,
    "INITIAL_BOXES": "grid",
}
DEPTHS = ("NUM_BLOCKS", "NUM_LAYERS", "NUM_STAGES")
FIXED_LEVELS = ("DynamicEncoder", "Deformable", "SMCA")  # prefixes of classes with num_levels
# more queries than the smallest image of SIZES has positions
RESIDUAL = {"RESIDUAL": True}
TWO_STAGE = {"REFINE_BOXES": True, "TWO_STAGE": True, "NUM_QUERIES": 20}
ATTENTIONS = ("SCALE", "SPATIAL", "CHANNEL")
STRIDES = (8, 16, 32)
FEATURES = {8: "p3", 16: "p4", 32: "p5"}


@dataclass(frozen=True)
class Row:
    """A registered class and the options it is tested with.

    Args:
        name: name in its registry.
        options: values of keys of its node, besides `SMALL`.
        class_head: class head of the detector.
        padded: whether results are invariant to padding.
        one_level: whether it works on one level.
    """

    name: str
    options: dict = field(default_factory=dict)
    class_head: str = "focal"
    padded: bool = True
    one_level: bool = True

    def __str__(self) -> str:
        options = [f"{key}={value}" for key, value in self.options.items()]
        return "-".join([self.name, *options, *[self.class_head] * (self.class_head != "focal")])

    @property
    def node(self) -> str:
        """Return the name of its config node, DYNAMIC_ENCODER for a DynamicEncoder."""
        kind = "Encoder" if self.name.endswith("Encoder") else "Decoder"
        return f"{self.name.removesuffix(kind).upper()}_{kind.upper()}"


ENCODERS = [
    Row("DynamicEncoder"),
    Row("DynamicEncoder", {"OFFSETS": "legacy"}, padded=False),
    *(Row("DynamicEncoder", {f"{kind}_ATTENTION": False}) for kind in ATTENTIONS),
    Row("DynamicEncoder", RESIDUAL),
    Row("IdentityEncoder"),
    Row("TransformerEncoder"),
    Row("DeformableEncoder"),
    Row("DeformableEncoder", {"MULTI_SCALE": False}),
    Row("SMCAEncoder"),
    Row("SMCAEncoder", {"SHARED": "nothing"}),
]
DECODERS = [
    Row("DynamicDecoder"),
    Row("DynamicDecoder", {"DYNAMIC_FILTER": "residual"}),
    Row("DynamicDecoder", {"DYNAMIC_FILTER": "single"}),
    Row("DynamicDecoder", {"CLASSIFY_TRUE_BOXES": True, "NOISED_BOXES": 6}),
    Row("TransformerDecoder", class_head="softmax"),
    Row("TransformerDecoder", {"IN_FEATURES": ["p5"]}),
    Row("DeformableDecoder"),
    Row("DeformableDecoder", {"REFINE_BOXES": True}),
    Row("DeformableDecoder", TWO_STAGE, one_level=False),
    Row("SMCADecoder"),
    Row("SMCADecoder", {"SCALE_SELECTION": False}),
]
ROWS = [*ENCODERS, *DECODERS]
all_rows = pytest.mark.parametrize("row", ROWS, ids=str)


def config(
    row: Row, strides: tuple[int, ...], depth: int, dropout: float = 0.0, recompute: bool = False
) -> CfgNode:
    cfg = get_cfg()
    add_dynamic_detr_config(cfg)
    detector = cfg.MODEL.SET_DETECTOR
    detector.HIDDEN_DIM, detector.NUM_CLASSES = CHANNELS, CLASSES
    detector.CLASS_HEAD = row.class_head
    detector.IN_FEATURES = [FEATURES[stride] for stride in strides]
    detector.ACTIVATION_CHECKPOINT.ENCODER = recompute
    detector.ACTIVATION_CHECKPOINT.DECODER = recompute
    small = {**SMALL, "DROPOUT": dropout, **dict.fromkeys(DEPTHS, depth)}
    for key in cfg.MODEL.get(row.node, ()):
        cfg.MODEL[row.node][key] = small.get(key, cfg.MODEL[row.node][key])
    for key, value in row.options.items():
        assert key in cfg.MODEL[row.node], key
        cfg.MODEL[row.node][key] = value
    return cfg


def build(
    row: Row, strides: tuple[int, ...] = STRIDES, depth: int = 2, **options: object
) -> nn.Module:
    """Build the encoder or decoder, with noise added to all initial values."""
    registry = ENCODER_REGISTRY if row in ENCODERS else DECODER_REGISTRY
    torch.manual_seed(0)
    return shake(registry.get(row.name)(config(row, strides, depth, **options)), 0.2)


def batch(
    sizes: list[tuple[int, int]],
    padded: tuple[int, int],
    garbage: float = 1.0,
    strides: tuple[int, ...] = STRIDES,
    dtype: torch.dtype = torch.float64,
) -> Pyramid:
    """Return the pyramid of a batch; the features of an image depend only on its size."""
    images = []
    for height, width in sizes:
        torch.manual_seed(1000 * height + width)
        levels = random_levels((height, width), CHANNELS, strides)
        images.append([level.to(dtype) for level in levels])
    return batch_pyramid(images, sizes, padded, strides, garbage)


def trained(part: nn.Module, pyramid: Pyramid) -> object:
    """Call a part as in training, with the same noise each time; image i has i + 1 true boxes."""
    if not getattr(part, "needs_true_boxes", False):
        return part(pyramid)
    device, images = pyramid.features[0].device, len(pyramid.image_sizes)
    boxes = [torch.linspace(0.3, 0.6, 4 * (i + 1), device=device) for i in range(images)]
    torch.manual_seed(0)
    return part(pyramid, [b.view(-1, 4) for b in boxes])


def results(found: object) -> list[Tensor]:
    """Return the tensors of a pyramid or of predictions."""
    if isinstance(found, Pyramid):
        return list(found.features)
    names = ("pred_logits", "pred_boxes", "true_logits", "noised_boxes")
    tensors = [getattr(prediction, name) for prediction in found for name in names]
    return [tensor for tensor in tensors if tensor is not None]


def objective(found: object) -> Tensor:
    """Return a scalar that depends on all results; boxes of proposals may be infinite."""
    return sum(r.where(r.isfinite(), 0).square().sum() for r in results(found))


def gradients(part: nn.Module, found: object) -> dict[str, Tensor]:
    named = dict(part.named_parameters())
    if not named:
        return {}
    grads = torch.autograd.grad(objective(found), list(named.values()), allow_unused=True)
    return dict(zip(named, grads, strict=True))


def assert_gradients_close(
    found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float
) -> None:
    """Compare gradients by name; the tolerance is relative to the largest entry, or to 1."""
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        atol = tolerance * max(1.0, grad.abs().max().item())
        torch.testing.assert_close(
            found[name], grad, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def results_of_image(found: object, image: int, pyramid: Pyramid) -> list[Tensor]:
    """Return the results of one image of a batch, without those of the padding."""
    valid = pyramid.valid_table()[image]
    if isinstance(found, Pyramid):
        return [found.table()[image][valid]]
    return [
        tensor[image][valid] if prediction.is_proposal else tensor[image]
        for prediction in found
        for tensor in (prediction.pred_logits, prediction.pred_boxes)
    ]


def test_every_registered_class_has_a_row():
    for rows, registry in ((ENCODERS, ENCODER_REGISTRY), (DECODERS, DECODER_REGISTRY)):
        assert {row.name for row in rows} == {name for name, _ in registry}


SIZES = [(100, 136), (64, 190), (65, 1)]


@all_rows
def test_padding_is_invisible(row):
    """Results and gradients of a batch are those of its images, for any content of the padding."""
    part = build(row).double()
    images = [batch([size], size) for size in SIZES]
    alone = [part(image) for image in images]
    wanted = [results_of_image(found, 0, image) for found, image in zip(alone, images, strict=True)]
    wanted_grads = [gradients(part, found) for found in alone]
    for garbage in (30.0, float("inf")) if row.padded else (30.0,):
        pyramid = batch(SIZES, (128, 224), garbage)
        if row in DECODERS:  # encoders return zeros in the padding
            pyramid = pyramid.masked()
        together = part(pyramid)
        found = [results_of_image(together, image, pyramid) for image in range(len(SIZES))]
        if not row.padded:  # also shows that the comparison can fail
            with pytest.raises(AssertionError, match="not close"):
                torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
            return
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        if isinstance(together, Pyramid):  # zeros in the padding
            for level in range(len(together)):
                beyond = ~together.valid_mask(level)
                assert not together.features[level].masked_select(beyond).any()
        totals = {name: sum(grads[name] for grads in wanted_grads) for name in wanted_grads[0]}
        assert_gradients_close(gradients(part, together), totals, 1e-8)


@all_rows
@pytest.mark.parametrize("strides", [STRIDES, STRIDES[-1:]], ids=["levels", "one"])
def test_every_parameter_learns(row, strides):
    if len(strides) == 1 and not row.one_level:
        with pytest.raises(ValueError, match=f"^MODEL.{row.node}.*one level|levels"):
            build(row, strides)
        return
    part = build(row, strides)
    pyramid = batch([(128, 190), (64, 64)], (128, 192), 0.0, strides, torch.float32)
    found = trained(part, pyramid)
    for name, grad in gradients(part, found).items():
        assert grad is not None and grad.isfinite().all(), name
        # with one level, the ReLU of the scale attention is zero for the only map
        assert grad.any() or (len(strides) == 1 and ".scale." in name), name


@all_rows
def test_precisions(row):
    """Results in float32 and bfloat16 are close to float64; boxes are at least float32."""
    part, sizes, padded = build(row), [(100, 136), (64, 190)], (128, 192)
    exact = results(trained(copy.deepcopy(part).double(), batch(sizes, padded)))
    assert all(result.dtype == torch.float64 for result in exact)
    pyramid = batch(sizes, padded, dtype=torch.float32)
    kinds = [("cpu", torch.float32), ("cpu", torch.bfloat16)]
    kinds += [("cuda", torch.float16), ("cuda", torch.bfloat16)] * torch.cuda.is_available()
    for device, dtype in kinds:
        part = part.to(device)
        moved = Pyramid(
            [f.to(device) for f in pyramid.features], STRIDES, pyramid.image_sizes.to(device)
        )
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            found = trained(part, moved)
        if isinstance(found, Pyramid):  # RESIDUAL does not change the dtype
            assert dtype in (torch.float32, found.features[0].dtype) or row.options != RESIDUAL
        if not isinstance(found, Pyramid):
            assert all(p.pred_boxes.dtype == p.pred_logits.dtype == torch.float32 for p in found)
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        # rounding may select other proposals
        two_stage = row.options.get("TWO_STAGE") and dtype != torch.float32
        for result, wanted in zip(results(found), exact, strict=True):
            if not two_stage:
                scale = wanted.where(wanted.isfinite(), 0).abs().max().clamp(min=1).item()
                difference = (result.cpu().double() - wanted).nan_to_num(posinf=0)
                assert difference.square().mean().sqrt() < tolerance * scale, (device, dtype)
        for name, grad in gradients(part, found).items():
            assert grad.isfinite().all(), (name, device, dtype)


@all_rows
def test_activation_checkpointing_changes_nothing(row):
    """Fewer tensors are kept for the same results and gradients, with dropout."""
    found, kept = [], []

    def keep(tensor: Tensor) -> Tensor:
        kept[-1] += 1
        return tensor

    for recompute in (False, True):
        part = build(row, dropout=0.3, recompute=recompute)
        pyramid = batch([(100, 136), (64, 190)], (128, 192), 0.0, dtype=torch.float32)
        kept.append(0)
        torch.manual_seed(1)  # of dropout
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = trained(part, pyramid)
        found.append([*results(output), *gradients(part, output).values()])
    torch.testing.assert_close(*found)
    assert kept[1] < 0.6 * kept[0] or row.name == "IdentityEncoder", kept


@pytest.mark.parametrize("row", [r for r in ROWS if r.name.startswith(FIXED_LEVELS)], ids=str)
def test_wrong_number_of_levels_raises(row):
    part = build(row)
    with pytest.raises(ValueError, match="expected a pyramid of num_levels = 3 levels, got 2"):
        part(batch([(64, 64)], (64, 64), 0.0, STRIDES[:2], torch.float32))


@pytest.mark.parametrize(
    "row", [pytest.param(r, marks=[pytest.mark.long] * bool(r.options)) for r in ROWS], ids=str
)
def test_is_one_graph_for_all_true_sizes(row, nothing_compiled):
    """Forward and backward, traced by torch.compile."""
    part = build(row, strides := STRIDES[1:], depth=1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(part, fullgraph=True, backend=counter)
    for sizes in ([(64, 96), (40, 62)], [(18, 96), (64, 34)]):
        pyramids = [batch(sizes, (64, 96), 1.0, strides, torch.float32) for _ in range(2)]
        found, wanted = compiled(pyramids[0]), part(pyramids[1])
        torch.testing.assert_close(results(found), results(wanted), rtol=1e-3, atol=1e-4)
        assert_gradients_close(gradients(part, found), gradients(part, wanted), 1e-3)
    assert counter.frame_count == 1


class Trained(nn.Module):
    """An encoder or decoder completed to a model with a loss."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        encoder = row in ENCODERS
        self.encoder = build(row if encoder else Row("IdentityEncoder"))
        self.decoder = build(row if not encoder else Row("DynamicDecoder"))
        self.criterion = SetCriterion.from_config(config(row, STRIDES, depth=2))

    def forward(self, pyramid: Pyramid, targets: list) -> Tensor:
        extra = [boxes for _, boxes in targets]
        extra = [extra] if getattr(self.decoder, "needs_true_boxes", False) else []
        return sum(self.criterion(self.decoder(self.encoder(pyramid), *extra), targets).values())


def targets_of(sizes: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
    """Return one object for the first image, two for the second, and so on."""
    torch.manual_seed(0)
    boxes = [0.3 + 0.3 * torch.rand(1 + image, 4) for image in range(len(sizes))]
    return [(torch.arange(len(b)) % CLASSES, b) for b in boxes]


@pytest.mark.parametrize("row", [row for row in ROWS if row.padded], ids=str)
def test_losses_do_not_depend_on_the_padding(row):
    model, size, losses, grads = Trained(row).double(), SIZES[0], [], []
    for padded in (size, (128, 224)):
        losses.append(model(batch([size], padded, 10.0), targets_of([size])))
        named = dict(model.named_parameters())
        found = torch.autograd.grad(losses[-1], list(named.values()))
        grads.append(dict(zip(named, found, strict=True)))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)  # losses are in float32
    assert_gradients_close(*grads, 1e-5)


@all_rows
def test_images_without_objects_give_gradients(row):
    model = Trained(row)
    pyramid = batch([(64, 100)], (128, 128), 0.0, dtype=torch.float32)
    model(pyramid, [(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def step(row: Row, images: slice) -> dict[str, Tensor]:
    """Return gradients of the losses of some of `SIZES`, averaged over the processes.

    Copies are without noise, because random numbers depend on the process. Process 0 sends its
    weights to the others.
    """
    model = Trained(row).double()
    model = distribute(model if comm.is_main_process() else shake(model))
    with mock.patch.multiple(denoising, SHIFT=0.0, LOG_SCALE=0.0):
        model(batch(SIZES[images], (128, 224)), targets_of(SIZES)[images]).backward()
    return {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}


def steps_in_this_process(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = comm.get_rank()
    images = slice(0, 1) if rank == 0 else slice(1, None)
    grads = {str(row): step(row, images) for row in ROWS if row.padded}
    if rank == 0:
        torch.save(grads, folder / "gradients.pth")


def test_two_processes_take_the_step_of_one_with_the_whole_batch(tmp_path):
    launch(steps_in_this_process, 2, on_gpu=False, args=(tmp_path,))
    found = torch.load(tmp_path / "gradients.pth")
    for row in ROWS:
        if row.padded:
            assert_gradients_close(found[str(row)], step(row, slice(None)), 1e-5)
