"""Fake quantization on a CPU where no gradient is wanted: as few passes over the data as give the very same values.

A quantizer of one scale is a function of one float32 that is constant from one threshold to the next. Where the
thresholds lie evenly along log2(x + shift), one line gives the code of each value, or the code before it; one
comparison with the threshold between the two decides. So log2, log-sqrt2, AdaLog and SULQ cost alike, whatever their
formulas. The curve is by octaves of straight lines: the bits of the float x + shift.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from iasvit.quantizers import kernels

LEAST = 2**15  # values; below it the few calls of the formula cost less
# A quantizer is several passes, and values that do not fit the cache wait for memory in each. So many do, of a thread.
PIECE = 2**17
NEARBY = 64  # floats on either side of a threshold for which the values are compared with those of the formula
SWEEP = 2**14  # floats of the whole range, likewise
_NORMAL, _LARGEST = 0x00800000, 0x7F7FFFFF  # the least and the largest of them, as `_floats` counts


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape, cut along the first dimension into pieces of about PIECE values a thread."""
    if tensors[0].numel() <= PIECE:
        return iter((tensors,))
    flat = all(tensor.is_contiguous() for tensor in tensors)
    tensors = tuple(tensor.view(-1) for tensor in tensors) if flat else tensors
    size, rows = PIECE * torch.get_num_threads(), len(tensors[0])
    return zip(*(t.split(max(1, size * rows // t.numel())) for t in tensors), strict=True)


class Steps(NamedTuple):
    """A function of one float32 that is constant from one threshold to the next.

    Attributes:
        thresholds: float32, ascending, and NaN behind the last of them up to one of `kernels.SIZES`.
        values: float32, as many: values[k] from thresholds[k - 1] on.
        shift: of the curve p = `_curve`(x, shift).
        line: (slope, offset): slope·p + offset, cut to a whole number in [0, top], is k or k - 1 for each x of
            values[k].
        top: the last number.
        least: the function is known from it on.
    """

    thresholds: Tensor
    values: Tensor
    shift: float
    line: tuple[float, float]
    top: int
    least: float


def _curve(x: Tensor, shift: float) -> Tensor:
    """Where x (float32) lies on the curve along which thresholds are evenly spaced: float32."""
    return (x + shift).view(torch.int32).float()


def step_function(
    codes_of: Callable[[Tensor], Tensor], values_of: Callable[[Tensor], Tensor], shift: float
) -> Steps | None:
    """The steps of values_of(codes_of(x)); None where they are not evenly spaced along the curve, or not float32.

    Args:
        codes_of: code of each float32; from one float to the next it never turns back. NaN where there is none.
        values_of: value of each code.
        shift: of the curve along which the thresholds are evenly spaced to within half a step.
    """
    low = 0 if codes_of(_floats(torch.tensor([-_LARGEST]))).isnan() else -_LARGEST
    first, last = codes_of(_floats(torch.tensor([low, _LARGEST]))).tolist()
    if math.isnan(last - first):
        return None
    codes = torch.linspace(first, last, int(abs(last - first)) + 1)
    below, above = torch.full((len(codes) - 1,), low), torch.full((len(codes) - 1,), _LARGEST)
    while len(below) and (above - below).max() > 1:
        middle = (below + above).div(2, rounding_mode="floor")
        passed = (codes_of(_floats(middle)) - first).abs() >= (codes[1:] - first).abs()
        below, above = torch.where(passed, below, middle), torch.where(passed, middle, above)
    values = values_of(codes)
    if values.dtype != torch.float32:  # so are the parameters
        return None
    changes = values[1:] != values[:-1]
    near = above[:, None] + torch.arange(-NEARBY, NEARBY + 1)
    sweep = torch.linspace(low, _LARGEST, SWEEP, dtype=torch.float64).long()
    x = _floats(torch.cat([sweep, near.flatten()]).clamp_(low, _LARGEST))
    expected = values_of(codes_of(x))
    # Where codes share a value, only the changes of values may be evenly spaced. Subnormal floats have no octaves.
    for some, start in ((changes | True, low), (changes, low), (changes, low or _NORMAL)):
        kept = some & (above > start)
        levels = torch.cat([values[:-1][kept], values[-1:]])
        if len(levels) > kernels.SIZES[-1]:
            continue
        steps = _along(shift, above[kept], levels, -torch.inf if start < 0 else _floats(torch.tensor(start)).item())
        known = x >= steps.least
        if torch.equal(look_up(x[known], steps, lambda rest: rest), expected[known]):
            return steps
    return None


def _floats(numbers: Tensor) -> Tensor:
    """The floats that integers count, int64 → float32: 0 is 0, and n + 1 the next above n."""
    return torch.where(numbers >= 0, numbers, -(2**31) - numbers).to(torch.int32).view(torch.float32)


def _along(shift: float, numbers: Tensor, values: Tensor, least: float) -> Steps:
    """Steps at the floats of these numbers, with the line that fits best."""
    thresholds, count = _floats(numbers), len(numbers)
    size = next(size for size in kernels.SIZES if size > count)
    # From threshold k on, counted from 0, the line is to be k at least, and less than k + 1 at the float before it.
    ends = torch.stack([thresholds, _floats(numbers - 1)])
    wanted = torch.stack([torch.searchsorted(numbers, numbers, right=True) - 1, torch.searchsorted(numbers, numbers)])
    more = size - count
    return Steps(
        torch.nn.functional.pad(thresholds, (0, more), value=torch.nan),
        torch.cat([values, values[-1:].expand(more - 1)]),
        shift,
        _line(_curve(ends, shift).double(), wanted + 0.5),
        max(count - 1, 0),
        least,
    )


def _line(p: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Slope and offset of the line through (p, wanted), by least squares, moved to the middle of where it may lie."""
    if not p.numel():
        return 0.0, 0.0
    alone = wanted[0] == wanted[1]  # several thresholds that share a float lie elsewhere
    some_p, some_wanted = p[:, alone], wanted[:, alone]
    centred = some_p - some_p.mean()
    slope = ((centred * some_wanted).sum() / centred.square().sum()).nan_to_num(0.0)
    least, most = wanted - slope * p
    return slope.item(), ((least.amax() + most.amin()) / 2).item()


def look_up(x: Tensor, steps: Steps, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Values of the steps for x (float32, any shape), and what `compute` gives for those x that the steps leave out."""
    x = x.contiguous()
    if kernels.serve(x):
        values, known = kernels.look_up(x, steps)
    else:
        values = torch.empty_like(x)
        for source, target in pieces(x, values):
            _look_up(source, steps, target)
        known = False
    if not known:
        where = ~(x >= steps.least)
        if where.any():
            values[where] = compute(x[where])
    return values


def _look_up(x: Tensor, steps: Steps, out: Tensor) -> None:
    """What the loop in C computes, by torch's operators."""
    slope, offset = steps.line
    at = _curve(x, steps.shift).mul_(slope).add_(offset).clamp_(0, steps.top).nan_to_num_(0.0).to(torch.int32).view(-1)
    at += x.view(-1) >= steps.thresholds.index_select(0, at)
    torch.index_select(steps.values, 0, at, out=out.view(-1))
