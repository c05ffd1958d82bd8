"""Reading images of all formats, and drawing detections, sheets and stages."""

import numpy as np
import pytest
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dynamic_detr import Prediction
from dynamic_detr.errors import UserError
from dynamic_detr.visualization import (
    contact_sheet,
    draw,
    draw_detections,
    draw_stages,
    read_image,
    write_image,
)
from dynamic_detr.visualization.draw import class_names, color
from dynamic_detr.visualization.files import find_images, output_paths
from dynamic_detr.visualization.stages import PANEL, follow_queries

RED, GREY, WHITE = (255, 0, 0), (128, 128, 128), (255, 255, 255)


def instances(size, boxes, scores=None, classes=None) -> Instances:
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    count = len(boxes)
    return Instances(
        size,
        pred_boxes=Boxes(boxes),
        scores=torch.tensor(scores) if scores else torch.ones(count),
        pred_classes=torch.tensor(classes) if classes else torch.zeros(count, dtype=torch.int64),
    )


def save_of_mode(path, mode: str, **options) -> None:
    """Save an image of 6 × 4 pixels, red if the mode has colours, else grey."""
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 6), 128 * 257, np.uint16))
    elif mode == "F":
        image = Image.fromarray(np.full((4, 6), 128 / 255, np.float32))
    elif mode in ("L", "LA"):
        image = Image.new("RGB", (6, 4), GREY).convert(mode)
    else:
        image = Image.new("RGB", (6, 4), RED).convert(mode)
    assert image.mode == mode
    image.save(path, **options)


@pytest.mark.parametrize(
    ("mode", "name", "expected"),
    [
        ("RGB", "a.png", RED),
        ("RGBA", "a.png", RED),
        ("P", "a.png", RED),
        ("P", "a.gif", RED),
        ("L", "a.png", GREY),
        ("LA", "a.png", GREY),
        ("I;16", "a.png", GREY),
        ("I;16", "a.tif", GREY),
        ("F", "a.tif", GREY),
        ("RGB", "a.bmp", RED),
        ("RGB", "a.tiff", RED),
        ("RGB", "a.webp", RED),
        ("RGB", "a.jpg", RED),
        ("L", "a.jpg", GREY),
        ("CMYK", "a.jpg", RED),
        ("CMYK", "a.tif", RED),
    ],
)
def test_pictures_of_every_kind_are_read_as_rgb(tmp_path, mode, name, expected):
    options = {"lossless": True} if name.endswith("webp") else {}
    save_of_mode(tmp_path / name, mode, **options)
    image = read_image(tmp_path / name)
    assert image.shape == (4, 6, 3)
    assert image.dtype == np.uint8
    assert image.flags.writeable
    assert np.abs(image.astype(int) - expected).max() <= 3  # JPEG loses a little


def test_one_bit_pictures_are_black_and_white(tmp_path):
    pixels = np.array([[0, 255], [255, 0]], np.uint8)
    Image.fromarray(pixels).convert("1").save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png")[..., 0] == pixels).all()


def test_transparent_pixels_are_white(tmp_path):
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (2, 2), (255, 0, 0, 128)).save(tmp_path / "half.png")
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, *RED])
    palette.save(tmp_path / "palette.png", transparency=1)
    assert (read_image(tmp_path / "clear.png") == WHITE).all()
    assert np.abs(read_image(tmp_path / "half.png") - np.array([255, 127, 127])).max() <= 1
    assert (read_image(tmp_path / "palette.png") == WHITE).all()


def test_values_without_a_known_white_are_scaled_to_their_range(tmp_path):
    values = np.array([[-100.0, 0.0, np.nan], [70000.0, 200000.0, 300000.0]], np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    grey = read_image(tmp_path / "a.tif")[..., 0]
    assert grey.min() == 0
    assert grey.max() == 255
    assert grey[0, 2] == grey[0, 1]  # NaN is read as 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = np.zeros((4, 6, 3), np.uint8)
    upright[:2, :3] = RED  # upper left quarter
    # The inverse of the EXIF transformation.
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = Image.fromarray(upright)
    stored = stored if undo is None else stored.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert (read_image(tmp_path / "a.png") == upright).all()


def test_damaged_exif_does_not_matter(tmp_path):
    Image.new("RGB", (6, 4), RED).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00garbage" * 3)
    assert read_image(tmp_path / "a.jpg").shape == (4, 6, 3)


def test_files_that_are_no_pictures_are_named(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").touch()
    for name in ("cut.jpg", "text.png", "empty.png", "missing.png", "."):
        with pytest.raises(UserError, match=str((tmp_path / name).name)):
            read_image(tmp_path / name)


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 40)
    assert read_image(tmp_path / "a.png").shape == (64, 64, 3)  # the limit is twice this number
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 20)
    with pytest.raises(UserError, match="too large"):
        read_image(tmp_path / "a.png")


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_image(tmp_path / "file" / "a.png", np.zeros((2, 2, 3), np.uint8))


