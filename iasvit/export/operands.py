"""Activations as integers: for each kind of quantizer the planes of 8-bit codes that stand for its values exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import singledispatch

import numpy as np
import torch

from iasvit.errors import IasvitError
from iasvit.export.graph import INT8, INT32, UINT8, Graph
from iasvit.quantizers import (
    AdaLogQuantizer,
    Log2Quantizer,
    Quantizer,
    ShiftedAdaLogQuantizer,
    SULQuantizer,
    TwinGELUQuantizer,
    TwinSoftmaxQuantizer,
    UniformQuantizer,
)

OCTAVES = 8  # powers of two that a plane of uint8 holds
MOST_PLANES = 2  # of one operand; with more of them a product of integers is slower than one of floats
# A code that an integer product must not lose stands this much below its power, so that the next power, one half, goes
# to 0 and not to 1, whatever the last bit of the exponential is; 255 units are moved by less than one half.
TILT = 1 + 2.0**-10
LN2 = math.log(2)


@dataclass(frozen=True)
class Plane:
    """Codes c (uint8 or int8) that stand for scale·(c - zero_point - rest).

    Attributes:
        codes: name of the tensor.
        scale: float32 value.
        zero_point: a value of the codes' type.
        rest: what a zero-point has beyond that type; 0 nearly always.
        largest: of |code|, as the tensor may hold it.
        signed: whether codes are int8.
        values: name of the float tensor that they stand for, where a product takes that.
    """

    codes: str
    scale: float
    zero_point: int = 0
    rest: int = 0
    largest: int = 255
    signed: bool = False
    values: str = ""


@dataclass(frozen=True)
class Operand:
    """A quantized activation: the sum of its planes, plus a constant.

    Attributes:
        planes: at least one, unless `values` is given.
        constant: added to every value: -η of SULQ.
        values: name of a float tensor of the quantized values, where there is no integer form.
        why: in which case this says why.
    """

    planes: list[Plane] = field(default_factory=list)
    constant: float = 0.0
    values: str = ""
    why: str = ""


@singledispatch
def operand(quantizer: Quantizer, graph: Graph, x: str, log_x: str = "") -> Operand:
    """The operand that a quantizer makes of a float tensor.

    Args:
        quantizer: calibrated; dispatches on its class.
        graph: where nodes are added.
        x: the tensor's name.
        log_x: name of its natural logarithm, where the graph has it; "" where it has not.

    Raises:
        IasvitError: the quantizer is of a kind that cannot be exported.
    """
    raise IasvitError(
        f"a quantizer of kind {quantizer.kind!r} cannot be exported; exported are uniform, symmetric, log2, sulq, "
        "adalog, adalog_gelu, twin_softmax and twin_gelu"
    )


def _as_float(value: torch.Tensor) -> float:
    return float(value.item())


# ---- uniform ---------------------------------------------------------------------------------------------------------


def uniform_plane(quantizer: UniformQuantizer, graph: Graph, x: str, *, signed: bool = False) -> Plane:
    """Codes of a uniform quantizer per tensor: clip(round(x / s) + z, 0, 2^b - 1), as the formula has it.

    QuantizeLinear rounds, adds and saturates at the ends of its type; Clip does the rest.
    """
    scale, zero_point, largest = _as_float(quantizer.scale), int(quantizer.zero_point), quantizer.n_levels - 1
    dtype = np.int8 if signed else np.uint8
    info = np.iinfo(dtype)
    if graph.centred and (centred := _centred_plane(graph, x, scale, *counts_of(quantizer))):
        return centred
    if info.min <= zero_point <= info.max:
        codes = graph.add("QuantizeLinear", x, graph.constant(scale), graph.constant(zero_point, dtype))
        if largest < info.max or info.min < 0:
            codes = graph.add("Clip", codes, graph.constant(0, dtype), graph.constant(largest, dtype))
        return Plane(codes, scale, zero_point, largest=largest, signed=signed)
    steps = graph.add("Round", graph.add("Div", x, graph.constant(scale)))
    inside = graph.add(
        "Clip", graph.add("Add", steps, graph.constant(zero_point)), graph.constant(0), graph.constant(largest)
    )
    codes = graph.add("Cast", inside, to=INT8 if signed else UINT8)
    return Plane(codes, scale, rest=zero_point, largest=largest, signed=signed)


def counts_of(quantizer: UniformQuantizer) -> tuple[int, int]:
    """The least and the greatest code minus zero-point, of a quantizer of one scale."""
    low = -int(quantizer.zero_point)
    return low, low + quantizer.n_levels - 1


def centred_type(low: int, high: int) -> type | None:
    """The type that holds counts from `low` to `high`, np.uint8 or np.int8; None where neither does."""
    if low >= 0 and high <= 255:
        return np.uint8
    return np.int8 if low >= -128 and high <= 127 else None


def _centred_plane(graph: Graph, x: str, scale: float, low: int, high: int) -> Plane | None:
    """Counts clip(round(x / s), low, high); None where they do not fit.

    A clip, a QuantizeLinear and a DequantizeLinear without zero-points are what OpenVINO makes one step of. But with an
    open batch it computes round(x / s + 128) for int8, which loses digits: a tie is 2e-5 of a step wide. What it is
    given there is rounded already. uint8 takes no 128, and is clipped before it is rounded, which is the same.
    """
    dtype = centred_type(low, high)
    if dtype is None:
        return None
    if dtype is np.int8:
        steps = graph.add("Round", graph.add("Div", x, graph.constant(scale)))
        inside = graph.add("Clip", steps, graph.constant(low), graph.constant(high))
        codes = graph.add("QuantizeLinear", inside, graph.constant(1), graph.constant(0, dtype))
        return Plane(codes, scale, largest=max(-low, high), signed=True)
    inside = graph.add("Clip", x, graph.constant(low * scale), graph.constant(high * scale))
    codes = graph.add("QuantizeLinear", inside, graph.constant(scale), graph.constant(0, dtype))
    return Plane(codes, scale, largest=max(-low, high), signed=dtype is np.int8)


@operand.register
def _(quantizer: UniformQuantizer, graph: Graph, x: str, log_x: str = "") -> Operand:
    if quantizer.channel_dim is None:
        return _of_one_scale(quantizer, graph, x)
    if quantizer.channel_dim != -1:
        raise IasvitError(
            f"an activation quantizer has channel_dim {quantizer.channel_dim}; exported are those of the last dimension"
        )
    scale, zero_point = quantizer.scale.cpu().numpy(), quantizer.zero_point.cpu().numpy().astype(graph.floats)
    steps = graph.add("Round", graph.add("Div", x, graph.constant(scale)))
    counts = graph.add("Clip", graph.add("Add", steps, graph.constant(zero_point)), *_ends(quantizer, graph))
    values = graph.add("Mul", graph.add("Sub", counts, graph.constant(zero_point)), graph.constant(scale))
    return Operand(values=values, why="its input has a scale for each channel")


def _of_one_scale(quantizer: UniformQuantizer, graph: Graph, x: str) -> Operand:
    low, high = counts_of(quantizer)
    if not graph.centred or centred_type(low, high) is not None:
        return Operand([uniform_plane(quantizer, graph, x)])
    scale = _as_float(quantizer.scale)  # counted from the lowest value, which is a constant then
    plane = _centred_plane(graph, graph.add("Add", x, graph.constant(-low * scale)), scale, 0, high - low)
    assert plane is not None, "up to 2^8 counts from 0 fit uint8"
    return Operand([plane], low * scale)


def _ends(quantizer: Quantizer, graph: Graph) -> tuple[str, str]:
    return graph.constant(0), graph.constant(quantizer.n_levels - 1)


# ---- twin ------------------------------------------------------------------------------------------------------------


def _counts(graph: Graph, x: str, step: float, low: int, high: int, mask: str = "") -> Plane:
    """Counts clip(round(x / step), low, high), and 0 where the bool tensor `mask` does not hold."""
    if graph.centred:
        x = graph.add("Mul", x, graph.add("Cast", mask, to=graph.float_type)) if mask else x
        plane = _centred_plane(graph, x, step, low, high)
        assert plane is not None, "counts of a twin quantizer fit int8 or uint8"
        return plane
    codes = graph.add("QuantizeLinear", x, graph.constant(step), graph.constant(-low, np.uint8))
    codes = graph.add("Clip", codes, graph.constant(0, np.uint8), graph.constant(high - low, np.uint8))
    codes = graph.add("Mul", codes, graph.add("Cast", mask, to=UINT8)) if mask else codes
    return Plane(codes, step, -low, largest=high - low)


@operand.register
def _(quantizer: TwinGELUQuantizer, graph: Graph, x: str, log_x: str = "") -> Operand:
    """Negative values saturate at 0 in the coarse plane, positive ones at the zero-point in the fine one."""
    half, fine, coarse = quantizer.half, _as_float(quantizer._fine), _as_float(quantizer.scale)
    return Operand([_counts(graph, x, fine, -half, 0), _counts(graph, x, coarse, 0, half - 1)])


@operand.register
def _(quantizer: TwinSoftmaxQuantizer, graph: Graph, x: str, log_x: str = "") -> Operand:
    """Each value is 0 in the plane of the other range."""
    half, fine, coarse = quantizer.half, _as_float(quantizer._fine), _as_float(quantizer.scale)
    end = float(quantizer._fine * half)
    is_low = graph.add("Less", x, graph.constant(end))
    # What lies in the fine range may round to 0 in the coarse one by itself.
    is_high = graph.add("Not", is_low) if end >= coarse / 2 else ""
    return Operand([_counts(graph, x, fine, 0, half - 1, is_low), _counts(graph, x, coarse, 0, half - 1, is_high)])


# ---- logarithmic -----------------------------------------------------------------------------------------------------


def _log_codes(quantizer: Quantizer, graph: Graph, log_x: str, step: float, zero_point: int) -> tuple[str, int]:
    """Codes counted from the far end: r = 2^b - 1 - q = clip(round(log_x / step) + zero_point, 0, 2^b - 1).

    Returns:
        Name of the codes (uint8), and of which one log_x is 0.
    """
    largest = quantizer.n_levels - 1
    if 0 <= zero_point <= 255:
        codes = graph.add("QuantizeLinear", log_x, graph.constant(step), graph.constant(zero_point, np.uint8))
        if largest < 255:
            codes = graph.add("Clip", codes, graph.constant(0, np.uint8), graph.constant(largest, np.uint8))
        return codes, zero_point
    steps = graph.add("Round", graph.add("Div", log_x, graph.constant(step)))
    inside = graph.add("Clip", graph.add("Add", steps, graph.constant(zero_point)), *_ends(quantizer, graph))
    return graph.add("Cast", inside, to=UINT8), zero_point


def _power_planes(graph: Graph, powers: str, first: int, last: int, unit: float) -> list[Plane]:
    """Planes of values 2^-e·unit, e an integer from `first` to `last`; what lies beyond is 0.

    Args:
        graph: where nodes are added.
        powers: name of the float tensor of 2^-e, to some units in the last place.
        first, last: the least and the greatest e.
        unit: what 1 stands for.
    """
    if graph.centred:
        return _float_power_planes(graph, powers, first, last, unit)
    planes = []
    for start in range(first, last + 1, OCTAVES):
        end = min(start + OCTAVES - 1, last)
        scale = 2.0**-end
        codes = graph.add("QuantizeLinear", powers, graph.constant(scale * TILT), graph.constant(0, np.uint8))
        if start > first:  # greater values, which saturate, stand in the planes before
            fits = graph.add("Less", powers, graph.constant(2.0 ** (0.5 - start)))
            codes = graph.add("Mul", codes, graph.add("Cast", fits, to=UINT8))
        planes.append(Plane(codes, scale * unit, largest=2 ** (end - start)))
    return planes


def _float_power_planes(graph: Graph, powers: str, first: int, last: int, unit: float) -> list[Plane]:
    """The same, masked before it is quantized: OpenVINO takes no step between QuantizeLinear and DequantizeLinear."""
    planes = []
    for start in range(first, last + 1, OCTAVES):
        end = min(start + OCTAVES - 1, last)
        inside = powers
        if start > first:
            fits = graph.add("Less", powers, graph.constant(2.0 ** (0.5 - start)))
            inside = graph.add("Mul", powers, graph.add("Cast", fits, to=graph.float_type))
        scale = 2.0**-end
        codes = graph.add("QuantizeLinear", inside, graph.constant(scale * TILT), graph.constant(0, np.uint8))
        planes.append(Plane(codes, scale * unit, largest=2 ** (end - start)))
    return planes


def _plane_count(first: int, last: int) -> int:
    return -(-(last + 1 - first) // OCTAVES)


def _nearest_power(graph: Graph, x: str, factor: float, least: float, most: float) -> str:
    """x·factor within [least, most], rounded to one significant bit: a power of two, up from 1.5·2^e.

    By Veltkamp's splitting: with y what is to be rounded and z = 2^23·y + y in float32, z - (z - y) is y's first bit,
    without a logarithm or an exponential; in float64 it is 2^52. OpenVINO makes one operation of a product and a sum,
    which changes z where it is one product with 2^23 + 1, and not so; of two factors it makes one, but not where Min
    stands between.
    """
    y = graph.add("Min", graph.add("Mul", x, graph.constant(factor)), graph.constant(most))
    y = graph.add("Max", y, graph.constant(least)) if least else y
    far = graph.add("Add", graph.add("Mul", y, graph.constant(1 / np.finfo(graph.floats).eps)), y)
    return graph.add("Sub", far, graph.add("Sub", far, y))


@operand.register
def _(quantizer: Log2Quantizer, graph: Graph, x: str, log_x: str = "") -> Operand:
    """log2: 2^-q is x rounded to a power of two, up from 2^-(q + 1/2).

    log-sqrt2: 2^-ceil(q/2) and 2^-floor(q/2) are, up from other thresholds each. Their difference D is 2^-ceil(q/2) for
    odd q and 0 for even q, so that 2^(-q/2) = 2^-ceil(q/2) + (sqrt(2) - 1)·D: a plane each.
    """
    scale, k, largest = _as_float(quantizer.scale), quantizer.steps_per_octave, quantizer.n_levels - 1
    last = largest - 1 if quantizer.zero_code else largest
    least = 0.0 if quantizer.zero_code else 2.0 ** (-largest / k)
    starts = [0.75 * 2 ** ((odd + 0.5) / k) for odd in range(k)]  # what 1 becomes, so that thresholds are 1.5·2^e
    powers = [_nearest_power(graph, x, start / scale, least * start, start) for start in starts]
    odds = graph.add("Sub", powers[1], powers[0]) if k == 2 else ""
    if k * _plane_count(0, -(-last // k)) > MOST_PLANES:
        values = powers[0]
        if k == 2:
            values = graph.add("Add", values, graph.add("Mul", odds, graph.constant(math.sqrt(2) - 1)))
        if quantizer.zero_code:
            values = graph.add("ThresholdedRelu", values, alpha=2.0 ** ((0.5 - largest) / k))
        return Operand(values=graph.add("Mul", values, graph.constant(scale)), why="its softmax spans too many octaves")
    planes = _power_planes(graph, powers[0], 0, -(-last // k), scale)
    if k == 2:
        planes += _power_planes(graph, odds, 1, (last + 1) // 2, scale * (math.sqrt(2) - 1))
    return Operand(planes)


@operand.register
def _(quantizer: SULQuantizer, graph: Graph, x: str, log_x: str = "") -> Operand:
    """2^-ŷ with integers ŷ = round((q - z)·s), and the constant -η."""
    shift, scale = _as_float(quantizer.shift), _as_float(quantizer.scale)
    largest, zero_point = quantizer.n_levels - 1, int(quantizer.zero_point)
    shifted = graph.add("Log", graph.add("Add", x, graph.constant(shift)))
    codes, one = _log_codes(quantizer, graph, shifted, scale * LN2, largest - zero_point)
    if 0 <= one <= 255:
        steps = graph.add("DequantizeLinear", codes, graph.constant(scale), graph.constant(one, np.uint8))
    else:
        steps = graph.add("Sub", graph.add("Cast", codes, to=graph.float_type), graph.constant(one))
        steps = graph.add("Mul", steps, graph.constant(scale))
    powers = graph.add("Exp", graph.add("Mul", graph.add("Round", steps), graph.constant(LN2)))
    every = torch.arange(quantizer.n_levels, dtype=torch.uint8)
    exponents = -(quantizer.cpu().decode(every) + shift).double().log2().round()
    first, last = int(exponents.min()), int(exponents.max())
    if _plane_count(first, last) > MOST_PLANES:
        values = graph.add("Sub", powers, graph.constant(shift))
        return Operand(values=values, why="its softmax spans too many octaves")
    return Operand(_power_planes(graph, powers, first, last, 1.0), -shift)


@operand.register
def _(quantizer: AdaLogQuantizer, graph: Graph, x: str, log_x: str = "") -> Operand:
    """A table: code → value as multiple of the least one's unit, in base 256, a plane a digit."""
    return _adalog(quantizer, graph, log_x or graph.add("Log", x), 0.0)


