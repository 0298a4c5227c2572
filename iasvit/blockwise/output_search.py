"""Ranges and bases by the error of a layer's output, operand by operand, in full-precision surroundings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn

from iasvit import distributed
from iasvit.calibration import ActivationStore, calibration_store
from iasvit.calibration.fisher import Capture, as_rows, captures
from iasvit.calibration.progressive import search_operand
from iasvit.calibration.spill import FileTensor, Table
from iasvit.nn import QuantMatMul, quantizers_of
from iasvit.quantizers import AdaLogQuantizer, Quantizer, UniformQuantizer
from iasvit.quantizers.uniform import range_to_uniform

ROUNDS, CANDIDATES = 3, 128
ROWS = 2**12  # of a layer's inputs that its search reads at most, evenly spaced
VALUES = 2**21  # of a product's operands and output, in whole matrices
BASE_STEPS = 5  # refinements of the search for a scale and a base


@torch.no_grad()
def search_outputs(
    quantized: nn.Module,
    images: ActivationStore,
    size: int,
    share: int | None,
    layers: Collection[nn.Module] | None = None,
) -> None:
    """Choose the ranges of all uniform quantizers by what their layer puts out (AdaLog's code line, section 0 there).

    For each layer or product by itself, on the full-precision model's activations: in 3 rounds weights, then inputs (or
    the left, then the right operand) take, of 128 multiples of their full range and what they have, what makes the
    squared error of the output least while the other operand is quantized as it then is. Weights choose for each output
    channel.

    Args:
        quantized: all its quantizers calibrated, activations per tensor; others, and those of other kinds, stay.
        images: calibration images.
        size: how many of them are read.
        share: bytes for each store of activations; None for no limit.
        layers: layers and products that are searched; None for all.
    """

    def search(capture: Capture) -> None:
        if layers is None or capture.layer in layers:
            search_product(capture) if isinstance(capture.layer, QuantMatMul) else search_layer(capture)

    quantizers = [quantizer for weights in (True, False) for _, quantizer in quantizers_of(quantized, weights=weights)]
    _search_each(quantized, images, size, share, quantizers, search)


@torch.no_grad()
def search_bases(quantized: nn.Module, images: ActivationStore, size: int, share: int | None) -> None:
    """Choose scale and base of all AdaLog quantizers by the squared error of what their layer or product puts out.

    The squared error of an attention map itself prefers a small base, whose last code, 0, swallows the many small
    values of the map's tail, although together they weigh much in A·V. The other operand is quantized as it then is.

    Args:
        quantized: all its quantizers calibrated; others than AdaLog's stay.
        images: calibration images.
        size: how many of them are read.
        share: bytes for each store of activations; None for no limit.
    """
    found = [quantizer for _, quantizer in quantizers_of(quantized, weights=False)]
    found = [quantizer for quantizer in found if isinstance(quantizer, AdaLogQuantizer)]
    if found:
        _search_each(quantized, images, size, share, found, search_base)


def _search_each(
    quantized: nn.Module,
    images: ActivationStore,
    size: int,
    share: int | None,
    quantizers: list[Quantizer],
    search: Callable[[Capture], None],
) -> None:
    """Search each layer and product by its capture; of several processes the first does, and all get the quantizers."""

    def search_all() -> None:
        device = next(quantized.parameters()).device
        some = calibration_store(images.batches(images.passes(size), limit=size), device, share)
        for layers in captures(quantized, some, None, memory_budget=share):
            for capture in layers:
                search(capture)

    distributed.done_by_first(quantizers, search_all)


def search_base(capture: Capture) -> None:
    """Choose scale and base of an AdaLog quantizer of a Linear's input or of a product's left operand."""
    layer = capture.layer
    if isinstance(layer, QuantMatMul):
        quantizer, right = layer.left_quantizer, layer.right_quantizer
        if isinstance(quantizer, AdaLogQuantizer):
            left, other, y = _product_operands(capture)
            other = _values(right, other)
            search_operand(quantizer, lambda found: found @ other, left, y, BASE_STEPS)
    elif isinstance(layer.input_quantizer, AdaLogQuantizer):
        x, y = (rows.to(layer.weight.device) for rows in _rows(capture))
        weight = _values(layer.weight_quantizer, layer.weight.flatten(1))
        target = y if layer.bias is None else y - layer.bias
        search_operand(layer.input_quantizer, lambda found: found @ weight.T, x, target, BASE_STEPS)


def search_layer(capture: Capture) -> None:
    """Choose the ranges of a Linear or Conv2d."""
    layer, device = capture.layer, capture.layer.weight.device
    x, y = _rows(capture)
    weight = layer.weight.flatten(1)
    target = y.to(device) if layer.bias is None else y.to(device) - layer.bias
    x = x.to(device)
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    for _ in range(ROUNDS):
        read = x if inputs is None else _values(inputs, x)
        if _searchable(weights, 0):
            gram, cross = read.T @ read, target.T @ read

            def error(quantized: Tensor, gram: Tensor = gram, cross: Tensor = cross) -> Tensor:
                # |Ŵ x̂ - y|² summed over the rows, but for what is the same for all candidates.
                return ((quantized @ gram - 2 * cross) * quantized).sum(dim=1, dtype=torch.float64)

            found = [(error(weights._fake_quantize_with(weight, s, z)), s, z) for s, z in _candidates(weights, weight)]
            weights.set_parameters(*_best(found))
        if inputs is None or not _searchable(inputs, None):
            return
        of_inputs = _product_error(_values(weights, weight).T, target, first=True)
        tries = [(of_inputs(inputs._fake_quantize_with(x, s, z)), s, z) for s, z in _candidates(inputs, x)]
        inputs.set_parameters(*_best(tries))


def search_product(capture: Capture) -> None:
    """Choose the ranges of a product of activations."""
    left, right, y = _product_operands(capture)
    operands = [(capture.layer.left_quantizer, left), (capture.layer.right_quantizer, right)]
    for _ in range(ROUNDS):
        for place, (quantizer, x) in enumerate(operands):
            if not _searchable(quantizer, None):
                continue
            error = _product_error(_values(*operands[1 - place]), y, first=place == 0)
            found = [(error(quantizer._fake_quantize_with(x, s, z)), s, z) for s, z in _candidates(quantizer, x)]
            quantizer.set_parameters(*_best(found))


def _product_error(other: Tensor, y: Tensor, first: bool) -> Callable[[Tensor], Tensor]:
    """What measures |X̂ O - Y|² or, not `first`, |O X̂ - Y|², summed, but for what is the same for all X̂: (1,).

    Where the inner dimension is the smaller one (queries, keys, qkv, fc1) it is a form in X̂, without the product.
    """
    transposed = other.transpose(-2, -1)
    inner, outer = (other.shape[-2], other.shape[-1]) if first else (other.shape[-1], other.shape[-2])
    if inner < outer:
        gram, cross = (other @ transposed, y @ transposed) if first else (transposed @ other, transposed @ y)

        def form(x: Tensor) -> Tensor:
            return (((x @ gram if first else gram @ x) - 2 * cross) * x).sum(dtype=torch.float64)[None]

        return form

    def error(x: Tensor) -> Tensor:
        return ((x @ other if first else other @ x) - y).square().sum(dtype=torch.float64)[None]

    return error


def _searchable(quantizer: Quantizer, channel_dim: int | None) -> bool:
    return isinstance(quantizer, UniformQuantizer) and quantizer.channel_dim == channel_dim and quantizer.calibrated


def _values(quantizer: Quantizer, x: Tensor) -> Tensor:
    return quantizer.decode(quantizer.encode(x)) if quantizer.calibrated else x


def _candidates(quantizer: UniformQuantizer, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales and zero-points to try, which broadcast against x: what the quantizer has first."""
    yield quantizer._shaped(x.ndim)
    if quantizer.channel_dim is None:
        low, high = x.amin(), x.amax()
    else:
        low, high = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)
    low, high = low.clamp_max(0), high.clamp_min(0)
    for step in range(1, CANDIDATES + 1):
        yield range_to_uniform(low * step / CANDIDATES, high * step / CANDIDATES, quantizer.n_bits)