def test_inputs_are_files_folders_and_patterns(tmp_path):
    for name in ("b.PNG", "a.jpg", "note.txt", ".hidden.png", "in/c.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "odd[1].png").touch()

    def names(*inputs):
        return [str(path.relative_to(tmp_path)) for path in find_images(map(str, inputs))]

    assert names(tmp_path) == ["a.jpg", "b.PNG", "odd[1].png"]
    assert names(tmp_path / "note.txt") == ["note.txt"]  # with any suffix
    assert names(tmp_path / "*.jpg", tmp_path / "in") == ["a.jpg", "in/c.png"]
    assert names(tmp_path / "**" / "*.png") == ["in/c.png", "odd[1].png"]
    assert names(tmp_path / "odd[1].png") == ["odd[1].png"]
    assert names(tmp_path / "a.jpg", tmp_path) == ["a.jpg", "b.PNG", "odd[1].png"]
    (tmp_path / "void").mkdir()
    for nothing, why in (("no.png", "not exist"), ("*.webp", "no file"), ("void", "no images")):
        with pytest.raises(UserError, match=why):
            names(tmp_path / nothing)


def test_output_names_are_kept_apart(tmp_path):
    inputs = [tmp_path / name for name in ("x/a.jpg", "y/a.jpg", "y/A.JPG", "y/a.tif", "y/a.png")]
    paths = output_paths(inputs, str(tmp_path / "out"))
    assert [path.name for path in paths] == ["a.jpg", "a_2.jpg", "A_3.JPG", "a.png", "a_2.png"]
    assert all(path.parent == tmp_path / "out" for path in paths)


def test_inputs_are_never_overwritten(tmp_path):
    (tmp_path / "a.jpg").touch()
    assert output_paths([tmp_path / "a.jpg"], str(tmp_path)) == [tmp_path / "a_2.jpg"]
    with pytest.raises(UserError, match="overwrite"):
        output_paths([tmp_path / "a.jpg"], str(tmp_path / "a.jpg"))


def test_output_may_be_one_file(tmp_path):
    inputs = [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    assert output_paths(inputs[:1], str(tmp_path / "new.png")) == [tmp_path / "new.png"]
    with pytest.raises(UserError, match="one file for 2 images"):
        output_paths(inputs, str(tmp_path / "new.png"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="neither"):
        output_paths(inputs, str(tmp_path / "file"))


def test_detections_are_drawn_where_they_are():
    image = np.full((300, 400, 3), 128, np.uint8)
    found = instances((300, 400), [[100, 50, 300, 250], [10, 10, 30, 30]], [0.9, 0.3], [1, 0])
    drawing = draw_detections(image, found, Metadata(thing_classes=["cat", "dog"]))
    assert drawing.shape == image.shape
    changed = (drawing != image).any(axis=2)
    assert changed[150, 98:103].any()  # left edge
    assert not changed[5:40, 5:40].any()  # below the threshold
    assert not changed[100:200, 150:250].any()  # inside
    edge = drawing[150, 99:102].astype(float) / 255
    assert np.abs(edge - color(1)).sum(axis=1).min() < 0.1


def test_masks_and_keypoints_are_drawn_in_the_size_of_the_picture():
    image = np.full((100, 120, 3), 128, np.uint8)
    found = instances((100, 120), [[20, 10, 100, 90]])
    found.pred_masks = torch.zeros(1, 100, 120, dtype=torch.bool)
    found.pred_masks[0, 30:70, 40:80] = True
    found.pred_keypoints = torch.tensor([[[60.0, 20.0, 1.0]]])
    names = Metadata(keypoint_names=["nose"], keypoint_connection_rules=[])
    drawing = draw_detections(image, found, names)
    assert drawing.shape == image.shape
    assert (drawing[40:60, 50:70] != 128).any(axis=2).all()  # inside the mask
    assert (drawing[18:23, 58:63] != 128).any()  # the nose


def test_the_same_detections_give_the_same_drawing():
    image = np.full((300, 400, 3), 128, np.uint8)
    found = instances((300, 400), [[100, 50, 300, 250]])
    assert (draw_detections(image, found) == draw_detections(image, found)).all()


def test_nothing_found_leaves_the_picture_as_it_is():
    image = np.random.randint(0, 256, (300, 400, 3), np.uint8)
    assert (draw_detections(image, instances((300, 400), [])) == image).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (128, 128), (1, 3000), (130, 257)])
def test_small_pictures_are_enlarged_so_that_labels_can_be_read(size):
    image = np.full((*size, 3), 128, np.uint8)
    drawing = draw_detections(image, instances(size, [[0, 0, size[1], size[0]]]))
    factor = drawing.shape[1] / size[1]
    assert drawing.shape == (size[0] * factor, size[1] * factor, 3)
    assert factor == (1 if max(size) > 256 else -(-512 // max(size)))


def test_huge_pictures_are_drawn_smaller():
    image = np.full((2, 20000, 3), 128, np.uint8)
    assert draw_detections(image, instances((2, 20000), [[0, 0, 9, 2]])).shape == (1, 8192, 3)


def test_labels_stay_inside_the_picture():
    image = np.full((300, 400, 3), 128, np.uint8)
    names = Metadata(thing_classes=["a rather long name of a class"])
    drawing = draw_detections(image, instances((300, 400), [[370, 100, 400, 300]]), names)
    left_of_box = (drawing[100:140, 200:365] != image[100:140, 200:365]).any(axis=(0, 2))
    assert left_of_box.sum() > 100  # the label reaches to the left instead of being cut off


def test_names_are_drawn_as_they_are():
    image = np.full((300, 400, 3), 128, np.uint8)
    found = instances((300, 400), [[50, 50, 300, 250]])
    formula, invalid = (Metadata(thing_classes=[name]) for name in ("$aa$", "a_$x^{$"))
    assert (draw_detections(image, found, invalid) != image).any()
    plain = draw_detections(image, found, Metadata(thing_classes=["aa"]))
    assert (draw_detections(image, found, formula) != plain).any()


def test_classes_without_a_name_are_numbered():
    assert class_names(Metadata(thing_classes=["cat"]), [0, 3]) == ["cat", "class 3"]
    assert class_names(None, [2]) == ["class 2"]


@given(st.integers(0, 500))
def test_neighbouring_colours_differ(index):
    assert np.abs(np.subtract(color(index), color(index + 1))).max() > 0.25


def predictions_of_three_stages() -> list[Prediction]:
    """Four queries, two classes: query 2 ends at 0.9, query 0 at 0.6, the others below a half."""
    final = torch.tensor([[0.6, 0.1], [0.2, 0.3], [0.1, 0.9], [0.1, 0.1]])
    stages = [Prediction(torch.full((1, 9, 2), 5.0), torch.rand(1, 9, 4), is_proposal=True)]
    for number in range(3):
        logits = final.logit() - (2 - number)
        boxes = torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(4, 1)
        boxes[:, 2:] *= 1 - 0.3 * number
        boxes[0, 2:] *= 0.5
        boxes[1] = torch.nan if number else boxes[1]
        stages.append(Prediction(logits[None], boxes[None]))
    return stages


def test_queries_are_followed_from_the_last_stage_back():
    stages = follow_queries(predictions_of_three_stages(), (100, 200), "focal")
    assert [stage.queries.tolist() for stage in stages] == [[2, 0]] * 3  # proposals are left out
    assert stages[-1].pred_classes.tolist() == [1, 0]
    assert stages[-1].scores.tolist() == pytest.approx([0.9, 0.6])
    assert stages[0].scores.tolist() != stages[-1].scores.tolist()
    assert stages[0].pred_boxes.tensor[0].tolist() == [0, 0, 200, 100]
    assert stages[2].pred_boxes.tensor[0].tolist() == pytest.approx([60, 30, 140, 70])


def test_followed_queries_are_limited_and_finite():
    predictions = predictions_of_three_stages()
    assert follow_queries(predictions, (100, 200), "focal", limit=1)[0].queries.tolist() == [2]
    followed = follow_queries(predictions, (100, 200), "focal", threshold=0.0)
    assert sorted(followed[0].queries.tolist()) == [0, 2, 3]  # query 1 has boxes of NaN


@pytest.mark.parametrize(("threshold", "kept"), [(1.0, [1, 0, 2]), (0.7, [1, 0, 2]), (0.5, [1, 2])])
def test_duplicates_are_not_followed(threshold, kept):
    """Query 0 has the class of query 1 and an IoU of 0.6; query 2 has another class."""
    logits = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 0.5]]])
    boxes = torch.tensor([[[0.6, 0.4, 0.4, 0.4], [0.5, 0.4, 0.4, 0.4], [0.5, 0.4, 0.4, 0.4]]])
    prediction = Prediction(logits, boxes)
    stages = follow_queries([prediction] * 2, (50, 90), "focal", nms_threshold=threshold)
    assert [stage.queries.tolist() for stage in stages] == [kept] * 2


