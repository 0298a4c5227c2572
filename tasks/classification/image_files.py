"""Image files in folders: which files are images, and how each becomes 8-bit RGB."""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from timm.utils.misc import natural_key
from torchvision.datasets.folder import IMG_EXTENSIONS

from iasvit.errors import IasvitError

logger = logging.getLogger(__name__)
Samples = list[tuple[str, int]]  # (path, label)

EXTENSIONS = (*IMG_EXTENSIONS, ".gif")
EXAMPLES = 3  # names that a message gives of many
# What Pillow raises on a file that is no image, or a damaged one.
UNREADABLE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_SYSTEM_FILES = {"thumbs.db", "desktop.ini"}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF tags, and a value


def examples(names: Iterable[str]) -> str:
    """ "a, b, c and 2 more"."""
    names = sorted(names)
    more = f" and {len(names) - EXAMPLES} more" if len(names) > EXAMPLES else ""
    return ", ".join(names[:EXAMPLES]) + more


def visible(name: str) -> bool:
    """Whether a file or folder is the user's: no name with a leading dot, and none of the system's own files."""
    return not name.startswith(".") and name.lower() not in _SYSTEM_FILES


def entries(folder: Path) -> tuple[set[str], set[str]]:
    """Names of the folders and of the files in a folder, hidden ones left out.

    Raises:
        IasvitError: it is no folder, cannot be read, or is empty.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise IasvitError(f"data folder {folder} {what}; --data-root names the folder that holds the images")
    try:
        found = [entry for entry in os.scandir(folder) if visible(entry.name)]
    except OSError as error:
        raise IasvitError(f"data folder {folder} cannot be read: {error.strerror or error}") from None
    if not found:
        raise IasvitError(f"data folder {folder} is empty; --data-root names the folder that holds the images")
    folders = {entry.name for entry in found if _is(entry.is_dir)}
    return folders, {entry.name for entry in found} - folders


def list_images(folder: Path, classes: dict[str, int]) -> Samples:
    """The image files in a folder's class folders and the folders in these, in natural order of their paths.

    Left out, and counted in a warning, are files that are no images by their extension, what is no regular file (a
    pipe, say, or a link to nothing), folders that cannot be read, and links to a folder that is listed already or
    holds the class folder: each file of a class counts once. Left out without a word are hidden files and folders.

    Args:
        folder: holds the class folders.
        classes: folder name → label; {"": 0} for all images in `folder`.
    """
    samples: Samples = []
    left_out: dict[str, list[str]] = {}
    for name, label in sorted(classes.items()):
        top = folder / name
        if top.is_dir():
            seen = {_identity(parent) for parent in top.resolve().parents}
            samples += [(path, label) for path in _walk(str(top), seen, left_out)]
    for what, names in left_out.items():
        logger.warning("%s: left out %s (%d): %s", folder, what, len(names), examples(names))
    return sorted(samples, key=lambda sample: natural_key(sample[0]))


def _walk(top: str, seen: set[tuple[int, int]], left_out: dict[str, list[str]]) -> Iterator[str]:
    """Paths of the image files in a folder and the folders in it; names of others go to `left_out`, by what they are.

    Args:
        top: the folder as text, for paths in its form.
        seen: device and number of folders that are not to be entered; grows.
        left_out: see above; grows.
    """
    folders = [top]
    for folder in folders:  # grows on the way
        try:
            identity, found = _identity(folder), sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            what = f"folders that cannot be read ({error.strerror})"
            left_out.setdefault(what, []).append(os.path.basename(folder))
            continue
        if identity in seen:
            what = "links to folders that are listed already or hold this one"
            left_out.setdefault(what, []).append(os.path.basename(folder))
            continue
        seen.add(identity)
        for entry in found:
            if not visible(entry.name):
                continue
            if _is(entry.is_dir):
                folders.append(entry.path)
            elif not entry.name.lower().endswith(EXTENSIONS):
                left_out.setdefault("files that are no images by their extension", []).append(entry.name)
            elif _is(entry.is_file):
                yield entry.path
            else:
                left_out.setdefault("what is no regular file", []).append(entry.name)


def _is(test: Callable[[], bool]) -> bool:
    """An entry's own test; False where it cannot be made, as for a link to itself."""
    try:
        return test()
    except OSError:
        return False


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def read_rgb(path: str) -> Image.Image:
    """An image file as 8-bit RGB, the first frame of several.

    As torchvision and timm read it: transparency is dropped, not blended; an EXIF orientation is ignored. Unlike them,
    16-bit grey is scaled to 8 bits (Pillow's own conversion clips it at 255).

    Raises:
        UNREADABLE_ERRORS: no image, a damaged one, or one whose values have no known range (32 bits, floats).
    """
    with open(path, "rb") as file:
        image = Image.open(file)
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            return _from_16_bits(image).convert("RGB")
        if image.mode in ("I", "F"):
            raise ValueError(f"values of mode {image.mode} have no known range")
        if "transparency" in image.info:
            image = image.convert("RGBA")  # Pillow warns of a palette's transparency otherwise
        return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits → mode "L"."""
    tags = getattr(image, "tag_v2", {})
    if tags.get(_BITS_PER_SAMPLE, (16,)) != (16,) or tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        raise ValueError("TIFF of other than 16 bits, or with white as zero")
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
