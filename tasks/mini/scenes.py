"""Procedural scenes of the embedded benchmark: images with exact class labels, boxes and instance masks.

A scene is a cluttered background, objects of 16 classes drawn back to front, thin occluding strokes and sensor noise.
What makes an object its class is its outline alone; colour, texture, shading, size, place and rotation are drawn
independently of it. Scene (split, index) is a pure function of its name: the same bits on every machine.

`render` gives one scene with everything known about it; `render_images` gives only the images and labels of many.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from iasvit.errors import IasvitError
from tasks.mini.shapes import REACH, SHAPES
from tasks.mini.textures import TEXTURES, Dice, lattice, texture, upsample

VERSION = 1  # raised whenever a scene changes: part of the data's fingerprint, and so of what a stored row is of
CLASSES: tuple[str, ...] = tuple(SHAPES)

# The Philox key's first word for each split. The second is the scene's index, so no two scenes share a stream.
SPLITS: dict[str, int] = {"train": 0x7472_6169_6E01, "calibration": 0x6361_6C69_6202, "val": 0x7661_6C03}

MIN_SIZE = 32  # pixels; below, the smallest objects are too few pixels to have a shape
MAX_OBJECTS = 32
MIN_VISIBLE = 16  # an object with fewer visible pixels is not reported …
MIN_VISIBLE_FRACTION = 0.2  # … nor one of which less than this part is visible

# Difficulty. Lengths are fractions of the image size, intensities of 0 … 255; ranges are drawn from uniformly.
MAIN_SIDE = (0.45, 0.75)  # classification: side of the main object
SIDE_OBJECTS = 3  # classification: at most so many smaller objects of other classes, behind the main one
SIDE_OBJECT_SIDE = (0.16, 0.28)  # their side, but at most …
SIDE_OBJECT_RATIO = 0.55  # … this fraction of the main object's
DETECTION_SIDE = (0.13, 0.50)  # detection: side of an object; small ones are the more frequent
CONTRAST = (30.0, 125.0)  # object's colour against the background's behind it, in the channel that differs most
LOW_CONTRAST = (16.0, 30.0)  # the same, in hard scenes …
LOW_CONTRAST_CHANCE = 0.1  # … which are so many
TEXTURE_CONTRAST = (10.0, 100.0)  # between an object's two colours, in the channel that differs most
SHADING = 0.35  # greatest relative change of brightness across an object, and at its edge
CLUTTER = (2, 7)  # strokes and blobs behind the objects
CLUTTER_CONTRAST = (10.0, 70.0)
OCCLUDER_CHANCE = 0.3  # chance of each of two thin strokes over the objects
OCCLUDER_WIDTH = (0.02, 0.06)
BACKGROUND_NOISE = (4.0, 40.0)  # amplitude of the background's low-frequency noise
SENSOR_NOISE = (2.0, 14.0)  # standard deviation of the sensor's noise


@dataclass(frozen=True)
class Scene:
    """One image and what is in it. k objects, from the farthest to the nearest.

    Attributes:
        image: uint8 H×W×3, RGB.
        label: class of the object with the most visible pixels; in classification scenes, the main object, which
            is the nearest too.
        classes: int64 [k], indices into `CLASSES`.
        boxes: float32 [k, 4], x0, y0, x1, y1 in pixels: the tight box of each mask, x1 and y1 exclusive.
        masks: bool [k, H, W], the visible pixels of each object; no pixel belongs to two.
    """

    image: np.ndarray
    label: int
    classes: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray


@lru_cache(maxsize=16)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres (float32 [size]) and the centres of their halves (float32 [2, size])."""
    centre = np.arange(size, dtype=np.float32) + np.float32(0.5)
    return centre, np.stack([centre - np.float32(0.25), centre + np.float32(0.25)])


def _clip01(x: np.ndarray) -> np.ndarray:
    return np.minimum(np.maximum(x, 0.0), 1.0)


