"""Random draws and surface patterns of the embedded benchmark, exact to the bit on any machine.

Random numbers are raw words of the Philox counter generator, whose stream numpy guarantees; array arithmetic is float32
+ - * / sqrt, floor, min, max and comparisons, one rounding per numpy call. Nothing here sums floats in an order that
numpy chooses, nor calls a function (sin, exp, pow) whose last bit depends on the machine's library.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

TEXTURES: tuple[str, ...] = ("plain", "stripes", "checks", "dots", "gradient", "noise")


class Dice:
    """The random numbers of one scene: independent of every other (stream, index).

    Args:
        stream: names the split.
        index: of the scene within its split.
    """

    def __init__(self, stream: int, index: int) -> None:
        self._generator = np.random.Philox(key=np.array([stream, index], dtype=np.uint64))
        self._pool: list[int] = []

    def bytes(self, count: int) -> np.ndarray:
        """At least `count` uniform bytes, as uint8, in the same order on big-endian machines."""
        words = self._generator.random_raw((count + 7) // 8)
        return words.astype("<u8", copy=False).view(np.uint8)

    def _word(self) -> int:
        if not self._pool:
            words = self._generator.random_raw(32).astype("<u8", copy=False)
            self._pool = words.view("<u2").tolist()
        return self._pool.pop()

    def integer(self, count: int) -> int:
        """Uniform in 0 … count - 1 (to 1 part in 65536)."""
        return self._word() * count >> 16

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Uniform in [low, high), in steps of 1/65536 of the range."""
        return low + (high - low) * (self._word() / 65536)

    def chance(self, probability: float) -> bool:
        return self._word() < probability * 65536

    def sign(self) -> int:
        return 1 if self._word() & 1 else -1

    def rotation(self) -> tuple[float, float]:
        """Cosine and sine of a random angle in the full circle.

        From the half-angle's tangent t: cos = (1 - t²) / (1 + t²), sin = 2t / (1 + t²), for angles up to 45°, where
        uniform t gives a density that varies by 17 %; swaps and signs give the other octants.
        """
        t = self.uniform(0.0, 0.41421356237309503)
        cosine, sine = (1.0 - t * t) / (1.0 + t * t), 2.0 * t / (1.0 + t * t)
        turn = self.integer(8)
        if turn & 1:
            cosine, sine = sine, cosine
        if turn & 2:
            cosine, sine = -sine, cosine
        if turn & 4:
            cosine, sine = -cosine, -sine
        return cosine, sine


@lru_cache(maxsize=64)
def _interpolation(size: int, knots: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower knot, upper knot (intp [size]) and the upper one's weight (float32 [size]) for each of `size` pixels."""
    position = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32((knots - 1) / size)
    lower = np.floor(position)
    index = lower.astype(np.intp)
    return index, index + 1, position - lower


def upsample(lattice: np.ndarray, size: int, rows: slice, columns: slice) -> np.ndarray:
    """Bilinear interpolation of `lattice` to a size×size image, of which the window (rows, columns) is returned.

    Args:
        lattice: float32 […, knots, knots].

    Returns:
        float32 […, height, width] of the window.
    """
    lower, upper, weight = _interpolation(size, lattice.shape[-1])
    above, below = lattice.take(lower[rows], axis=-2), lattice.take(upper[rows], axis=-2)
    lines = above + (below - above) * weight[rows][:, None]
    step = lines[..., 1:] - lines[..., :-1]  # a knot narrower, which `lower` never reaches
    return lines.take(lower[columns], axis=-1) + step.take(lower[columns], axis=-1) * weight[columns]


def lattice(dice: Dice, channels: int, knots: int) -> np.ndarray:
    """float32 [channels, knots, knots], uniform in [-1, 1] in 256 steps."""
    count = channels * knots * knots
    values = dice.bytes(count)[:count].astype(np.float32)
    return ((values - np.float32(127.5)) * np.float32(1 / 127.5)).reshape(channels, knots, knots)


def _wave(x: np.ndarray) -> np.ndarray:
    """Triangle wave of period 1 between -1 and 1."""
    return np.abs(x - np.floor(x) - 0.5) * 4.0 - 1.0


def _sharpen(x: np.ndarray, slope: float) -> np.ndarray:
    return np.minimum(np.maximum(x * slope + 0.5, 0.0), 1.0)


def texture(
    dice: Dice, name: str, x: np.ndarray, y: np.ndarray, radius: float, size: int, rows: slice, columns: slice
) -> np.ndarray | None:
    """How much of an object's second colour each pixel takes.

    Args:
        name: one of `TEXTURES`.
        x, y: float32 h×w, the pixels' coordinates in the object's frame, in which it spans about [-1, 1].
        radius: pixels per unit of x and y.
        size, rows, columns: the image and the window of it that x and y cover.

    Returns:
        float32 h×w in [0, 1], or None for "plain".
    """
    if name == "plain":
        return None
    if name == "gradient":
        tilt = dice.sign() * 0.45
        return _sharpen(y, tilt)
    if name == "noise":
        knots = dice.integer(6) + 7
        return _sharpen(upsample(lattice(dice, 1, knots)[0], size, rows, columns), 0.9)
    # Periods are relative to the image, so that a detail covers several pixels whatever the object's size.
    period = dice.uniform(0.09, 0.19) * size
    frequency = radius / period
    phase_x, phase_y = dice.uniform(), dice.uniform()
    if name == "stripes":
        cosine, sine = dice.rotation()
        return _sharpen(_wave(x * (cosine * frequency) + (y * (sine * frequency) + phase_x)), 0.25 * period)
    u, v = _wave(x * frequency + phase_x), _wave(y * frequency + phase_y)
    if name == "checks":
        return _sharpen(u * v, 0.6 * period)
    return _sharpen(u + v - 0.55, 0.25 * period)  # dots
