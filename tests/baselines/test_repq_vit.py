"""RepQ-ViT: ranges as plain loops over channels give them, calibration in the order of the forward, exact folding."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from baselines_tiny import FAMILIES, tiny_images, tiny_model
from torch import Tensor, nn

from baselines.repq_vit import RepQViT
from iasvit.calibration import calibrate_in_sequence, observe
from iasvit.errors import IasvitError
from iasvit.models import find_pairs, insert_quantizers
from iasvit.nn import QuantLinear, quant_layers, quantizers_of
from iasvit.progress import Progress
from iasvit.quantizers import ACTIVATION_PERCENTILES, WEIGHT_PERCENTILES, Log2Quantizer, Quantizer, UniformQuantizer
from iasvit.spec import QuantSpec
from tasks.mini import zoo


def quantile(ordered: Tensor, p: float) -> Tensor:
    rank = p * (len(ordered) - 1)
    low, high = math.floor(rank), math.ceil(rank)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def slow_uniform(x: Tensor, bits: int, percentiles: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of one channel: the percentile pair of least mean squared error."""
    ascending, best = x.sort().values, None
    for p in percentiles:
        low, high = -quantile(-ascending.flip(0), p), quantile(ascending, p)
        scale = torch.clamp((high - low) / (2**bits - 1), min=1e-8)
        zero_point = torch.round(-low / scale)
        codes = torch.clamp(torch.round(x / scale) + zero_point, 0, 2**bits - 1)
        error = float((((codes - zero_point) * scale - x) ** 2).double().mean())
        if best is None or error < best[0]:
            best = error, scale, zero_point
    return best[1], best[2]


def slow_log_sqrt2(x: Tensor, bits: int) -> Tensor:
    """Scale of the log-sqrt2 quantizer."""
    ordered, best = x.flatten().sort().values, None
    for p in ACTIVATION_PERCENTILES:
        scale = quantile(ordered, p)
        codes = torch.clamp(torch.round(-2 * torch.log2(x / scale)), 0, 2**bits - 1)
        odd = codes % 2 == 1
        values = 2.0 ** -torch.ceil(codes / 2) * torch.where(odd, math.sqrt(2) * scale, scale)
        values = torch.where(codes == 2**bits - 1, 0.0, values)
        error = float(((values - x) ** 2).double().mean())
        if best is None or error < best[0]:
            best = error, scale
    return best[1]


@dataclass
class Calibrated:
    """A quantizer's calibration: what it was given and what it chose."""

    quantizer: Quantizer
    x: Tensor
    scale: Tensor
    zero_point: Tensor | None


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> list[Calibrated]:
    calls: list[Calibrated] = []
    original = Quantizer.calibrate

    def calibrate(self: Quantizer, x: Tensor) -> None:
        original(self, x)
        zero_point = getattr(self, "zero_point", None)
        calls.append(Calibrated(self, x.clone(), self.scale.clone(), zero_point))

    monkeypatch.setattr(Quantizer, "calibrate", calibrate)
    return calls


def compare(call: Calibrated, channel_dim: int | None) -> int:
    """Assert that a calibration equals the plain loop; how many channels were compared."""
    if isinstance(call.quantizer, Log2Quantizer):
        assert torch.equal(call.scale, slow_log_sqrt2(call.x, call.quantizer.n_bits))
        return 1
    percentiles = WEIGHT_PERCENTILES if channel_dim == 0 else ACTIVATION_PERCENTILES
    channels = [call.x.flatten()] if channel_dim is None else [c.flatten() for c in call.x.unbind(channel_dim)]
    chosen = [slow_uniform(channel, call.quantizer.n_bits, percentiles) for channel in channels]
    assert torch.equal(call.scale.reshape(-1), torch.stack([scale for scale, _ in chosen]))
    assert torch.equal(call.zero_point.reshape(-1), torch.stack([zero_point for _, zero_point in chosen]).int())
    return len(channels)


def check_parity(model: nn.Module, images: Tensor, spec: str, calls: list[Calibrated]) -> dict[str, int]:
    quantized = RepQViT().quantize(model, images, QuantSpec.parse(spec), Progress())
    layers, pairs = quant_layers(quantized), find_pairs(quantized)
    weights = {id(layer.weight_quantizer) for _, layer in layers}
    norms = {id(linear.input_quantizer) for pair in pairs for linear in pair.linears}
    first = {id(call.quantizer): call for call in reversed(calls)}
    last = {id(call.quantizer): call for call in calls}
    channels = sum(
        compare(call, 0 if id(call.quantizer) in weights else -1 if id(call.quantizer) in norms else None)
        for call in calls
    )
    for _, layer in layers:  # the weights are the values of the codes chosen last
        call = last[id(layer.weight_quantizer)]
        shape = [-1] + [1] * (call.x.ndim - 1)
        scale, zero_point = call.scale.view(shape), call.zero_point.view(shape)
        codes = torch.clamp(torch.round(call.x / scale) + zero_point, 0, 2**layer.weight_quantizer.n_bits - 1)
        assert torch.equal(layer.weight_quantizer.encode(layer.weight), codes.to(torch.uint8))
    for pair in pairs:  # what was folded, a channel at a time
        original, linear = model.get_submodule(pair.name), pair.linears[0]
        at_input, before, after = (
            first[id(linear.input_quantizer)],
            first[id(linear.weight_quantizer)],
            last[id(linear.weight_quantizer)],
        )
        s, z = at_input.scale, at_input.zero_point.float()
        mean_s, mean_z = s.mean(), torch.round(z.mean())
        for channel in range(len(s)):
            ratio, shift = s[channel] / mean_s, s[channel] * (z[channel] - mean_z)
            torch.testing.assert_close(pair.norm.weight[channel], original.weight[channel] / ratio)
            torch.testing.assert_close(pair.norm.bias[channel], (original.bias[channel] + shift) / ratio)
            torch.testing.assert_close(after.x[:, channel], before.x[:, channel] * ratio)
        assert linear.input_quantizer.channel_dim is None
        assert torch.equal(linear.input_quantizer.scale, mean_s)
        assert torch.equal(linear.input_quantizer.zero_point, mean_z.int())
    return {"layers": len(layers), "calibrations": len(calls), "channels": channels, "pairs": len(pairs)}


