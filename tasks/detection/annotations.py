"""COCO annotation files: read once and checked field by field before anything runs, so that no evaluation fails late.

What the format leaves open has a default, and what cannot change a result is put right:

- `iscrowd` is 0 where it is not given.
- Annotations are numbered from 1 on, whatever their ids: pycocotools takes an id of 0 for "not found", and of several
  annotations with one id it evaluates the last only. Repeated ids are said.
- A polygon of fewer than three points encloses nothing; it is left out, and said. pycocotools would take one of two
  points, where it comes first, for a box.

Anything else is refused in one sentence that names the file, the entry and the field.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iasvit.errors import IasvitError, reason

logger = logging.getLogger(__name__)

Entry = dict[str, Any]
_FAR = 16  # sizes of its image that a coordinate may be away from it; pycocotools' memory grows with a polygon's length
_FIELDS = {
    "images": ("id", "file_name", "width", "height"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "segmentation"),
}


@dataclass(frozen=True)
class Annotations:
    """The content of a COCO annotation file.

    Attributes:
        path: of the file.
        digest: hex digits of the SHA-256 of its bytes.
        images: "id", "file_name", "width" and "height" in pixels of each, sorted by id.
        categories: "id" and "name" of each, in the file's order.
        objects: the annotations in the file's order: "id" from 1 on, "image_id", "category_id", "bbox" [x, y, width,
            height] in pixels, "area" in pixels, "iscrowd" 0 or 1, and "segmentation", polygons or a run-length code.
    """

    path: Path
    digest: str
    images: list[Entry]
    categories: list[Entry]
    objects: list[Entry]

    def category_ids(self, classes: Sequence[str]) -> list[int]:
        """The id of each class's category, by name: the file's order of categories need not be the model's of classes.

        Raises:
            IasvitError: the categories are not the classes: one is missing, there twice, or unknown and has objects.
        """
        names = [category["name"] for category in self.categories]
        for name in classes:
            if (count := names.count(name)) != 1:
                found = f"{count} categories" if count else "no category"
                raise IasvitError(
                    f"annotation file {self.path} has {found} {name!r}, which the model knows as one of its "
                    f"{len(classes)} classes; categories there: {some(sorted(set(names)))}"
                )
        ids = {category["name"]: category["id"] for category in self.categories}
        used = {entry["category_id"] for entry in self.objects} - {ids[name] for name in classes}
        if unknown := sorted(category["name"] for category in self.categories if category["id"] in used):
            raise IasvitError(
                f"annotation file {self.path} has objects of category {unknown[0]!r}, which is none of the model's "
                f"{len(classes)} classes: {some(classes)}"
            )
        return [ids[name] for name in classes]


def read_annotations(path: Path) -> Annotations:
    """A COCO annotation file, every field that evaluation needs checked.

    Raises:
        IasvitError: no such file, not COCO's JSON, or an entry that cannot be evaluated.
    """
    content, digest = _parse(path)
    for part, keys in _FIELDS.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise IasvitError(f"annotation file {path} is not COCO's: it has no list {part!r} of objects")
        for entry in entries:
            if missing := [key for key in keys if key not in entry]:
                raise IasvitError(
                    f"annotation file {path}: an entry of {part!r} has no {missing[0]!r} (id {short(entry.get('id'))})"
                )
    if not content["images"]:
        raise IasvitError(f"annotation file {path} lists no image")
    check = _Check(path)
    images = check.images(content["images"])
    categories = check.categories(content["categories"])
    objects = check.objects(content["annotations"], images, categories)
    check.say()
    ordered = [images[image_id] for image_id in sorted(images)]
    return Annotations(path, digest, ordered, list(categories.values()), objects)


def _parse(path: Path) -> tuple[Any, str]:
    try:
        if path.exists() and not path.is_file():
            raise OSError(None, "it is not a file")
        data = path.read_bytes()
    except OSError as error:
        raise IasvitError(
            f"annotation file {path} cannot be read ({reason(error)}); COCO's {path.name} is expected there"
        ) from None
    try:
        return json.loads(data), hashlib.sha256(data).hexdigest()
    except (ValueError, RecursionError) as error:
        raise IasvitError(f"annotation file {path} is not JSON ({reason(error)})") from None


# ---- entries ---------------------------------------------------------------------------------------------------------


@dataclass
class _Check:
    """Checks entries, and counts what is to be said of those that pass."""

    path: Path
    repeated: list[Any] = field(default_factory=list)
    no_polygons: list[Any] = field(default_factory=list)
    flat: list[Any] = field(default_factory=list)
    outside: list[Any] = field(default_factory=list)
    nowhere: list[Any] = field(default_factory=list)
    no_area: list[Any] = field(default_factory=list)
    ignored: list[Any] = field(default_factory=list)
    total: int = 0

    def images(self, entries: Sequence[Entry]) -> dict[int, Entry]:
        """By id."""
        result: dict[int, Entry] = {}
        for position, entry in enumerate(entries):
            number = self.number("images", position, entry)
            owner = f"image {number}"
            name = entry["file_name"]
            if not isinstance(name, str) or not name or "\0" in name:
                self.refuse(owner, "file_name", name, "a file's name is")
            if number in result:
                raise IasvitError(f"annotation file {self.path}: the id {number} belongs to several images")
            sides = {key: self.whole(owner, key, entry[key], 1) for key in ("width", "height")}
            result[number] = {"id": number, "file_name": name, **sides}
        return result

    def categories(self, entries: Sequence[Entry]) -> dict[int, Entry]:
        """By id."""
        result: dict[int, Entry] = {}
        for position, entry in enumerate(entries):
            number = self.number("categories", position, entry)
            if not isinstance(entry["name"], str):
                self.refuse(f"category {number}", "name", entry["name"], "a text is")
            if number in result:
                raise IasvitError(f"annotation file {self.path}: the id {number} belongs to several categories")
            result[number] = {"id": number, "name": entry["name"]}
        return result

    def objects(self, entries: Sequence[Entry], images: dict[int, Entry], categories: dict[int, Entry]) -> list[Entry]:
        """In order."""
        result: list[Entry] = []
        seen: set[int] = set()
        for position, entry in enumerate(entries):
            own = self.number("annotations", position, entry)
            owner = f"annotation {own}"
            category, image_id = (self.whole(owner, key, entry[key]) for key in ("category_id", "image_id"))
            if category not in categories:
                raise IasvitError(
                    f"annotation file {self.path}: {owner} has the unknown category {category}; its categories are "
                    f"{some(sorted(categories))}"
                )
            if image_id not in images:
                raise IasvitError(
                    f"annotation file {self.path}: {owner} belongs to image {image_id}, which is not among its images"
                )
            image = images[image_id]
            if own in seen:
                self.repeated.append(own)
            seen.add(own)
            if entry.get("ignore"):
                self.ignored.append(own)
            crowd = entry.get("iscrowd", 0)
            if not isinstance(crowd, int) or crowd not in (0, 1):
                self.refuse(owner, "iscrowd", crowd, "0 or 1 is")
            box, area = self.box(owner, own, entry["bbox"], image), self.area(owner, entry["area"])
            if not area and box[2] and box[3]:
                self.no_area.append(own)
            result.append(
                {
                    "id": 1 + position,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": box,
                    "area": area,
                    "iscrowd": int(crowd),
                    "segmentation": self.segmentation(owner, own, entry["segmentation"], image),
                }
            )
        self.total = len(result)
        if result and all(max(entry["bbox"]) <= 1 for entry in result):
            raise IasvitError(
                f"annotation file {self.path}: all boxes lie within the first pixel of their images; bbox is "
                f"[x, y, width, height] in pixels, not in parts of the image"
            )
        return result

    # ---- fields ----

    def box(self, owner: str, own: int, value: Any, image: Entry) -> list[float]:
        """bbox."""
        width, height = image["width"], image["height"]
        if not isinstance(value, list) or len(value) != 4 or not _numbers(value, _FAR * max(width, height)):
            self.refuse(owner, "bbox", value, "[x, y, width, height] in pixels of its image is")
        x, y, w, h = value
        if w < 0 or h < 0:
            self.refuse(owner, "bbox", value, "a width and a height of 0 or more is")
        if not w or not h:
            self.flat.append(own)
        slack = 2 + 0.01 * max(width, height)  # labels end a little beyond their images
        if min(x, y) < -slack or x + w > width + slack or y + h > height + slack:
            self.outside.append(own)
        return value

    def area(self, owner: str, value: Any) -> float:
        """area."""
        if not _numbers([value], 2**53) or value < 0:
            self.refuse(owner, "area", value, "a number of pixels is")
        return value

    def segmentation(self, owner: str, own: int, value: Any, image: Entry) -> Any:
        """segmentation."""
        if isinstance(value, dict):
            return self.runs(owner, value, image)
        far = _FAR * max(image["width"], image["height"])
        if not isinstance(value, list) or not all(
            isinstance(polygon, list) and len(polygon) % 2 == 0 and _numbers(polygon, far) for polygon in value
        ):
            self.refuse(owner, "segmentation", value, "polygons [[x, y, x, y, …], …] or a run-length code is")
        polygons = [polygon for polygon in value if len(polygon) >= 6]
        if not polygons:
            self.refuse(owner, "segmentation", value, "an outline, a polygon of three points or more, is")
        if len(polygons) < len(value):
            self.no_polygons.append(own)
        if all(
            _misses(polygon[::2], image["width"]) or _misses(polygon[1::2], image["height"]) for polygon in polygons
        ):
            self.nowhere.append(own)
        return polygons

    def runs(self, owner: str, value: Entry, image: Entry) -> Entry:
        """A run-length code: of its image's size, with runs that fill it; pycocotools checks nothing of that."""
        size, counts = [image["height"], image["width"]], value.get("counts")
        if value.get("size") != size:
            self.refuse(owner, "segmentation", value.get("size"), f"its image's size {size} is", "size")
        runs = _decode(counts) if isinstance(counts, str) else counts
        if (
            not isinstance(runs, list)
            or not all(type(run) is int and run >= 0 for run in runs)
            or sum(runs) != size[0] * size[1]
        ):
            self.refuse(owner, "segmentation", counts, f"runs of {size[0] * size[1]} pixels in all are", "counts")
        return {"size": size, "counts": counts}

    def number(self, part: str, position: int, entry: Entry) -> int:
        """An entry's id."""
        return self.whole(f"entry {position} of {part!r}", "id", entry["id"])

    def whole(self, owner: str, key: str, value: Any, least: int = -(2**53)) -> int:
        """A whole number; one written as a float counts."""
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 2**53:
            self.refuse(owner, key, value, "a whole number is" if least < 0 else f"a whole number from {least} on is")
        return value

    def refuse(self, owner: str, key: str, value: Any, expected: str, inner: str = "") -> None:
        """Raise IasvitError."""
        key = f"{key}'s {inner}" if inner else key
        raise IasvitError(f"annotation file {self.path}: {owner} has the {key} {short(value)}, but {expected} expected")

    def say(self) -> None:
        """Warn about what was corrected, or is probably a mistake."""
        of = f"annotations (of {self.total})"
        for ids, text in (
            (self.repeated, f"{of} repeat the id of another; each counts as an object of its own"),
            (self.no_polygons, f"{of} have polygons of fewer than three points, which are left out of their masks"),
            (self.flat, f"{of} have a box of no width or no height, which counts as an object that nobody finds"),
            (self.outside, f"{of} have a box that reaches beyond its image; bbox is [x, y, width, height] in pixels"),
            (self.nowhere, f"{of} have polygons that lie outside their image; their masks are empty"),
            (self.no_area, f"{of} have the area 0, but a box that is not empty; they count as small objects"),
            (self.ignored, f"{of} are marked 'ignore', which COCO's evaluation does not know: they count as objects"),
        ):
            if ids:
                logger.warning("annotation file %s: %d %s (such as %s)", self.path, len(ids), text, ids[0])