class _Canvas:
    """A float32 3×size×size image in the making, and which object is seen at each pixel."""

    def __init__(self, dice: Dice, size: int, track: bool) -> None:
        self.dice = dice
        self.size = size
        self.centre, self.halves = _grid(size)
        self.base = [dice.uniform(40.0, 215.0) for _ in range(3)]
        self.image = self._background()
        # 0 is the background; object i is i + 1.
        self.owner = np.zeros((size, size), dtype=np.uint8) if track else None
        self.full_area: list[int] = []

    def _background(self) -> np.ndarray:
        """Value noise of two scales, and a gradient that is part of the coarser one's lattice."""
        dice, size, everything = self.dice, self.size, slice(None)
        coarse = lattice(dice, 3, 4) * dice.uniform(*BACKGROUND_NOISE)
        base = np.array(self.base, dtype=np.float32)[:, None, None]
        slope = dice.uniform(-1.0, 1.0) * 15.0, dice.uniform(-1.0, 1.0) * 15.0
        knots = np.arange(4, dtype=np.float32) - np.float32(1.5)
        coarse = coarse + (base + (knots * slope[0] + (knots * slope[1])[:, None]))
        fine = lattice(dice, 1, 9 + dice.integer(8)) * (0.6 * dice.uniform(*BACKGROUND_NOISE))
        return upsample(coarse, size, everything, everything) + upsample(fine, size, everything, everything)

    def _window(self, x: float, y: float, reach_x: float, reach_y: float) -> tuple[slice, slice]:
        """Rows and columns of the pixels within reach of (x, y); at least one of each."""
        last = self.size - 1
        left, right = max(int(x - reach_x), 0), min(int(x + reach_x) + 1, self.size)
        top, bottom = max(int(y - reach_y), 0), min(int(y + reach_y) + 1, self.size)
        left, top = min(left, last), min(top, last)
        return slice(top, max(bottom, top + 1)), slice(left, max(right, left + 1))

    def contrasting(self, colour: list[float], contrast: float) -> list[float]:
        """A colour that differs from the given one by `contrast` in one channel and by 0.2 to 1 of it in the others."""
        dice = self.dice
        most = dice.integer(3)
        result = []
        for channel in range(3):
            change = dice.sign() * contrast * (1.0 if channel == most else dice.uniform(0.2, 1.0))
            moved = colour[channel] + change
            result.append(moved if 5.0 <= moved <= 250.0 else colour[channel] - change)
        return result

    def _colour_behind(self, x: float, y: float, radius: float) -> list[float]:
        """Mean colour at four points around (x, y)."""
        last = self.size - 1
        left, right = (min(max(int(x + side * radius), 0), last) for side in (-0.7, 0.7))
        top, bottom = (min(max(int(y + side * radius), 0), last) for side in (-0.7, 0.7))
        corners = self.image[:, [top, top, bottom, bottom], [left, right, left, right]].tolist()
        return [(a + b + c + d) * 0.25 for a, b, c, d in corners]

    def stroke(self, length: float, width: float, softness: float, contrast: float) -> None:
        """A capsule of random place, direction and colour: a blob where it is soft and short, else a thin bar.

        Args:
            length, width: half extents in pixels.
            softness: width in pixels of the edge's ramp.
        """
        dice, size = self.dice, self.size
        x, y = dice.uniform(0.0, size), dice.uniform(0.0, size)
        cosine, sine = dice.rotation()
        reach = width + softness
        rows, columns = self._window(x, y, abs(cosine) * length + reach, abs(sine) * length + reach)
        across, down = self.centre[columns] - x, (self.centre[rows] - y)[:, None]
        along = np.maximum(np.abs(across * cosine + down * sine) - length, 0.0)
        sideways = across * sine - down * cosine
        distance = np.sqrt(along * along + sideways * sideways)
        alpha = _clip01((width - distance) * (1.0 / softness) + 0.5)
        colour = self.contrasting(self.base, contrast)
        region = self.image[:, rows, columns]
        region += (np.array(colour, dtype=np.float32)[:, None, None] - region) * alpha
        if self.owner is not None:
            self.owner[rows, columns][alpha >= 0.5] = 0

    def draw(self, shape: str, x: float, y: float, radius: float) -> None:
        """One object of the class `shape`, centred on (x, y), its half side `radius` pixels."""
        dice = self.dice
        rows, columns = self._window(x, y, REACH * radius + 1.0, REACH * radius + 1.0)
        cosine, sine = dice.rotation()
        cosine, sine = cosine / radius, sine / radius
        # Four samples a pixel, [2, 2, h, w]: halves of rows by halves of columns.
        across, down = self.halves[:, columns] - x, (self.halves[:, rows] - y)[:, None, :, None]
        across = across[:, None, :]
        u, v = across * cosine + down * sine, down * cosine - across * sine
        distance = SHAPES[shape](u, v)
        # A sample stands for half a pixel: coverage falls from 1 to 0 within a quarter pixel of the outline.
        samples = _clip01(0.5 - distance * (2.0 * radius))
        coverage = ((samples[0, 0] + samples[0, 1]) + (samples[1, 0] + samples[1, 1])) * 0.25
        u, v = (u[0, 0] + u[1, 1]) * 0.5, (v[0, 0] + v[1, 1]) * 0.5

        behind = self._colour_behind(x, y, radius)
        contrast = dice.uniform(*(LOW_CONTRAST if dice.chance(LOW_CONTRAST_CHANCE) else CONTRAST))
        first = self.contrasting(behind, contrast)
        second = self.contrasting(first, dice.uniform(*TEXTURE_CONTRAST))
        pattern = texture(dice, TEXTURES[dice.integer(len(TEXTURES))], u, v, radius, self.size, rows, columns)
        # Light from one side, and darker within a fifth of the half side from the outline.
        light_x, light_y = dice.uniform(-SHADING, SHADING), dice.uniform(-SHADING, SHADING)
        rim = dice.uniform(0.0, SHADING)
        depth = np.minimum(np.maximum((distance[0, 0] + distance[1, 1]) * -2.5, 0.0), 1.0)
        light = u * (0.7 * light_x) + (v * (0.7 * light_y) + (depth * rim + (1.0 - rim)))

        surface = np.array(first, dtype=np.float32)[:, None, None]
        if pattern is not None:
            surface = surface + (np.array(second, dtype=np.float32)[:, None, None] - surface) * pattern
        region = self.image[:, rows, columns]
        region += (surface * light - region) * coverage
        if self.owner is not None:
            mask = coverage >= 0.5
            self.full_area.append(int(np.count_nonzero(mask)))
            self.owner[rows, columns][mask] = len(self.full_area)

    def develop(self) -> np.ndarray:
        """The finished image with sensor noise, uint8 size×size×3."""
        dice, size = self.dice, self.size
        count = 3 * size * size
        pairs = dice.bytes(2 * count)[: 2 * count].view("<u2")
        # The sum of two uniform bytes: mean 255, standard deviation 104.51; a triangular density.
        total = ((pairs & 0xFF) + (pairs >> 8)).astype(np.float32).reshape(3, size, size)
        sigma = dice.uniform(*SENSOR_NOISE) * (1.0 / 104.51)
        noisy = self.image + (total - 255.0) * sigma
        noisy = np.minimum(np.maximum(noisy + 0.5, 0.0), 255.0)
        return np.ascontiguousarray(noisy.astype(np.uint8).transpose(1, 2, 0))