@operand.register
def _(quantizer: ShiftedAdaLogQuantizer, graph: Graph, x: str, log_x: str = "") -> Operand:
    """The same of x + shift, which is at least 0, and the constant -shift."""
    shifted = graph.add("Max", graph.add("Add", x, graph.constant(quantizer.shift)), graph.constant(0.0))
    return _adalog(quantizer, graph, graph.add("Log", shifted), quantizer.shift)


def _adalog(quantizer: AdaLogQuantizer, graph: Graph, log_x: str, shift: float) -> Operand:
    scale, largest = _as_float(quantizer.scale), quantizer.n_levels - 1
    step = LN2 * int(quantizer.exponent) / 37
    relative = graph.add("Sub", log_x, graph.constant(math.log(scale))) if scale != 1 else log_x
    codes, _ = _log_codes(quantizer, graph, relative, step, largest)
    every = torch.arange(largest, -1, -1, dtype=torch.float32)
    values = AdaLogQuantizer._values(quantizer.cpu(), every).double().numpy()  # before the shift is taken away
    index = graph.add("Cast", codes, to=INT32)
    levels, unit = _levels(values / scale, quantizer.n_bits)
    if levels is None:
        named = graph.add("Gather", graph.constant(values - shift), index)
        return Operand(values=named, why="its quantizer spans too many octaves")
    planes = []
    for digit in range(MOST_PLANES):
        table = levels >> 8 * digit & 255
        if table.any():
            named = graph.add("Gather", graph.constant(table, np.uint8), index)
            planes.append(Plane(named, scale * unit * 256**digit))
    return Operand(planes, -shift)


def _levels(values: np.ndarray, n_bits: int) -> tuple[np.ndarray | None, float]:
    """Values as integers times a unit; None where they have too many digits."""
    multiples = 2 ** (n_bits + 1) - 2
    for bits in range(8 * MOST_PLANES + 1):
        levels = np.round(values * multiples * 2.0**bits)
        if levels.max() >= 256**MOST_PLANES:
            break
        if np.allclose(levels, values * multiples * 2.0**bits, rtol=1e-6, atol=0):
            return levels.astype(np.int64), 1 / (multiples * 2.0**bits)
    return None, 0.0
