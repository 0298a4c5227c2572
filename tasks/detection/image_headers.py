"""Image files compared with their annotations: present, readable, of the right size, and turned the right way.

A JPEG, PNG or WebP file may ask by an EXIF orientation to be turned for display. mmcv turns such an image, but some
annotations are of the image as it is stored. The rule, by what the annotations give as width and height:

- The stored size and not the turned one: the image is read as stored.
- The turned size and not the stored one: it is turned, as mmcv does.
- Either, as with a half turn or a square: as the other images of the split, where all of those that tell are read as
  stored; else it is turned.
- Neither: the image is refused.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from iasvit.errors import IasvitError, reason
from tasks.classification.image_files import UNREADABLE_ERRORS
from tasks.detection.annotations import Annotations, Entry, printable

logger = logging.getLogger(__name__)

_ORIENTATION = 274  # EXIF's tag
_TURNED_FORMATS = {"JPEG", "PNG", "WEBP"}  # Pillow and OpenCV both turn TIFF as they read it, always
_READERS = 8  # threads: a network drive answers many at once


class Header(NamedTuple):
    """What a file says of its image.

    Attributes:
        size: width and height as stored, in pixels.
        orientation: EXIF's, 1 for none to 8; from 5 on width and height are swapped.
    """

    size: tuple[int, int]
    orientation: int

    @property
    def turned(self) -> tuple[int, int]:
        """Width and height as displayed."""
        return self.size[::-1] if self.orientation >= 5 else self.size


def read_header(path: Path) -> Header:
    """An image file's header; the image itself is not decoded.

    Raises:
        IasvitError: it is no regular file, or no image.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError(None, "it is not a file")  # to open a pipe would wait for ever
        with Image.open(path) as image:
            return Header(image.size, _orientation(image))
    except UNREADABLE_ERRORS as error:
        raise IasvitError(f"image {printable(str(path))} cannot be read: {reason(error)}") from None


def _orientation(image: Image.Image) -> int:
    if image.format not in _TURNED_FORMATS or "exif" not in image.info:
        return 1
    exif = Image.Exif()
    try:
        exif.load(image.info["exif"])
        value = exif.get(_ORIENTATION, 1)
    except (*UNREADABLE_ERRORS, KeyError, TypeError, struct.error):  # a damaged EXIF part asks for nothing
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def check_files(folder: Path, names: Sequence[str]) -> None:
    """Raise IasvitError unless the folder holds files of all these names."""
    try:
        found = set(os.listdir(folder))
    except OSError as error:
        raise IasvitError(
            f"image folder {folder} cannot be read ({error.strerror or error}); the annotated images are expected there"
        ) from None
    # A name may hold a folder, as in data sets merged from several.
    missing = [name for name in names if name not in found and not _exists(folder / name)]
    if missing:
        raise IasvitError(
            f"image folder {folder} lacks {len(missing)} of the {len(names)} images that the annotations list, such as "
            f"{printable(missing[0])}"
        )


def _exists(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or that no file can have
        return False


def read_as_stored(folder: Path, images: Sequence[Entry], annotations: Annotations) -> set[int]:
    """Ids of the images that are read as they are stored, whatever their EXIF orientation; see the rule above.

    A warning says how many images have an orientation, and how they are read.

    Args:
        folder: holds the files.
        images: entries of the annotations; their files exist.
        annotations: for messages.

    Raises:
        IasvitError: a file is no image, or one of another size than the annotations give.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        headers = list(pool.map(read_header, [folder / image["file_name"] for image in images]))
    stored: list[Entry] = []
    turned: list[Entry] = []
    either: list[Entry] = []
    for image, header in zip(images, headers, strict=True):
        given = (image["width"], image["height"])
        if given not in (header.size, header.turned):
            raise IasvitError(
                f"image {printable(str(folder / image['file_name']))} has {header.size[0]}×{header.size[1]} pixels, "
                f"but annotation file {annotations.path} gives {given[0]}×{given[1]} for it (id {image['id']}); boxes "
                f"are in pixels of the image"
            )
        if header.orientation > 1:
            group = either if header.size == header.turned else stored if given == header.size else turned
            group.append(image)
    follow = bool(stored) and not turned  # those that either size fits follow the others
    groups = (
        (stored, "are read as stored, since their width and height in the annotations are"),
        (turned, "are turned, since their width and height in the annotations are"),
        (either, f"of which the size does not tell are {'read as stored, as those' if follow else 'turned'}"),
    )
    message = "; ".join(
        f"{len(group)} {text} (such as {printable(group[0]['file_name'])})" for group, text in groups if group
    )
    if message:
        logger.warning("%s: images with an EXIF orientation: %s", folder, message)
    return {image["id"] for image in (stored + either if follow else stored)}
