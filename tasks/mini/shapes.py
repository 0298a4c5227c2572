"""Signed-distance functions of the 16 object classes of the embedded benchmark.

A shape is a function of float32 coordinates x (right) and y (down) in its own frame, where it fills about [-1, 1]² and
never reaches farther than `REACH` from the origin. It returns the signed distance to the outline in the same unit:
negative inside; outside a corner the distance to the nearer edge's line, which is all that anti-aliasing needs.

No class turns into another by rotation or mirroring. Only + - * sqrt, abs, min and max, whose float32 results IEEE 754
fixes: the same bits on every machine.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Shape = Callable[[np.ndarray, np.ndarray], np.ndarray]

REACH = 1.2  # no shape's outline is farther from its origin

_SQRT_HALF = 0.7071067811865476


def _length(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y)


def _box(x: np.ndarray, y: np.ndarray, left: float, right: float, top: float, bottom: float) -> np.ndarray:
    """An axis-parallel rectangle."""
    half_width, half_height = (right - left) / 2, (bottom - top) / 2
    across = np.abs(x - (left + right) / 2) - half_width
    return np.maximum(across, np.abs(y - (top + bottom) / 2) - half_height)


def disc(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _length(x, y) - 0.94


def ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(_length(x, y) - 0.73) - 0.25


def semicircle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    y = y + 0.45
    return np.maximum(_length(x, y) - 1.05, -y)


def crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(_length(x, y) - 1.0, 0.8 - _length(x - 0.48, y))


def square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.8


def frame(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.maximum(np.abs(x), np.abs(y)) - 0.61) - 0.22


def triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(y, 0.8660254037844386 * np.abs(x) - 0.5 * y) - 0.58


def pentagon(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    upper = 0.5877852522924731 * x - 0.8090169943749475 * y
    lower = 0.9510565162951535 * x + 0.3090169943749474 * y
    return np.maximum(np.maximum(upper, lower), y) - 0.82


def hexagon(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    return np.maximum(x, 0.5 * x + 0.8660254037844386 * np.abs(y)) - 0.86


def star4(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Four tips at distance 1.12, inner corners at (0.26, 0.26)."""
    x, y = np.abs(x), np.abs(y)
    # One edge, from (1.12, 0) to (0.26, 0.26), stands for all eight; its normal is (0.26, 0.86).
    normal = 1.0 / 0.8984431013  # 1 / |(0.26, 0.86)|
    return (0.26 * normal) * np.maximum(x, y) + (0.86 * normal) * np.minimum(x, y) - 0.26 * 1.12 * normal


def star5(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pentagram's outline with a somewhat thicker body: tips at distance 1.12, inner corners at 0.5."""
    # Fold the plane into the half-wedge of one edge: mirror at the y axis, then at two lines 36° from it.
    cos36, sin36 = 0.8090169943749475, 0.5877852522924731
    x, y = np.abs(x), -y
    over = np.maximum(cos36 * x - sin36 * y, 0.0) * 2.0
    x, y = x - over * cos36, y + over * sin36
    over = np.maximum(-cos36 * x - sin36 * y, 0.0) * 2.0
    x, y = np.abs(x + over * cos36), y + over * sin36
    # The edge from the tip (0, 1.12) to 0.5 (sin36, cos36).
    along_x, along_y = 0.5 * sin36, 0.5 * cos36 - 1.12
    normal = 1.0 / 0.7734991  # 1 / |edge|
    return (-along_y * normal) * x + (along_x * normal) * (y - 1.12)


def cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 0.96, np.minimum(x, y) - 0.31)


def heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A square on its corner with a half-disc on each of its two upper edges."""
    x, y = np.abs(x), y - 0.08
    middle = 0.6 * _SQRT_HALF  # of the upper edges
    tilted = (x + np.abs(y)) * _SQRT_HALF - 0.6
    return np.minimum(tilted, _length(x - middle, y + middle) - 0.6)


def arrow(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    y = np.abs(y)
    x = x + 0.06
    # Head: base at x = 0.05 with half-width 0.78, tip at x = 1.1; its edge's normal is (0.78, 1.05) / 1.308.
    head = np.maximum(0.05 - x, 0.5963302752 * (x - 1.1) + 0.8027522936 * y)
    return np.minimum(head, np.maximum(y - 0.25, np.abs(x + 0.42) - 0.6))


def ell(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(_box(x, y, -0.66, -0.12, -0.95, 0.9), _box(x, y, -0.66, 0.76, 0.36, 0.9))


def tee(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(_box(x, y, -0.86, 0.86, -0.8, -0.3), _box(x, y, -0.25, 0.25, -0.8, 1.0))


SHAPES: dict[str, Shape] = {
    "disc": disc,
    "ring": ring,
    "semicircle": semicircle,
    "crescent": crescent,
    "square": square,
    "frame": frame,
    "triangle": triangle,
    "pentagon": pentagon,
    "hexagon": hexagon,
    "star4": star4,
    "star5": star5,
    "cross": cross,
    "heart": heart,
    "arrow": arrow,
    "ell": ell,
    "tee": tee,
}
