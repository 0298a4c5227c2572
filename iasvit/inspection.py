"""The effect of quantization on each layer: errors against full precision, ranges, channel spread and attention's
tail."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor, nn

from iasvit.models import Segment, plain, prepare, segments
from iasvit.nn import QuantConv2d, QuantLinear, QuantMatMul, quantizers_of
from iasvit.quantizers import Quantizer, UniformQuantizer
from iasvit.spec import QuantSpec

TAIL = 2.0**-7  # what 3-bit log2 sends to one code


def with_same_names(model: nn.Module) -> nn.Module:
    """The full-precision model with its layers where a quantized one has them, all quantizers off."""
    same = prepare(
        plain(model),
        QuantSpec(8, 8),
        lambda site: UniformQuantizer(site.n_bits),
        lambda site: UniformQuantizer(site.n_bits),
    )
    for weights in (True, False):
        for _, quantizer in quantizers_of(same, weights=weights):
            quantizer.enabled = False
    return same.eval()


def observe(model: nn.Module, run: Callable[[], Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The output of every quantized layer while `run` runs, by name, and what `run` returned."""
    outputs: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: outputs.update({name: output})

    handles = [
        layer.register_forward_hook(watch(name))
        for name, layer in model.named_modules()
        if isinstance(layer, (QuantLinear, QuantConv2d, QuantMatMul))
    ]
    try:
        return outputs, run()
    finally:
        for handle in handles:
            handle.remove()


def relative_error(output: Tensor, target: Tensor) -> float:
    """‖output - target‖² / ‖target‖²."""
    return ((output - target).square().sum() / target.square().sum()).item()


@torch.inference_mode()
def layer_errors(model: nn.Module, quantized: nn.Module, images: Tensor) -> list[dict[str, object]]:
    """A row (layer, kind, own, streamed) for each quantized layer, and one of kind "block" for each segment.

    Args:
        model: full precision, of `with_same_names`.
        quantized: made from it.
        images: float32 (B, 3, H, W), normalised.
    """
    x = x_q = images
    rows = []
    layers = {name for name, layer in model.named_modules() if isinstance(layer, (QuantLinear, QuantConv2d))}

    def outputs(network: nn.Module, segment: Segment, inputs: Tensor) -> dict[str, Tensor]:
        seen, output = observe(network, lambda: segment.run(inputs))
        return seen | {segment.name: output}

    for full, mine in zip(segments(model), segments(quantized), strict=True):
        target = outputs(model, full, x)
        own, streamed = outputs(quantized, mine, x), outputs(quantized, mine, x_q)
        for name, y in target.items():
            block = name == full.name and name not in layers  # the head is a link and a layer
            kind = "block" if block else ".".join(name.split(".")[-2:])
            rows.append(
                {
                    "layer": name,
                    "kind": kind,
                    "own": relative_error(own[name], y),
                    "streamed": relative_error(streamed[name], y),
                }
            )
        x, x_q = target[full.name], streamed[mine.name]
    return rows


@torch.no_grad()
def quantizer_table(quantized: nn.Module, images: Tensor) -> pd.DataFrame:
    """A row for each quantizer of a model that is quantized, in the order of the modules.

    Args:
        quantized: with calibrated quantizers.
        images: float32 (B, 3, H, W), normalised; activations are those of this batch in the quantized model.

    Returns:
        Columns layer, operand (weight, input, left, right), quantizer (its kind; "off" where it is switched off), bits,
        min, max, spread (largest channel's range over the median channel's: output channels of weights, last dimension
        of activations), tail (share of post-softmax values below 2^-7; NaN elsewhere) and error (‖x̂ - x‖² / ‖x‖² of
        activations; NaN for weights, which are rounded already).
    """
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        return lambda _module, args: seen.update({name: args[0]})

    activations = dict(quantizers_of(quantized, weights=False))
    handles = [quantizer.register_forward_pre_hook(watch(name)) for name, quantizer in activations.items()]
    try:
        quantized(images)
    finally:
        for handle in handles:
            handle.remove()
    weights = dict(quantizers_of(quantized, weights=True))
    rows = []
    for name, quantizer in quantized.named_modules():
        if name in weights:
            weight = quantized.get_submodule(name.rpartition(".")[0]).weight
            rows.append(_row(name, quantizer, weight.flatten(1).T))
        elif name in activations and name in seen:
            x = seen[name]
            row = _row(name, quantizer, _channels_last(quantized, name, x).flatten(0, -2))
            if quantizer.enabled:
                row["error"] = relative_error(quantizer(x), x)
            if name.endswith("matmul_av.left_quantizer"):
                row |= {"tail": (x < TAIL).float().mean().item(), "spread": float("nan")}  # it has no channels
            rows.append(row)
    columns = ["layer", "operand", "quantizer", "bits", "min", "max", "spread", "tail", "error"]
    return pd.DataFrame(rows, columns=columns)


def _channels_last(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """x with its channels as the last dimension: a convolution's come second, those of transposed keys last but one."""
    if isinstance(model.get_submodule(name.rpartition(".")[0]), QuantConv2d):
        return x.movedim(1, -1)
    return x.transpose(-2, -1) if name.endswith("matmul_qk.right_quantizer") else x


def _row(name: str, quantizer: Quantizer, values: Tensor) -> dict[str, object]:
    """values: (n, channels)."""
    least, most = values.aminmax(dim=0)
    ranges = most - least
    layer, _, operand = name.rpartition(".")
    return {
        "layer": layer,
        "operand": operand.removesuffix("_quantizer"),
        "quantizer": quantizer.kind if quantizer.enabled else "off",
        "bits": quantizer.n_bits,
        "min": least.min().item(),
        "max": most.max().item(),
        "spread": (ranges.max() / ranges.median().clamp_min(1e-12)).item(),
    }