def _draw(split: str, index: int, size: int, objects: tuple[int, int] | None, track: bool) -> tuple[_Canvas, list[int]]:
    """A scene up to the sensor, and its objects' classes from the farthest to the nearest.

    Everything is drawn in the same order whether visibility is tracked or not.
    """
    dice = Dice(SPLITS[split], index)
    canvas = _Canvas(dice, size, track)
    for _ in range(CLUTTER[0] + dice.integer(CLUTTER[1] - CLUTTER[0] + 1)):
        contrast = dice.uniform(*CLUTTER_CONTRAST)
        if dice.chance(0.5):
            canvas.stroke(size * dice.uniform(0.0, 0.04), size * dice.uniform(0.02, 0.06), size * 0.06, contrast)
        else:
            canvas.stroke(size * dice.uniform(0.06, 0.25), size * dice.uniform(0.006, 0.02), 1.0, contrast)

    if objects is None:
        main = dice.integer(len(CLASSES))
        main_side = dice.uniform(*MAIN_SIDE)
        count = dice.integer(SIDE_OBJECTS + 1)
        others = [(main + 1 + dice.integer(len(CLASSES) - 1)) % len(CLASSES) for _ in range(count)]
        sides = [min(dice.uniform(*SIDE_OBJECT_SIDE), SIDE_OBJECT_RATIO * main_side) for _ in others] + [main_side]
        classes = [*others, main]
    else:
        count = objects[0] + dice.integer(objects[1] - objects[0] + 1)
        classes = [dice.integer(len(CLASSES)) for _ in range(count)]
        low, high = DETECTION_SIDE
        sides = [low + (high - low) * dice.uniform() * dice.uniform() for _ in range(count)]
    for shape, side in zip(classes, sides, strict=True):
        radius = 0.5 * side * size
        x, y = dice.uniform(radius, size - radius), dice.uniform(radius, size - radius)
        canvas.draw(CLASSES[shape], x, y, radius)

    for _ in range(2):
        if dice.chance(OCCLUDER_CHANCE):
            width = 0.5 * size * dice.uniform(*OCCLUDER_WIDTH)
            canvas.stroke(size * dice.uniform(0.2, 0.5), width, 1.0, dice.uniform(*CONTRAST))
    return canvas, classes


