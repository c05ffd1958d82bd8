"""What holds for every encoder and every decoder that is registered, in one place.

A newly registered class is covered by a row of `ENCODERS` or `DECODERS`.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.utils import comm
from helpers import batch_pyramid, random_levels, shake
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dynamic_detr import DECODER_REGISTRY, ENCODER_REGISTRY, Pyramid, add_dynamic_detr_config
from dynamic_detr.cli.launch import launch
from dynamic_detr.engine.build import distribute
from dynamic_detr.losses import SetCriterion

CHANNELS, CLASSES, QUERIES = 16, 3, 6
SMALL = {  # values of the keys of these names, in whatever node they are
    "BLOCKS": ["intra", "multi"],
    "NUM_GROUPS": 4,
    "NUM_HEADS": 2,
    "NUM_POINTS": 2,
    "NUM_QUERIES": QUERIES,
    "FFN_DIM": 24,
    "DROPOUT": 0.0,
    "DYNAMIC_DIM": 4,
    "POOLING_SIZE": 2,
    "CANONICAL_SIZE": 60,
    "INITIAL_BOXES": "grid",
}
DEPTHS = ("NUM_BLOCKS", "NUM_LAYERS", "NUM_STAGES")
ATTENTIONS = ("SCALE", "SPATIAL", "CHANNEL")
STRIDES = (8, 16, 32)
FEATURES = {8: "p3", 16: "p4", 32: "p5"}


@dataclass(frozen=True)
class Row:
    """A registered class and the options it is tested with.

    Args:
        name: in its registry.
        options: keys of its node, beyond `SMALL`.
        class_head: of the detector.
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
        return "-".join([self.name, *options])

    @property
    def node(self) -> str:
        """MODEL.DYNAMIC_ENCODER of a DynamicEncoder."""
        kind = "Encoder" if self.name.endswith("Encoder") else "Decoder"
        return f"{self.name.removesuffix(kind).upper()}_{kind.upper()}"


ENCODERS = [
    Row("DynamicEncoder"),
    Row("DynamicEncoder", {"OFFSETS": "legacy"}, padded=False),
    *(Row("DynamicEncoder", {f"{kind}_ATTENTION": False}) for kind in ATTENTIONS),
    Row("IdentityEncoder"),
    Row("TransformerEncoder"),
    Row("DeformableEncoder"),
    Row("DeformableEncoder", {"MULTI_SCALE": False}),
    Row("SMCAEncoder"),
    Row("SMCAEncoder", {"SHARED": "nothing"}),
]
DECODERS = [
    Row("DynamicDecoder"),
    Row("DynamicDecoder", {"DYNAMIC_FILTER": "single"}),
    Row("DynamicDecoder", {"QUERIES": "dense"}),
    Row("TransformerDecoder", class_head="softmax"),
    Row("TransformerDecoder", {"IN_FEATURES": ["p5"]}),
    Row("DeformableDecoder"),
    Row("DeformableDecoder", {"REFINE_BOXES": True}),
    Row("DeformableDecoder", {"REFINE_BOXES": True, "TWO_STAGE": True}, one_level=False),
    Row("SMCADecoder"),
    Row("SMCADecoder", {"SCALE_SELECTION": False}),
]
ROWS = [*ENCODERS, *DECODERS]
all_rows = pytest.mark.parametrize("row", ROWS, ids=str)


def config(row: Row, strides: tuple[int, ...], depth: int) -> CfgNode:
    cfg = get_cfg()
    add_dynamic_detr_config(cfg)
    detector = cfg.MODEL.SET_DETECTOR
    detector.HIDDEN_DIM, detector.NUM_CLASSES = CHANNELS, CLASSES
    detector.CLASS_HEAD = row.class_head
    detector.IN_FEATURES = [FEATURES[stride] for stride in strides]
    small = {**SMALL, **dict.fromkeys(DEPTHS, depth)}
    for key in cfg.MODEL.get(row.node, ()):
        cfg.MODEL[row.node][key] = small.get(key, cfg.MODEL[row.node][key])
    for key, value in row.options.items():
        assert key in cfg.MODEL[row.node], key
        cfg.MODEL[row.node][key] = value
    return cfg


def build(row: Row, strides: tuple[int, ...] = STRIDES, depth: int = 2) -> nn.Module:
    """The encoder or decoder with every parameter away from where it starts."""
    registry = ENCODER_REGISTRY if row in ENCODERS else DECODER_REGISTRY
    torch.manual_seed(0)
    return shake(registry.get(row.name)(config(row, strides, depth)), 0.2)


def batch(
    sizes: list[tuple[int, int]],
    padded: tuple[int, int],
    garbage: float = 1.0,
    strides: tuple[int, ...] = STRIDES,
    dtype: torch.dtype = torch.float64,
) -> Pyramid:
    """Every size has an image of its own, the same wherever it appears."""
    images = []
    for height, width in sizes:
        torch.manual_seed(1000 * height + width)
        levels = random_levels((height, width), CHANNELS, strides)
        images.append([level.to(dtype) for level in levels])
    return batch_pyramid(images, sizes, padded, strides, garbage)


def results(found: object) -> list[Tensor]:
    """The tensors of a pyramid or of predictions."""
    if isinstance(found, Pyramid):
        return list(found.features)
    return [tensor for p in found for tensor in (p.pred_logits, p.pred_boxes)]


