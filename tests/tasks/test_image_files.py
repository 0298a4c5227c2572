"""Image files: every format to 8-bit RGB, and which files of a folder are images."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.utils.misc import natural_key

from tasks.classification.image_files import EXTENSIONS, UNREADABLE_ERRORS, entries, list_images, read_rgb

COLOURS = np.array([[250, 10, 10], [10, 240, 30], [20, 40, 230], [128, 128, 128]], dtype=np.uint8)
PIXELS = np.repeat(np.repeat(COLOURS.reshape(2, 2, 3), 8, axis=0), 8, axis=1)  # four squares, 16×16×3
RGB = Image.fromarray(PIXELS)
GREY = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)


def with_alpha(mode: str) -> Image.Image:
    """The image, three quarters of it transparent."""
    image = RGB.convert("L" if mode == "LA" else "RGB")
    alpha = Image.new("L", image.size, 0)
    alpha.paste(255, (0, 0, 8, 8))
    image.putalpha(alpha)
    return image


def palette() -> Image.Image:
    return RGB.quantize(4)


def png_of_16_bits(path: Path, values: np.ndarray) -> None:
    """Write uint16 H×W×3, which Pillow cannot."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def tiff_of_16_bits(path: Path, values: np.ndarray) -> None:
    """Write uint16 H×W×3, which Pillow cannot."""
    height, width, _ = values.shape
    data = values.astype("<u2").tobytes()
    bits_at = 8 + len(data)
    short, long = 3, 4
    tags = [
        *((256, long, 1, width), (257, long, 1, height), (258, short, 3, bits_at), (259, short, 1, 1)),
        *((262, short, 1, 2), (273, long, 1, 8), (277, short, 1, 3), (278, long, 1, height)),
        (279, long, 1, len(data)),
    ]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    bits = struct.pack("<HHH", 16, 16, 16)
    path.write_bytes(b"II*\0" + struct.pack("<I", bits_at + len(bits)) + data + bits + directory)