@pytest.mark.parametrize("spec", ["W3A3", "W6A6"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_get_the_ranges_of_the_plain_loop(family: str, spec: str, record: list[Calibrated]) -> None:
    model = tiny_model(family)
    counts = check_parity(model, tiny_images(model, 4), spec, record)
    # A block has 4 layers and 8 activation quantizers; the weights of its 2 pairs are calibrated twice.
    layers, pairs = {"vit": (10, 4), "swin": (15, 7)}[family]
    activations = {"vit": 2 * 8 + 1, "swin": 3 * 8 + 1 + 1}[family]
    assert (counts["layers"], counts["pairs"]) == (layers, pairs)
    assert counts["calibrations"] == layers + activations + pairs


@pytest.mark.parametrize("backbone", ["deit_t"])
def test_mini_backbones_get_the_ranges_of_the_plain_loop(backbone: str, record: list[Calibrated]) -> None:
    model = zoo.build(backbone).requires_grad_(False)
    images = torch.randn(2, 3, zoo.IMAGE_SIZE, zoo.IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    counts = check_parity(model, images, "W4A4", record)
    assert counts["layers"] == {"deit_t": 12 * 4 + 2, "swin_t": 12 * 4 + 3 + 2}[backbone]
    assert counts["pairs"] == {"deit_t": 24, "swin_t": 24 + 3}[backbone]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_quantizer_is_calibrated_on_what_it_will_be_given(family: str, record: list[Calibrated]) -> None:
    """Weights and all quantizers before it are on: a second forward brings every quantizer the very same input."""
    model, method = tiny_model(family), RepQViT()
    spec = QuantSpec.parse("W3A3")
    network = insert_quantizers(model, spec, method.weight_quantizer, method.activation_quantizer)
    for _, layer in quant_layers(network):
        layer.calibrate_weight()
    record.clear()
    images = tiny_images(model, 3)
    activations = list(quantizers_of(network, weights=False))
    calibrate_in_sequence(activations, lambda: network(images))
    given = {id(call.quantizer): call.x for call in record}
    assert len(given) == len(activations)
    again: dict[int, Tensor] = {}

    def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        again[id(module)] = args[0].clone()

    for _, quantizer in activations:
        quantizer.register_forward_pre_hook(see)
    network(images)
    assert all(torch.equal(again[key], x) for key, x in given.items())


def test_post_layernorm_codes_survive_the_folding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The per-tensor code of γ'… equals the per-channel code of what the LayerNorm output before."""
    model = tiny_model("vit")
    before: list[UniformQuantizer] = []
    original = observe.calibrate_in_sequence

    def calibrate(quantizers: list[tuple[str, Quantizer]], run: Callable[[], object], budget: int | None) -> object:
        outputs = original(quantizers, run, budget)
        before.extend(copy.deepcopy(q) for name, q in quantizers if name.endswith("qkv.input_quantizer"))
        return outputs

    monkeypatch.setattr(observe, "calibrate_in_sequence", calibrate)
    quantized = RepQViT().quantize(model, tiny_images(model, 4), QuantSpec.parse("W4A4"), Progress())
    x = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(5))
    for block, reference, quantizer in zip(quantized.blocks, model.blocks, before, strict=True):
        per_tensor = block.attn.qkv.input_quantizer.encode(block.norm1(x)).int()
        difference = (per_tensor - quantizer.encode(reference.norm1(x)).int()).abs()
        assert quantizer.channel_dim == -1
        assert difference.max() <= 1  # a value on the border between two codes may go either way by rounding
        assert (difference > 0).float().mean() < 1e-3


def test_a_linear_without_bias_gains_one_and_log_sqrt2_is_used() -> None:
    model = tiny_model("swin")
    quantized = RepQViT().quantize(model, tiny_images(model, 4), QuantSpec.parse("W8A8"), Progress())
    reduction = quantized.layers[1].downsample.reduction
    assert model.layers[1].downsample.reduction.bias is None
    assert isinstance(reduction, QuantLinear)
    assert reduction.bias.abs().max() > 0
    softmax = quantized.layers[0].blocks[0].attn.matmul_av.left_quantizer
    assert isinstance(softmax, Log2Quantizer)
    assert softmax.steps_per_octave == 2


def test_a_quantizer_that_is_never_reached_is_named() -> None:
    with pytest.raises(IasvitError, match="'lost' was not reached"):
        calibrate_in_sequence([("lost", UniformQuantizer(4))], lambda: None)