def _best(found: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """For each channel the scale and zero-point of least error; of equals the first."""
    best = torch.stack([error for error, _, _ in found]).argmin(dim=0)
    every = torch.arange(len(best), device=best.device)
    scales, zero_points = (torch.stack([item[part].reshape(-1) for item in found]) for part in (1, 2))
    return scales[best, every], zero_points[best, every]


def _rows(capture: Capture) -> tuple[Tensor, Tensor]:
    """At most ROWS rows of what a layer reads and puts out."""
    x, y = capture.inputs[0], capture.output
    if isinstance(x, Tensor) and isinstance(y, Tensor) and (x.ndim > 2 or y.ndim > 2):
        x, y = as_rows(capture.layer, (x, y))
    chosen = _spaced(len(x), ROWS)
    return x[chosen], y[chosen]


def _product_operands(capture: Capture) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices of a product's left and right operand and output."""
    tables = (*capture.inputs, capture.output)
    most = max(1, VALUES // max(table.shape[-1] * table.shape[-2] for table in tables))
    left, right, y = (_matrices(table, most) for table in tables)
    return left, right, y


def _matrices(table: Table, most: int) -> Tensor:
    """At most so many matrices of a product's operand."""
    flat = table if isinstance(table, FileTensor) else table.flatten(0, -3)
    return flat[_spaced(len(flat), most)]


def _spaced(count: int, most: int) -> Tensor:
    return torch.arange(0, count, -(-count // most))