@pytest.mark.parametrize(
    ("name", "image", "options"),
    [
        ("a.png", RGB, {}),
        ("a.PNG", RGB, {}),
        ("a.bmp", RGB, {}),
        ("a.tif", RGB, {}),
        ("a.tiff", RGB, {"compression": "tiff_lzw"}),
        ("a.webp", RGB, {"lossless": True}),
        ("a.ppm", RGB, {}),
        ("a.gif", palette(), {}),
        ("palette.png", palette(), {}),
        ("one_transparent_colour.png", palette(), {"transparency": 0}),
        ("transparent_palette.png", palette(), {"transparency": bytes([0, 100, 200, 255])}),
        ("rgb_with_a_transparent_colour.png", RGB, {"transparency": (250, 10, 10)}),
        ("rgba.png", with_alpha("RGBA"), {}),
        ("rgba.webp", with_alpha("RGBA"), {"lossless": True, "exact": True}),
        ("cmyk.tif", RGB.convert("CMYK"), {}),
        ("two_frames.gif", palette(), {"save_all": True, "append_images": [Image.new("RGB", (16, 16), "white")]}),
    ],
)
def test_formats_without_loss(tmp_path: Path, name: str, image: Image.Image, options: dict) -> None:
    image.save(tmp_path / name, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = read_rgb(str(tmp_path / name))
    assert (read.mode, read.size) == ("RGB", (16, 16))
    np.testing.assert_array_equal(np.asarray(read), PIXELS)


@pytest.mark.parametrize("image", [RGB, RGB.convert("CMYK")], ids=["rgb", "cmyk"])
def test_jpeg(tmp_path: Path, image: Image.Image) -> None:
    image.save(tmp_path / "a.jpg", quality=100, subsampling=0)
    np.testing.assert_allclose(np.asarray(read_rgb(str(tmp_path / "a.jpg"))), PIXELS, atol=6)


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey(tmp_path: Path, mode: str) -> None:
    image = with_alpha(mode) if mode == "LA" else RGB.convert(mode, dither=Image.Dither.NONE)
    image.save(tmp_path / "a.png")
    expected = np.asarray(image.convert("L"))
    np.testing.assert_array_equal(np.asarray(read_rgb(str(tmp_path / "a.png"))), np.stack([expected] * 3, axis=2))
    assert len(np.unique(expected)) > 1


@pytest.mark.parametrize("name", ["a.png", "a.tif", "big_endian.tif", "a.pgm"])
def test_grey_of_16_bits_is_scaled(tmp_path: Path, name: str) -> None:
    Image.fromarray(GREY.astype(">u2") if "big" in name else GREY).save(tmp_path / name)
    read = np.asarray(read_rgb(str(tmp_path / name)))
    np.testing.assert_array_equal(read, np.stack([np.round(GREY / 257)] * 3, axis=2))


@pytest.mark.parametrize("write", [png_of_16_bits, tiff_of_16_bits])
def test_rgb_of_16_bits_is_scaled(tmp_path: Path, write: object) -> None:
    values = np.stack([GREY, GREY[::-1], GREY.T], axis=2)
    path = tmp_path / write.__name__.partition("_")[0]
    write(path, values)
    np.testing.assert_allclose(np.asarray(read_rgb(str(path))), values / 257, atol=1)


def test_orientation_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    RGB.crop((0, 0, 16, 8)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(read_rgb(str(tmp_path / "a.png"))), PIXELS[:8])


@pytest.mark.parametrize("case", ["floats", "32 bits", "white is zero", "text", "missing"])
def test_what_cannot_be_read_right_is_an_error(tmp_path: Path, case: str) -> None:
    path = tmp_path / "a.tif"
    if case == "floats":
        Image.fromarray(GREY.astype(np.float32)).save(path)
    elif case == "32 bits":
        Image.fromarray(GREY.astype(np.int32)).save(path)
    elif case == "white is zero":
        Image.fromarray(GREY).save(path, tiffinfo={262: 0})
    elif case == "text":
        path.write_text("no image")
    with pytest.raises(UNREADABLE_ERRORS):
        read_rgb(str(path))


def test_images_are_listed_in_natural_order_and_others_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"{i}{extension}" for i, extension in enumerate(EXTENSIONS)] + ["10.JPG", "deep/deeper/11.png"]
    for name in [*names, "notes.txt", "b.csv", "c.npy", "d.pdf", ".DS_Store", "Thumbs.db", "._0.jpg", ".git/e.png"]:
        (tmp_path / "cat" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cat" / name).touch()
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "z.png").touch()
    samples = list_images(tmp_path, {"cat": 3})
    expected = sorted((str(tmp_path / "cat" / name) for name in names), key=natural_key)
    assert samples == [(path, 3) for path in expected]
    what = "files that are no images by their extension (4): b.csv, c.npy, d.pdf and 1 more"
    assert caplog.messages == [f"{tmp_path}: left out {what}"]
    assert len(list_images(tmp_path, {"": 0})) == len(names) + 1


def test_what_would_hang_or_count_twice_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A pipe, links to nothing and to itself, and folders linked into themselves and into each other."""
    for name in ("cat/1.png", "cat/sub/2.png", "dog/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    cat = tmp_path / "cat"
    os.mkfifo(cat / "pipe.png")
    (cat / "gone.png").symlink_to(tmp_path / "nothing.png")
    (cat / "self.png").symlink_to(cat / "self.png")
    (cat / "loop").symlink_to(cat)
    (cat / "up").symlink_to(tmp_path)  # would make a dog a cat
    (cat / "sub" / "twice").symlink_to(cat / "sub")
    (tmp_path / "link").symlink_to(tmp_path / "dog")
    assert list_images(tmp_path, {"cat": 0, "dog": 1, "link": 2}) == [
        (str(tmp_path / "cat" / "1.png"), 0),
        (str(tmp_path / "cat" / "sub" / "2.png"), 0),
        (str(tmp_path / "dog" / "3.png"), 1),
        (str(tmp_path / "link" / "3.png"), 2),
    ]
    assert sorted(message.partition("left out ")[2] for message in caplog.messages) == [
        "links to folders that are listed already or hold this one (3): loop, twice, up",
        "what is no regular file (3): gone.png, pipe.png, self.png",
    ]
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert entries(tmp_path) == ({"cat", "dog", "link"}, {"self"})


def test_a_folder_that_cannot_be_read_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").touch()
    (tmp_path / "locked").mkdir()
    real = os.scandir

    def scandir(folder: str) -> object:
        if str(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    assert list_images(tmp_path, {"": 0}) == [(str(tmp_path / "a" / "1.png"), 0)]
    assert caplog.messages == [f"{tmp_path}: left out folders that cannot be read (Permission denied) (1): locked"]
