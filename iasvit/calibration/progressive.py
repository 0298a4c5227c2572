"""Ranges by a layer's output, from coarse to fine: FPCS, the search of AdaLog (arXiv:2407.12951, section 3.3).

A quantizer's range is a point of the unit square: how much of the lower and of the upper end is kept, or for an
adaptive base, of the upper end, and the base. A coarse grid is tried, and then, step by step, the neighbours at half
the distance of the best points so far. What is tried sets the quantizer, so that what is measured is what its codes
stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from iasvit.nn import QuantLinear, QuantMatMul
from iasvit.quantizers import AdaLogQuantizer, Quantizer, UniformQuantizer
from iasvit.quantizers.adalog import EXPONENTS
from iasvit.quantizers.uniform import range_to_uniform

SIDE = 4  # of the coarse grid: 16 points
KEPT = 4  # points whose neighbours are tried
SMALLEST = 0.02  # part of an end that is kept at least


def progressive(errors: Callable[[Tensor], Tensor], rows: int, steps: int, device: torch.device) -> Tensor:
    """For each row the point of least error: (rows, 2).

    Args:
        errors: one point a row (rows, 2) → the error of each row (rows,).
        rows: searches that are done at once, each on its own.
        steps: refinements after the coarse grid.
    """
    line = torch.linspace(0, 1, SIDE, device=device)
    points = torch.cartesian_prod(line, line)[:, None].expand(-1, rows, -1)
    found = torch.stack([errors(point) for point in points])
    width = 1.0 / (SIDE - 1)
    for _ in range(steps):
        found, points = _best(found, points)
        width /= 2
        around = torch.tensor([-width, 0.0, width], device=device)
        offsets = torch.cartesian_prod(around, around)
        offsets = offsets[offsets.abs().sum(dim=1) > 0]
        new = (points[:, None] + offsets[None, :, None]).clamp(0, 1).flatten(0, 1)
        points = torch.cat([points, new])
        found = torch.cat([found, torch.stack([errors(point) for point in new])])
    return _best(found, points)[1][0]


def _best(errors: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    order = errors.argsort(dim=0, stable=True)[:KEPT]  # of equals the first
    return errors.gather(0, order), points.gather(0, order[..., None].expand(-1, -1, 2))


class _Range:
    """Sets a quantizer by points of the unit square.

    Args:
        quantizer: uniform, per tensor or per row, or AdaLog.
        x: values, as a row each where the quantizer has a range for each.
    """

    def __init__(self, quantizer: Quantizer, x: Tensor) -> None:
        self.quantizer = quantizer
        rows = x.flatten(1) if getattr(quantizer, "channel_dim", None) == 0 else x.reshape(1, -1)
        self.low, self.high = rows.amin(dim=1), rows.amax(dim=1)

    def set(self, point: Tensor) -> None:
        """Take the range of this point, (rows, 2)."""
        kept = SMALLEST ** (1 - point)
        if isinstance(self.quantizer, UniformQuantizer):
            scale, zero_point = range_to_uniform(self.low * kept[:, 0], self.high * kept[:, 1], self.quantizer.n_bits)
            self.quantizer.set_parameters(scale, zero_point)
        elif isinstance(self.quantizer, AdaLogQuantizer):
            top = (self.high + self.quantizer.shift) * kept[:, 0]
            exponent = EXPONENTS[0] + (point[:, 1] * (len(EXPONENTS) - 1)).round()
            self.quantizer.scale = top[0].clamp_min(torch.finfo(torch.float32).tiny).clone()
            self.quantizer.exponent = exponent[0].to(torch.int32)


@torch.no_grad()
def search_linear(layer: QuantLinear, x: Tensor, rounds: int, steps: int) -> None:
    """Set the quantizers of a Linear's weight and input in turn, by the squared error of what the layer outputs.

    Args:
        layer: both quantizers are calibrated.
        x: full-precision inputs, (tokens, C).
        rounds: how often in turn.
        steps: refinements of each search.
    """
    weight, target = layer.weight, x @ layer.weight.T
    weights = _Range(layer.weight_quantizer, weight)
    inputs = None if layer.input_quantizer is None else _Range(layer.input_quantizer, x)
    for _ in range(rounds):
        ours = x if layer.input_quantizer is None else layer.input_quantizer._fake_quantize(x)
        square, mixed = ours.T @ ours, weight @ (x.T @ ours)

        def of_weight(point: Tensor, square: Tensor = square, mixed: Tensor = mixed) -> Tensor:
            weights.set(point)
            values = weights.quantizer._fake_quantize(weight)
            return ((values @ square - 2 * mixed) * values).sum(dim=1)

        weights.set(progressive(of_weight, len(weight), steps, x.device))
        if inputs is None:
            return
        values = layer.weight_quantizer._fake_quantize(weight)
        _search(inputs, lambda found, values=values: found @ values.T, x, target, steps)


@torch.no_grad()
def search_product(product: QuantMatMul, left: Tensor, right: Tensor, rounds: int, steps: int) -> None:
    """The same for the two operands of a product, (..., M, K) and (..., K, N)."""
    target = left @ right
    operands = _Range(product.left_quantizer, left), _Range(product.right_quantizer, right)
    for _ in range(rounds):
        other = product.right_quantizer._fake_quantize(right)
        _search(operands[0], lambda found, other=other: found @ other, left, target, steps)
        other = product.left_quantizer._fake_quantize(left)
        _search(operands[1], lambda found, other=other: other @ found, right, target, steps)


def search_operand(
    quantizer: Quantizer, output: Callable[[Tensor], Tensor], x: Tensor, target: Tensor, steps: int
) -> None:
    """Set one operand's quantizer by the squared error of the output.

    Args:
        quantizer: calibrated; uniform per tensor, or AdaLog, whose scale and base are searched together.
        output: the operand's fake-quantized values → the output.
        x: the operand.
        target: the output in full precision.
        steps: refinements of the search.
    """
    _search(_Range(quantizer, x), output, x, target, steps)


def _search(operand: _Range, output: Callable[[Tensor], Tensor], x: Tensor, target: Tensor, steps: int) -> None:
    def errors(point: Tensor) -> Tensor:
        operand.set(point)
        return (output(operand.quantizer._fake_quantize(x)) - target).square().sum(dtype=torch.float64).reshape(1)

    operand.set(progressive(errors, 1, steps, x.device))


def sample(parts: Sequence[Tensor], rows: int) -> Tensor:
    """At most so many rows of tensors (..., C), evenly taken: (rows, C)."""
    whole = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
    return whole[:: max(1, -(-len(whole) // rows))]