def test_softmax_leaves_out_no_object():
    logits = torch.tensor([[[0.0, 3.0, 0.0], [0.0, 0.0, 9.0]]])
    prediction = Prediction(logits, torch.full((1, 2, 4), 0.5))
    (stage,) = follow_queries([prediction], (10, 10), "softmax", threshold=0.5)
    assert stage.queries.tolist() == [0]
    assert stage.pred_classes.tolist() == [1]


@pytest.mark.parametrize("size", [(60, 100), (500, 400), (1000, 2000)])
def test_stages_stand_side_by_side(size):
    image = np.full((*size, 3), 128, np.uint8)
    stages = follow_queries(predictions_of_three_stages(), size, "focal")
    drawing = draw_stages(image, stages)
    longest = min(max(*size, PANEL[0]), PANEL[1])
    width, height = (round(side * longest / max(size)) for side in size[::-1])
    gap = 8
    assert drawing.shape[1] == 3 * width + 4 * gap
    assert height + 2 * gap < drawing.shape[0] <= height + 2 * gap + 48  # a line of titles
    # The same query has the same colour at every stage: each panel holds a line of it.
    for number in range(3):
        panel = drawing[:, gap + number * (width + gap) : (number + 1) * (width + gap)]
        distance = np.abs(panel.reshape(-1, 3) / 255 - np.array(color(0))).sum(axis=1)
        assert (distance < 0.05).sum() > 100


