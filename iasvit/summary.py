"""The contents of a saved model's file, as text."""

from __future__ import annotations

import os

from torch import nn

from iasvit.admission import admission
from iasvit.artifact import load, packed_bytes
from iasvit.models import build
from iasvit.nn import quant_layers, quantizers_of
from iasvit.quantizers import Quantizer

_OFF = "-"  # in full precision


def summary(path: str | os.PathLike[str]) -> str:
    """How a saved model was made, its bytes full and packed, and the bits of each layer's weights and inputs.

    Raises:
        IasvitError: as `iasvit.load`.
    """
    model = load(path)
    made = model.quantization
    full = sum(tensor.numel() * tensor.element_size() for tensor in build(made.architecture).state_dict().values())
    packed = packed_bytes(model)
    options = ", ".join(f"{name}={value}" for name, value in made.options.items())
    heads = [
        ("method", made.method),
        ("spec", made.spec),
        ("options", options or "none"),
        ("rules", str(admission(model))),
        ("full size", f"{full} bytes"),
        ("packed size", f"{packed} bytes, {full / packed:.1f} times smaller"),
    ]
    rows = [("layer", "weights", "inputs"), *layer_bits(model)]
    width = max(len(row[0]) for row in rows)
    table = [f"{name:<{width}}  {weights:>7}  {inputs:>6}" for name, weights, inputs in rows]
    return "\n".join([*(f"{name + ':':<13}{value}" for name, value in heads), "", *table])


def layer_bits(model: nn.Module) -> list[tuple[str, str, str]]:
    """(layer, bits of weights, bits of inputs) of all layers and products of a quantized model; "-" where it is float.

    The two operands of a product of activations are lines of their own.
    """
    layers = dict(quant_layers(model))
    rows = [(name, _bits(layer.weight_quantizer), _bits(layer.input_quantizer)) for name, layer in layers.items()]
    for name, quantizer in quantizers_of(model, weights=False):
        if name.rpartition(".")[0] not in layers:
            rows.append((name, _OFF, _bits(quantizer)))
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return sorted(rows, key=lambda row: order[row[0]])


def _bits(quantizer: Quantizer | None) -> str:
    return str(quantizer.n_bits) if quantizer is not None and quantizer.enabled else _OFF