def objective(found: object) -> Tensor:
    """A number that every result has a say in; a proposal's box may be infinite."""
    return sum(r.where(r.isfinite(), 0).square().sum() for r in results(found))


def gradients(part: nn.Module, found: object) -> dict[str, Tensor]:
    named = dict(part.named_parameters())
    if not named:
        return {}
    grads = torch.autograd.grad(objective(found), list(named.values()), allow_unused=True)
    return dict(zip(named, grads, strict=True))


def said_of_image(found: object, image: int, pyramid: Pyramid) -> list[Tensor]:
    """What is said of one image of a batch; of positions, the true ones."""
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
    """A batch is its images, whatever fills the padding; so are its gradients."""
    part = build(row).double()
    images = [batch([size], size) for size in SIZES]
    alone = [part(image) for image in images]
    wanted = [said_of_image(found, 0, image) for found, image in zip(alone, images, strict=True)]
    wanted_grads = [gradients(part, found) for found in alone]
    for garbage in (30.0, float("inf")) if row.padded else (30.0,):
        pyramid = batch(SIZES, (128, 224), garbage)
        if row in DECODERS:  # which get what an encoder says
            pyramid = pyramid.masked()
        together = part(pyramid)
        said = [said_of_image(together, image, pyramid) for image in range(len(SIZES))]
        if not row.padded:  # which is why it is not the default; and this test can fail
            with pytest.raises(AssertionError, match="not close"):
                torch.testing.assert_close(said, wanted, rtol=1e-3, atol=1e-3)
            return
        torch.testing.assert_close(said, wanted, rtol=1e-9, atol=1e-9)
        if isinstance(together, Pyramid):  # zeros beyond the true sizes
            for level in range(len(together)):
                beyond = ~together.valid_mask(level)
                assert not together.features[level].masked_select(beyond).any()
        for name, grad in gradients(part, together).items():
            total = sum(grads[name] for grads in wanted_grads)
            tolerance = 1e-8 * max(1.0, total.abs().max().item())
            torch.testing.assert_close(grad, total, rtol=0, atol=tolerance, msg=name)


@all_rows
@pytest.mark.parametrize("strides", [STRIDES, STRIDES[-1:]], ids=["levels", "one"])
def test_every_parameter_learns(row, strides):
    if len(strides) == 1 and not row.one_level:
        with pytest.raises(ValueError, match=f"^MODEL.{row.node}.*one level|levels"):
            build(row, strides)
        return
    part = build(row, strides)
    found = part(batch([(128, 190), (64, 64)], (128, 192), 0.0, strides, torch.float32))
    for name, grad in gradients(part, found).items():
        assert grad is not None and grad.isfinite().all(), name
        # the ReLU of the scale attention is closed for the only map of a level
        assert grad.any() or (len(strides) == 1 and ".scale." in name), name


@all_rows
def test_precisions(row):
    """float32 and bfloat16 come near float64; boxes are never narrower than float32."""
    part, sizes, padded = build(row), [(100, 136), (64, 190)], (128, 192)
    exact = results(copy.deepcopy(part).double()(batch(sizes, padded)))
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
            found = part(moved)
        if not isinstance(found, Pyramid):
            assert all(p.pred_boxes.dtype == p.pred_logits.dtype == torch.float32 for p in found)
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        two_stage = row.options.get("TWO_STAGE") and dtype != torch.float32  # may choose others
        for result, wanted in zip(results(found), exact, strict=True):
            if not two_stage:
                scale = wanted.where(wanted.isfinite(), 0).abs().max().clamp(min=1).item()
                difference = (result.cpu().double() - wanted).nan_to_num(posinf=0)
                assert difference.square().mean().sqrt() < tolerance * scale, (device, dtype)
        for name, grad in gradients(part, found).items():
            assert grad.isfinite().all(), (name, device, dtype)


@pytest.fixture
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


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
        wanted_grads = gradients(part, wanted)
        for name, grad in gradients(part, found).items():
            tolerance = 1e-3 * max(1.0, wanted_grads[name].abs().max().item())
            torch.testing.assert_close(grad, wanted_grads[name], rtol=0, atol=tolerance, msg=name)
    assert counter.frame_count == 1


class Trained(nn.Module):
    """An encoder or decoder with what it lacks to a loss."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        encoder = row in ENCODERS
        self.encoder = build(row if encoder else Row("IdentityEncoder"))
        self.decoder = build(row if not encoder else Row("DynamicDecoder"))
        self.criterion = SetCriterion.from_config(config(row, STRIDES, depth=2))

    def forward(self, pyramid: Pyramid, targets: list) -> Tensor:
        return sum(self.criterion(self.decoder(self.encoder(pyramid)), targets).values())


def targets_of(sizes: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
    """One object in the first image, and one more in each that follows."""
    torch.manual_seed(0)
    boxes = [0.3 + 0.3 * torch.rand(1 + image, 4) for image in range(len(sizes))]
    return [(torch.arange(len(b)) % CLASSES, b) for b in boxes]


def step(row: Row, images: slice) -> dict[str, Tensor]:
    """Gradients of the losses of some of `SIZES`, averaged over the processes."""
    model = distribute(Trained(row).double())
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
            for name, wanted in step(row, slice(None)).items():
                tolerance = 1e-5 * max(1.0, wanted.abs().max().item())
                grad = found[str(row)][name]
                torch.testing.assert_close(
                    grad, wanted, rtol=0, atol=tolerance, msg=f"{row}: {name}"
                )
