"""Min-max and RTN: every range from the least value to the largest, by plain loops."""

from __future__ import annotations

import copy

import pytest
import torch
from baselines_tiny import FAMILIES, tiny_images, tiny_model
from torch import Tensor, nn

from baselines.minmax import MinMax
from baselines.rtn import RTN
from iasvit.nn import quant_layers, quantizers_of
from iasvit.progress import Progress
from iasvit.quantizers import UniformQuantizer
from iasvit.spec import QuantSpec

SPEC = QuantSpec.parse("W3A4")


def check_range(x: Tensor, quantizer: UniformQuantizer, scale: Tensor, zero_point: Tensor) -> None:
    low, high = min(x.flatten().tolist()), max(x.flatten().tolist())
    steps = 2**quantizer.n_bits - 1
    assert scale.item() == pytest.approx((high - low) / steps, rel=1e-6)
    assert zero_point.item() == round(-low / ((high - low) / steps))


def check_weights(model: nn.Module, quantized: nn.Module) -> int:
    """Assert every output channel's range and rounding; how many there are."""
    channels = 0
    for name, layer in quant_layers(quantized):
        original, quantizer = model.get_submodule(name).weight, layer.weight_quantizer
        for row, scale, zero_point, values in zip(
            original, quantizer.scale, quantizer.zero_point, layer.weight, strict=True
        ):
            check_range(row, quantizer, scale, zero_point)
            nearest = (torch.round(row / scale) + zero_point).clamp(0, 7) - zero_point
            assert torch.equal(values, nearest * scale)
            channels += 1
    return channels


@pytest.mark.parametrize("family", FAMILIES)
def test_minmax_ranges_hold_every_value_that_calibration_saw(family: str) -> None:
    model = tiny_model(family)
    images = tiny_images(model, 3)
    quantized = MinMax().quantize(model, images, SPEC, Progress())
    assert check_weights(model, quantized) == sum(len(layer.weight) for _, layer in quant_layers(quantized))
    # What reached the activation quantizers was the full-precision model's.
    probe = copy.deepcopy(quantized)
    for name, layer in quant_layers(probe):
        layer.weight.copy_(model.get_submodule(name).weight)
    inputs: dict[str, Tensor] = {}
    for weights in (True, False):
        for name, quantizer in quantizers_of(probe, weights=weights):
            quantizer.enabled = False
            if not weights:
                quantizer.register_forward_pre_hook(
                    lambda module, args, name=name: inputs.__setitem__(name, args[0].clone())
                )
    probe(images)
    activations = dict(quantizers_of(quantized, weights=False))
    assert inputs.keys() == activations.keys()
    for name, x in inputs.items():
        quantizer = activations[name]
        assert quantizer.scale.ndim == 0
        check_range(x, quantizer, quantizer.scale, quantizer.zero_point)


@pytest.mark.parametrize("family", FAMILIES)
def test_rtn_rounds_weights_and_leaves_activations(family: str) -> None:
    model = tiny_model(family)
    quantized = RTN().quantize(model, tiny_images(model, 1), SPEC, Progress())
    assert check_weights(model, quantized) > 100
    rounded = copy.deepcopy(model)
    for name, layer in quant_layers(quantized):
        rounded.get_submodule(name).weight.copy_(layer.weight)
    images = tiny_images(model, 3, seed=2)
    torch.testing.assert_close(quantized(images), rounded(images), atol=1e-4, rtol=1e-4)
