"""Image files against their annotations: sizes, and which way up an image is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_files import CONFIG, content, pipeline, write
from PIL import Image

pytest.importorskip("mmdet", reason="the coco extra is not installed")

from iasvit.errors import IasvitError
from tasks.detection.data import CalibrationImages, CocoImages, readable
from tasks.detection.image_headers import Header, read_header
from tasks.detection.runner import EvaluatedImages

SIZE = (64, 48)
SMOOTH = np.stack(np.meshgrid(np.arange(64) * 3, np.arange(48) * 4), axis=2)  # a corner of each colour


def save(path: Path, orientation: int | None = None, size: tuple[int, int] = SIZE, **options: Any) -> None:
    """A picture without symmetry, of these pixels as stored."""
    pixels = np.concatenate([SMOOTH, np.zeros((48, 64, 1))], axis=2)[: size[1], : size[0]].astype(np.uint8)
    if orientation is not None:
        exif = Image.Exif()
        exif[274] = orientation
        options["exif"] = exif
    Image.fromarray(pixels).save(path, **options)


def folder(root: Path, files: dict[str, int | None], given: dict[str, tuple[int, int]], **options: Any) -> Path:
    """COCO of these files with their orientations; annotations give their width and height."""
    data = content([given.get(name, SIZE) for name in files])
    write(root, data, ())
    (root / "val2017").mkdir()
    for image, (name, orientation) in zip(data["images"], files.items(), strict=True):
        image["file_name"] = name
        save(root / "val2017" / name, orientation, **options)
    return write(root, data, ())


def read(images: CocoImages) -> dict[str, np.ndarray]:
    """The pixels H×W×3 of each file, as evaluation reads them."""
    dataset = images.dataset(CONFIG)
    steps = readable(pipeline(64, 64))
    plain = EvaluatedImages(dataset._images, CONFIG.classes, [steps[0]])
    return {Path(item["img_path"]).name: item["img"][..., ::-1] for item in plain}


def as_stored(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


TURNED = (48, 64)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_annotated_size_says_which_way_up(tmp_path: Path, name: str, orientation: int) -> None:
    """The stored frame and the turned one, as the width and height in the annotations are."""
    options = {"lossless": True} if name == "a.webp" else {}
    stored = CocoImages(folder(tmp_path / "stored", {name: orientation, "b.jpg": 6}, {}, **options))
    pixels = as_stored(stored.root / "val2017" / name)
    np.testing.assert_allclose(read(stored)[name], pixels, atol=3)
    given = {name: TURNED if orientation >= 5 else SIZE, "b.jpg": TURNED}
    turned = CocoImages(folder(tmp_path / "turned", {name: orientation, "b.jpg": 6}, given, **options))
    for other in [Image.Transpose.FLIP_LEFT_RIGHT] if orientation == 2 else []:
        pixels = np.asarray(Image.fromarray(pixels).transpose(other))
    if orientation == 3:
        pixels = pixels[::-1, ::-1]
    elif orientation == 4:
        pixels = pixels[::-1]
    elif orientation == 5:
        pixels = pixels.transpose(1, 0, 2)
    elif orientation == 6:
        pixels = np.rot90(pixels, -1)
    elif orientation == 7:
        pixels = pixels[::-1, ::-1].transpose(1, 0, 2)
    elif orientation == 8:
        pixels = np.rot90(pixels)
    np.testing.assert_allclose(read(turned)[name], pixels, atol=3)


def test_how_images_with_an_orientation_are_read_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = CocoImages(folder(tmp_path, {"a.jpg": 6, "b.jpg": 3, "c.jpg": None, "d.jpg": 8}, {"d.jpg": TURNED}))
    assert caplog.messages == [
        f"{tmp_path}/val2017: images with an EXIF orientation: 1 are read as stored, since their width and height in "
        f"the annotations are (such as a.jpg); 1 are turned, since their width and height in the annotations are "
        f"(such as d.jpg); 1 of which the size does not tell are turned (such as b.jpg)"
    ]
    assert [(image["img_path"][-5:], image["as_stored"]) for image in images.dataset(CONFIG)._images] == [
        ("d.jpg", False),
        ("c.jpg", False),
        ("b.jpg", False),
        ("a.jpg", True),
    ]


def test_where_no_size_tells_images_are_turned_as_by_mmcv(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = CocoImages(folder(tmp_path, {"a.jpg": 3}, {}))
    np.testing.assert_allclose(read(images)["a.jpg"], as_stored(tmp_path / "val2017" / "a.jpg")[::-1, ::-1], atol=3)
    assert caplog.messages[0].endswith("1 of which the size does not tell are turned (such as a.jpg)")


def test_calibration_images_are_read_as_the_evaluated_ones(tmp_path: Path) -> None:
    stored = CocoImages(folder(tmp_path / "stored", {"a.jpg": 6}, {}))
    turned = CocoImages(folder(tmp_path / "turned", {"a.jpg": 6}, {"a.jpg": TURNED}))
    shapes = [tuple(images.calibration(CONFIG, 1, 0)[:1][0].shape[2:]) for images in (stored, turned)]
    assert shapes[0][0] < shapes[0][1]
    assert shapes[1][0] > shapes[1][1]


def test_an_image_of_another_size_is_refused_when_it_is_read(tmp_path: Path) -> None:
    images = CocoImages(folder(tmp_path, {"a.png": None}, {}))
    save(tmp_path / "val2017" / "a.png", size=(60, 48))
    with pytest.raises(IasvitError, match=r"a\.png is read as 60×48 pixels, but the annotations give 64×48"):
        images.dataset(CONFIG)[0]


def test_headers(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    save(path, 8)
    assert read_header(path) == Header((64, 48), 8)
    assert read_header(path).turned == (48, 64)
    for bad in (0, 9, 77):
        save(path, bad)
        assert read_header(path) == Header((64, 48), 1)
    data = path.read_bytes().replace(b"Exif\0\0", b"Exif\0\0\xff\xff\xff\xff", 1)
    path.write_bytes(data)  # damaged: asks for nothing
    assert read_header(path) == Header((64, 48), 1)


@pytest.mark.parametrize("kind", ["pipe", "folder", "text", "empty", "cut"])
def test_what_is_no_image_is_named_before_anything_runs(tmp_path: Path, kind: str) -> None:
    root = folder(tmp_path, {"a.png": None, "b.png": None}, {})
    path = root / "val2017" / "b.png"
    data = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes({"text": b"no image", "empty": b"", "cut": data[:20]}[kind])
    with pytest.raises(IasvitError, match=r"val2017/b\.png cannot be read: ") as error:
        CocoImages(root)
    assert len(str(error.value).splitlines()) == 1


def test_calibration_images_lie_in_folders_and_have_any_format(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = folder(tmp_path, {"a.png": None}, {})
    names = ["a.jpg", "b.webp", "c.bmp", "d.tif", "deep/e.jpg", "deep/deeper/f.PNG"]
    for name in names:
        (root / "train2017" / name).parent.mkdir(parents=True, exist_ok=True)
        save(root / "train2017" / name)
    (root / "train2017" / "notes.txt").touch()
    os.mkfifo(root / "train2017" / "pipe.jpg")
    (root / "train2017" / "deep" / "again").symlink_to(root / "train2017")
    files = CocoImages(root).calibration_files(6, 0)
    assert sorted(str(file.relative_to(root / "train2017")) for file in files) == sorted(names)
    assert sorted(message.partition("left out ")[2] for message in caplog.messages) == [
        "files that are no images by their extension (1): notes.txt",
        "links to folders that are listed already or hold this one (1): again",
        "what is no regular file (1): pipe.jpg",
    ]
    assert len(list(CalibrationImages(files, CONFIG))) == 6
