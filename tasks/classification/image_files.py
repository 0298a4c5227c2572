"""Image files in folders: which files are images, and how each becomes 8-bit RGB."""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from timm.utils.misc import natural_key
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

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
    return {entry.name for entry in found if entry.is_dir()}, {entry.name for entry in found if not entry.is_dir()}


def list_images(folder: Path, classes: dict[str, int]) -> Samples:
    """The image files in a folder's class folders and the folders in these, in natural order of their paths.

    Files that are no images by their extension are left out, and a warning counts them. So are, without a word, hidden
    files and what lies in hidden folders.

    Args:
        folder: holds the class folders.
        classes: folder name → label; {"": 0} for all images in `folder`.
    """
    others: list[str] = []
    start = len(str(folder))

    def is_image(path: str) -> bool:
        if f"{os.sep}." in path[start:] or not visible(os.path.basename(path)):
            return False
        if path.lower().endswith(EXTENSIONS):
            return True
        others.append(os.path.basename(path))
        return False

    samples = make_dataset(str(folder), classes, is_valid_file=is_image, allow_empty=True)
    if others:
        logger.warning(
            "%s: left out files that are no images by their extension (%d): %s", folder, len(others), examples(others)
        )
    return sorted(samples, key=lambda sample: natural_key(sample[0]))


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
