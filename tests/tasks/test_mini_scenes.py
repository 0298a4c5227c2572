"""The embedded benchmark's renderer: exact bits, labels, boxes and masks."""

from __future__ import annotations

import ast
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from iasvit.errors import IasvitError
from tasks.mini import scenes, shapes, textures
from tasks.mini.scenes import CLASSES, SPLITS, Scene, render, render_images
from tasks.mini.textures import Dice

# After a deliberate change of the scenes: `python tests/tasks/test_mini_scenes.py` prints the new values. Raise
# scenes.VERSION, which stored rows are told apart by, and VERSION here. The checkpoints of the mini zoo were trained on
# the old scenes, so they go with them.
VERSION = 1  # of the scenes with these checksums
CLASSIFICATION = {
    ("train", 56): "fddbacbc4a247904",
    ("train", 128): "1579ec1fca86314e",
    ("calibration", 56): "52a5c165dd8e6ea2",
    ("calibration", 128): "9ee1b194f78f64f2",
    ("val", 56): "c053eef93ec8cfb9",
    ("val", 128): "72002d5aeb257a69",
}
DETECTION = {
    ("train", 128): "6eb1e628b792b0c6",
    ("calibration", 128): "51d479458b9660ef",
    ("val", 128): "51dd8d9c33e3ddad",
}


def digest(*arrays: np.ndarray) -> str:
    """sha256 of the arrays' values, little-endian, cut to 16 hex digits."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes())
    return sha.hexdigest()[:16]


def classification_digest(split: str, size: int) -> str:
    """Of images 0-31 and of five with a large index, so that most shapes and textures take part."""
    return digest(*render_images(split, 0, 32, size), *render_images(split, 10**12, 5, size))


def detection_digest(split: str, size: int) -> str:
    parts: list[np.ndarray] = []
    for index in range(12):
        scene = render(split, index, size, objects=(1, 10))
        parts += [scene.image, scene.classes, scene.boxes, scene.masks]
    return digest(*parts)


def classification_scenes(count: int, split: str = "train", size: int = 56) -> list[Scene]:
    return [render(split, index, size) for index in range(count)]


def detection_scenes(count: int, size: int = 128) -> list[Scene]:
    return [render("train", index, size, objects=(1, 10)) for index in range(count)]


# ---- exact to the bit ----------------------------------------------------------------------------------------------


def test_the_version_is_that_of_the_checksums() -> None:
    assert scenes.VERSION == VERSION


@pytest.mark.parametrize(("split", "size"), CLASSIFICATION)
def test_classification_checksum(split: str, size: int) -> None:
    assert classification_digest(split, size) == CLASSIFICATION[split, size]


@pytest.mark.parametrize(("split", "size"), DETECTION)
def test_detection_checksum(split: str, size: int) -> None:
    assert detection_digest(split, size) == DETECTION[split, size]


def test_same_bits_without_vector_instructions() -> None:
    """Numpy picks its loops by the processor; the plainest ones must agree with those of this machine."""
    core = getattr(np, "_core", None) or np.core
    features = core._multiarray_umath.__cpu_dispatch__
    if not features:
        pytest.skip("this numpy has no loops to choose from")
    program = f"import sys; sys.path[:0] = {sys.path!r}; import test_mini_scenes as t; " + (
        "print(t.classification_digest('val', 56))"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**os.environ, "NPY_DISABLE_CPU_FEATURES": " ".join(features)},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == [CLASSIFICATION["val", 56]]


def test_only_exactly_rounded_numpy_functions() -> None:
    """sin, exp, pow, sums, matrix products and numpy's distributions differ by machine or version: none is used."""
    exact = {
        *("abs", "arange", "array", "ascontiguousarray", "count_nonzero", "empty", "flatnonzero", "floor", "maximum"),
        *("minimum", "sqrt", "stack", "zeros", "bool", "float32", "int64", "intp", "ndarray", "uint8", "uint64"),
        *("random", "Philox"),
    }
    inexact = {"sum", "mean", "std", "var", "dot", "prod", "cumsum", "sin", "cos", "exp", "log"}
    for module in (scenes, shapes, textures):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            assert not isinstance(node, ast.MatMult)
            if isinstance(node, ast.Attribute):
                assert node.attr not in inexact
                if ast.unparse(node.value) in {"np", "np.random"}:
                    assert node.attr in exact
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
                assert ast.unparse(node) == "2 ** 63"


@pytest.mark.parametrize("objects", [None, (1, 10)])
def test_arithmetic_stays_float32(objects: tuple[int, int] | None) -> None:
    for index in range(40):
        canvas, _ = scenes._draw("train", index, 56, objects, track=True)
        assert canvas.image.dtype == np.float32