def _integers(**numbers: object) -> list[int]:
    """The arguments as Python integers: a numpy scalar would turn float32 arithmetic into float64."""
    result = []
    for name, value in numbers.items():
        try:
            result.append(operator.index(value))
        except TypeError:
            raise IasvitError(f"The scenes' {name} must be an integer, not {value!r}.") from None
        if not 0 <= result[-1] < 2**63:
            raise IasvitError(f"The scenes' {name} must be from 0 to 2^63 - 1, not {value}.")
    return result


def _check(split: str, size: int) -> None:
    if split not in SPLITS:
        raise IasvitError(f"Unknown split {split!r} of the mini benchmark: it has {', '.join(SPLITS)}.")
    if size < MIN_SIZE:
        raise IasvitError(f"Scenes must be at least {MIN_SIZE} pixels wide, not {size}.")


def render(split: str, index: int, size: int = 56, objects: tuple[int, int] | None = None) -> Scene:
    """Scene `index` of a split.

    Args:
        split: "train", "calibration" or "val".
        index: from 0; every index exists.
        size: height and width in pixels.
        objects: None for a classification scene: one main object, drawn last, and up to three clearly smaller ones of
            other classes. (least, most) for a detection scene: so many objects of any class, overlapping; those hidden
            but for a small rest are not reported, so a scene may hold fewer, or none.

    Raises:
        IasvitError: unknown split, negative index, or size or objects out of range.
    """
    index, size = _integers(index=index, size=size)
    _check(split, size)
    if objects is not None:
        least, most = _integers(least=objects[0], most=objects[1])
        if not 1 <= least <= most <= MAX_OBJECTS:
            raise IasvitError(f"objects must be (least, most) with 1 ≤ least ≤ most ≤ {MAX_OBJECTS}, not {objects!r}.")
        objects = least, most
    canvas, classes = _draw(split, index, size, objects, track=True)
    kept_classes, boxes, masks, areas = [], [], [], []
    for number, (shape, full) in enumerate(zip(classes, canvas.full_area, strict=True), start=1):
        mask = canvas.owner == number
        area = int(np.count_nonzero(mask))
        if area < MIN_VISIBLE or area < MIN_VISIBLE_FRACTION * full:
            continue
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        kept_classes.append(shape)
        boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
        masks.append(mask)
        areas.append(area)
    return Scene(
        image=canvas.develop(),
        label=kept_classes[areas.index(max(areas))] if areas else classes[-1],
        classes=np.array(kept_classes, dtype=np.int64),
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        masks=np.array(masks, dtype=bool).reshape(-1, size, size),
    )


def render_images(split: str, start: int, count: int, size: int = 56) -> tuple[np.ndarray, np.ndarray]:
    """Classification scenes start … start + count - 1 of a split, without boxes and masks.

    Returns:
        Images, uint8 count×size×size×3, and labels, int64 [count]: the same as `render` gives one by one.

    Raises:
        IasvitError: unknown split, negative start or count, or size out of range.
    """
    start, count, size = _integers(start=start, count=count, size=size)
    _check(split, size)
    images = np.empty((count, size, size, 3), dtype=np.uint8)
    labels = np.empty(count, dtype=np.int64)
    for offset in range(count):
        canvas, classes = _draw(split, start + offset, size, None, track=False)
        images[offset] = canvas.develop()
        labels[offset] = classes[-1]
    return images, labels