def test_stages_without_a_detection_are_drawn_too():
    stages = follow_queries(predictions_of_three_stages(), (60, 100), "focal", threshold=0.99)
    assert draw_stages(np.zeros((60, 100, 3), np.uint8), stages).shape[1] == 3 * 384 + 4 * 8


def test_sheets_have_rows_and_columns_and_titles():
    images = [np.full((20, 30, 3), shade, np.uint8) for shade in (0, 60, 120)]
    sheet = contact_sheet(images, 2)
    assert sheet.shape == (2 * 20 + 3 * 8, 2 * 30 + 3 * 8, 3)
    assert (sheet[8:28, 46:76] == 60).all()
    assert (sheet[36:56, 8:38] == 120).all()
    assert (sheet[36:, 46:] == 255).all()
    titled = contact_sheet(images, 2, ["one", "two", "a title that is far too long for its place"])
    assert titled.shape[0] > sheet.shape[0]
    assert titled.shape[1] == sheet.shape[1]
    assert (titled[8:30] < 100).any()


@pytest.mark.parametrize(
    ("count", "columns", "titles"), [(0, 2, None), (2, 0, None), (2, 2, ["a"])]
)
def test_impossible_sheets_are_refused(count, columns, titles):
    with pytest.raises(ValueError, match="^expected .* images"):
        contact_sheet([np.zeros((2, 2, 3), np.uint8)] * count, columns, titles)


def test_labels_do_not_cover_each_other(monkeypatch):
    """The drawn labels of six objects in one place do not overlap."""
    drawn = []
    arrange = draw._arrange

    def spy(texts, renderer, size):
        arrange(texts, renderer, size)
        drawn.extend(text.get_window_extent(renderer) for text in texts)

    monkeypatch.setattr(draw, "_arrange", spy)
    boxes = [[100 + 2 * k, 100 + 3 * k, 250, 250] for k in range(6)]
    draw_detections(np.full((300, 400, 3), 128, np.uint8), instances((300, 400), boxes))
    assert len(drawn) == 6
    for number, extent in enumerate(drawn):
        assert extent.y0 >= 0 and extent.y1 <= 300
        assert not any(extent.overlaps(other) for other in drawn[:number])