@pytest.mark.parametrize("shape", CLASSES)
def test_shapes_stay_float32(shape: str) -> None:
    x = np.linspace(-1, 1, 5, dtype=np.float32)
    assert shapes.SHAPES[shape](x, x[::-1]).dtype == np.float32


@pytest.mark.parametrize("name", textures.TEXTURES)
def test_textures_stay_float32_between_0_and_1(name: str) -> None:
    grid = (np.arange(56, dtype=np.float32) - 28) / 20
    x, y = grid + 0 * grid[:, None], grid[:, None] + 0 * grid
    for index in range(20):
        pattern = textures.texture(Dice(1, index), name, x, y, 20.0, 56, slice(0, 56), slice(0, 56))
        if name == "plain":
            assert pattern is None
            continue
        assert pattern.dtype == np.float32
        assert pattern.shape == (56, 56)
        assert 0 <= pattern.min() < 0.3
        assert 0.7 < pattern.max() <= 1


# ---- independence --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [56, 97])
def test_render_images_is_render(size: int) -> None:
    images, labels = render_images("calibration", 5, 40, size)
    assert images.dtype == np.uint8
    assert images.shape == (40, size, size, 3)
    assert labels.dtype == np.int64
    for offset in range(40):
        scene = render("calibration", 5 + offset, size)
        assert np.array_equal(images[offset], scene.image)
        assert labels[offset] == scene.label


def test_order_does_not_matter() -> None:
    images, labels = render_images("train", 0, 30)
    for index in (17, 3, 29, 3):
        again, label = render_images("train", index, 1)
        assert np.array_equal(again[0], images[index])
        assert label[0] == labels[index]


def test_numpy_integers_are_integers() -> None:
    """A numpy scalar as size would promote float32 to float64 and change bits."""
    assert np.array_equal(render("val", np.int32(3), np.int64(56)).image, render("val", 3, 56).image)


def test_scenes_are_writable_and_contiguous() -> None:
    image = render("val", 0).image
    assert image.flags.c_contiguous
    assert image.flags.writeable


def test_splits_and_indices_share_no_scene() -> None:
    everything = np.concatenate([render_images(split, 0, 150)[0] for split in SPLITS])
    assert len({image.tobytes() for image in everything}) == 450
    streams = {tuple(Dice(SPLITS[split], index).bytes(16)) for split in SPLITS for index in range(2000)}
    assert len(streams) == 6000
    assert set(SPLITS) == {"train", "calibration", "val"}


# ---- labels, boxes, masks ------------------------------------------------------------------------------------------


def test_label_is_the_main_object() -> None:
    """Largest, nearest, and of a class that no other object has."""
    several = 0
    for scene in classification_scenes(400):
        areas = scene.masks.sum(axis=(1, 2))
        assert scene.label == scene.classes[-1] == scene.classes[areas.argmax()]
        assert scene.label not in scene.classes[:-1]
        assert (areas[:-1] < 0.7 * areas[-1]).all()
        several += len(areas) > 1
    assert several > 200


def test_main_object_is_inside_and_large() -> None:
    for scene in classification_scenes(200, "val"):
        x0, y0, x1, y1 = scene.boxes[-1]
        assert 18 <= max(x1 - x0, y1 - y0) <= 56
        assert scene.masks[-1].sum() >= 90


def test_boxes_are_tight() -> None:
    seen = 0
    for scene in [*detection_scenes(60), *classification_scenes(60)]:
        assert scene.boxes.dtype == np.float32
        for box, mask in zip(scene.boxes, scene.masks, strict=True):
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            seen += 1
    assert seen > 250


def test_masks_are_disjoint_and_large_enough() -> None:
    for scene in [*detection_scenes(60), *classification_scenes(60)]:
        size = scene.image.shape[0]
        assert scene.masks.dtype == np.bool_
        assert scene.masks.shape == (len(scene.classes), size, size)
        assert scene.masks.sum(axis=0, dtype=np.int64).max(initial=0) <= 1
        assert (scene.masks.sum(axis=(1, 2)) >= scenes.MIN_VISIBLE).all()