def _numbers(values: Sequence[Any], limit: float) -> bool:
    """Whether all are numbers no further from 0 than the limit."""
    if not set(map(type, values)) <= {int, float}:
        return False
    return all(-limit <= value <= limit for value in values)  # NaN is not


def _misses(coordinates: Sequence[float], side: int) -> bool:
    """Whether a polygon's coordinates along one axis have nothing of the image between them."""
    return max(coordinates) <= 0 or min(coordinates) >= side


def _decode(text: str) -> list[int] | None:
    """The runs of COCO's compressed run-length code; None where it is none.

    A character holds 5 bits, least first; bit 5 says that more follow. From the fourth run on it is the difference to
    the run before the last.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 40:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)  # the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return None if shift else runs


# ---- messages --------------------------------------------------------------------------------------------------------


def some(values: Sequence[Any], count: int = 4) -> str:
    """The first few values, and how many more there are."""
    more = f" and {len(values) - count} more" if len(values) > count else ""
    return ", ".join(str(value) if not isinstance(value, str) else printable(value) for value in values[:count]) + more


def short(value: Any) -> str:
    """A JSON value as a message shows it."""
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def printable(text: str) -> str:
    """A text as it is, or with escapes where it cannot be printed."""
    return text if text.isprintable() else ascii(text)