def test_masks_follow_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a quiet, flat, unoccluded scene a mask is just where drawing changed the image by more than half."""
    for name in ("BACKGROUND_NOISE", "SENSOR_NOISE", "TEXTURE_CONTRAST", "CLUTTER"):
        monkeypatch.setattr(scenes, name, (0, 0))
    for name in ("SIDE_OBJECTS", "OCCLUDER_CHANCE", "SHADING", "LOW_CONTRAST_CHANCE"):
        monkeypatch.setattr(scenes, name, 0)
    monkeypatch.setattr(scenes, "CONTRAST", (120.0, 120.0))
    for scene in classification_scenes(40):
        (mask,) = scene.masks
        red = scene.image.astype(int)
        inside, outside = red[mask], red[~mask]
        # The background still has its gradient, which spans far less than the contrast of 120.
        contrast = np.abs(np.median(inside, axis=0) - np.median(outside, axis=0))
        channel = contrast.argmax()
        middle = (np.median(inside[:, channel]) + np.median(outside[:, channel])) / 2
        bright = scene.image[..., channel] > middle
        changed = bright if np.median(inside[:, channel]) > middle else ~bright
        assert np.count_nonzero(changed != mask) <= 0.1 * mask.sum()


def test_occlusion_goes_back_to_front() -> None:
    """Later objects cut earlier ones: some boxes overlap, and some masks are smaller than their shape."""
    overlaps = 0
    for scene in detection_scenes(40):
        for first in range(len(scene.boxes)):
            for second in range(first):
                low = np.maximum(scene.boxes[first, :2], scene.boxes[second, :2])
                high = np.minimum(scene.boxes[first, 2:], scene.boxes[second, 2:])
                overlaps += bool((low < high).all())
    assert overlaps > 20


def test_object_counts() -> None:
    counts = [len(render("train", index, 128, objects=(1, 10)).classes) for index in range(150)]
    assert max(counts) >= 9
    assert min(counts) <= 1
    assert {len(render("val", index, 128, objects=(1, 1)).classes) for index in range(40)} <= {0, 1}
    assert max(len(scene.classes) for scene in classification_scenes(100)) == 4


def test_a_hidden_object_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "MIN_VISIBLE", 56 * 56 + 1)
    scene = render("val", 0, 56, objects=(3, 3))
    assert scene.classes.shape == (0,)
    assert scene.boxes.shape == (0, 4)
    assert scene.masks.shape == (0, 56, 56)
    assert 0 <= scene.label < len(CLASSES)


def test_classes_occur_evenly() -> None:
    labels = render_images("train", 0, 1600)[1]
    counts = np.bincount(labels, minlength=len(CLASSES))
    assert len(CLASSES) == 16
    assert counts.min() > 60  # 100 expected, standard deviation 9.7
    assert counts.max() < 140


def test_colour_tells_no_class() -> None:
    """The nearest class mean of each channel's mean, spread and skew is a guess: 1 in 16, not more."""

    def moments(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        images, labels = render_images(split, 0, count)
        values = images.reshape(count, -1, 3).astype(np.float64)
        mean, std = values.mean(axis=1), values.std(axis=1)
        skew = ((values - mean[:, None]) ** 3).mean(axis=1) / std**3
        return np.concatenate([mean, std, skew], axis=1), labels

    features, labels = moments("train", 1200)
    centre, scale = features.mean(axis=0), features.std(axis=0)
    means = np.stack([((features - centre) / scale)[labels == label].mean(axis=0) for label in range(len(CLASSES))])
    features, labels = moments("val", 800)
    distance = (((features - centre) / scale)[:, None] - means) ** 2
    assert (distance.sum(axis=2).argmin(axis=1) == labels).mean() < 0.12


# ---- shapes --------------------------------------------------------------------------------------------------------

SIDE = 321
AXIS = np.linspace(-1.3, 1.3, SIDE, dtype=np.float32)
X, Y = np.meshgrid(AXIS, AXIS)


@pytest.mark.parametrize("shape", CLASSES)
def test_shape_is_a_distance_within_reach(shape: str) -> None:
    distance = shapes.SHAPES[shape](X, Y)
    inside = distance < 0
    radius = np.hypot(X, Y)
    assert 0.9 < radius[inside].max() <= shapes.REACH
    # Unit slope at the outline: else its edge would be softer or harder than a pixel. Corners aside.
    slope = np.hypot(*np.gradient(distance.astype(np.float64), float(AXIS[1] - AXIS[0])))
    near = np.abs(distance) < 0.03
    assert abs(np.median(slope[near]) - 1) < 1e-3
    assert slope[near].max() < 1.02
    # Comparable areas: the size of an object says little about its class.
    assert 1.1 < inside.sum() * float(AXIS[1] - AXIS[0]) ** 2 < 2.9


def test_no_shape_is_another_rotated_or_mirrored() -> None:
    """Overlap (intersection over union) of any two, whatever the angle. Pentagon, hexagon and disc come closest."""
    axis = AXIS[::4]
    x, y = (grid.astype(np.float64) for grid in np.meshgrid(axis, axis))
    turned = {}
    for name, shape in shapes.SHAPES.items():
        masks = []
        for degrees in range(0, 360, 3):
            cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
            masks += [shape(x * cosine + y * sine, side * (y * cosine - x * sine)) < 0 for side in (1, -1)]
        turned[name] = np.stack(masks).reshape(len(masks), -1).astype(np.float32)
    for first, name in enumerate(CLASSES):
        one = turned[name][0]
        for other in CLASSES[:first]:
            both = turned[other] @ one
            overlap = both / (turned[other].sum(axis=1) + one.sum() - both)
            assert overlap.max() < 0.94, (name, other)


# ---- draws ---------------------------------------------------------------------------------------------------------


def test_dice_are_numpys_philox_words() -> None:
    words = np.random.Philox(key=np.array([7, 11], dtype=np.uint64)).random_raw(32)
    dice = Dice(7, 11)
    # Sixteen bits at a time, the last first.
    assert dice.uniform() == (int(words[31]) >> 48) / 65536
    assert dice.integer(1000) == (int(words[31]) >> 32 & 0xFFFF) * 1000 >> 16
    assert Dice(7, 11).bytes(3).tolist()[:3] == [int(words[0]) >> shift & 0xFF for shift in (0, 8, 16)]


def test_rotations_are_unit_and_everywhere() -> None:
    dice = Dice(1, 1)
    pairs = np.array([dice.rotation() for _ in range(8000)])
    assert np.abs(np.hypot(*pairs.T) - 1).max() < 1e-12
    counts = np.histogram(np.arctan2(pairs[:, 1], pairs[:, 0]), bins=24, range=(-np.pi, np.pi))[0]
    assert counts.min() > 230  # 333 if uniform; the density varies by 17 % within an octant
    assert counts.max() < 450


def test_upsampling_keeps_a_plane_and_windows_agree() -> None:
    knots = np.arange(5, dtype=np.float32)
    plane = knots * 2 + knots[:, None] * 3
    whole = textures.upsample(plane, 20, slice(None), slice(None))
    position = (np.arange(20) + 0.5) / 20 * 4
    assert np.allclose(whole, position * 2 + position[:, None] * 3, atol=1e-5)
    lattice = textures.lattice(Dice(1, 2), 3, 6)
    window = slice(3, 17), slice(0, 9)
    assert np.array_equal(
        textures.upsample(lattice, 20, *window), textures.upsample(lattice, 20, slice(None), slice(None))[:, 3:17, 0:9]
    )


def test_sensor_noise_has_the_stated_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "SENSOR_NOISE", (10.0, 10.0))
    canvas, _ = scenes._draw("val", 0, 128, None, track=False)
    canvas.image[:] = 128.0
    noise = canvas.develop().astype(np.float64) - 128
    assert abs(noise.mean()) < 0.2
    assert abs(noise.std() - 10) < 0.2
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.03


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("test", 0), "Unknown split 'test'.*train, calibration, val"),
        (("val", -1), "index.*-1"),
        (("val", 1.5), "index must be an integer, not 1.5"),
        (("val", 2**63), "index"),
        (("val", 0, 31), "at least 32 pixels.*31"),
        (("val", 0, -56), "size.*-56"),
        (("val", 0, "56"), "size must be an integer, not '56'"),
        (("val", 0, 56, (0, 3)), r"1 ≤ least ≤ most ≤ 32, not \(0, 3\)"),
        (("val", 0, 56, (4, 3)), "least"),
        (("val", 0, 56, (1, 33)), "least"),
        (("val", 0, 56, (1, 2.5)), "most must be an integer, not 2.5"),
    ],
)
def test_bad_input_to_render(arguments: tuple, message: str) -> None:
    with pytest.raises(IasvitError, match=message):
        render(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("test", 0, 1), "Unknown split"),
        (("val", -1, 1), "start.*-1"),
        (("val", 0, -1), "count.*-1"),
        (("val", 0, 1, 8), "at least 32 pixels"),
    ],
)
def test_bad_input_to_render_images(arguments: tuple, message: str) -> None:
    with pytest.raises(IasvitError, match=message):
        render_images(*arguments)


def test_no_images() -> None:
    images, labels = render_images("val", 3, 0)
    assert images.shape == (0, 56, 56, 3)
    assert labels.shape == (0,)


if __name__ == "__main__":
    for split in SPLITS:
        for size in (56, 128):
            print(f'    ("{split}", {size}): "{classification_digest(split, size)}",')
    for split in SPLITS:
        print(f'    ("{split}", 128): "{detection_digest(split, 128)}",  # detection')
